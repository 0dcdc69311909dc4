"""`casemate gpu claims | usage | log | clear`, `casemate gc` for devices: a real ledger, real processes."""

import json
import os
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import pytest

from cli import gpu
from cli import ledger as command
from config.places import LEDGER_FILE as FILE
from shim import system
from tests.unit.cli.conftest import Casemate, Shim
from tests.unit.vfio.hosts import TWO_MIB, at, dgx
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.trees import MEM64, Model, Tree
from vfio.binding import Bus
from vfio.ledger.demand import HugePages, Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Pod, Process, State

TRAINING, SERVING = Pod("k8s.io", "training", "red"), Pod("k8s.io", "serving", "blue")
FIRST = at("11:00.0")


@pytest.fixture
def ledger(host: Path) -> Iterator[Ledger]:
    with Ledger(host / "ledger", actor="the test") as ledger:
        yield ledger


def me() -> Process:
    return Process.here(os.getpid(), system.start_time(os.getpid()))


def claim(ledger: Ledger, pod: Pod, owner: Process | None = None) -> int:
    wanted = Wanted((Request(2, kind="gpu"),), cpus=4, pages=HugePages(8, TWO_MIB))
    return ledger.claim(pod, owner or me(), wanted, dgx()).id


@pytest.mark.parametrize("words", [("claims",), ("usage",), ("usage", "--tenants"), ("log",)])
def test_who_only_looks_makes_no_ledger(casemate: Casemate, host: Path, words: tuple[str, ...]) -> None:
    result = casemate("gpu", *words)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.strip() in ("all devices are free", "no pod of this host was ever given a device")
    assert json.loads(casemate("gpu", *words, "--json").stdout) in ([], {"devices": [], "claims": []})
    assert casemate("gc").exit_code == 0
    assert not (host / "ledger").exists()


def test_claims_has_devices_cpus_and_pages(casemate: Casemate, ledger: Ledger) -> None:
    claim(ledger, TRAINING)
    ledger.quarantine(at("42:00.0"), "fell off the bus")
    lines = casemate("gpu", "claims").stdout.splitlines()
    assert lines[0].split() == ["ADDRESS", "STATE", "POD", "TENANT", "SINCE", "REASON"]
    assert lines[1].split()[:4] == ["0000:11:00.0", "claimed", "k8s.io/training", "red"]
    assert lines[3].split()[:4] == ["0000:42:00.0", "quarantined", "-", "-"]
    assert lines[3].endswith("fell off the bus")
    assert lines[4] == "k8s.io/training: CPUs 0-1,64-65 of node 0"
    assert lines[5] == "k8s.io/training: 8 huge pages of 2048 KiB of node 0"
    found = json.loads(casemate("gpu", "claims", "--json").stdout)
    assert found["claims"][0]["cpus"] == {"0": [0, 1, 64, 65]}
    assert [each["state"] for each in found["devices"]] == ["claimed", "claimed", "quarantined"]


def test_claims_has_nvlink_partitions(casemate: Casemate, ledger: Ledger) -> None:
    ledger.claim(TRAINING, me(), Wanted((Request(4, partition=True),)), dgx())
    assert "k8s.io/training: NVLink partition 4.0" in casemate("gpu", "claims").stdout.splitlines()


def test_claims_has_cpus_of_a_pod_without_devices(casemate: Casemate, ledger: Ledger) -> None:
    ledger.claim(TRAINING, me(), Wanted(cpus=3), dgx())
    assert casemate("gpu", "claims").stdout == "k8s.io/training: CPUs 0-1,64-65 of node 0\n"
    (found,) = json.loads(casemate("gpu", "claims", "--json").stdout)["claims"]
    assert (found["pod"], found["cpus"], found["devices"]) == ("training", {"0": [0, 1, 64, 65]}, [])


def test_usage_is_per_pod_and_summed_per_tenant(casemate: Casemate, ledger: Ledger) -> None:
    ledger.release(claim(ledger, TRAINING), me())
    claim(ledger, SERVING)
    rows = [line.split() for line in casemate("gpu", "usage").stdout.splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["k8s.io/training", "red", "0000:11:00.0"],
        ["k8s.io/training", "red", "0000:12:00.0"],
        ["k8s.io/serving", "blue", "0000:11:00.0"],
        ["k8s.io/serving", "blue", "0000:12:00.0"],
    ]
    assert [("now" in row) for row in rows[1:]] == [False, False, True, True]
    sums = json.loads(casemate("gpu", "usage", "--tenants", "--json").stdout)
    assert [(each["tenant"], each["uses"]) for each in sums] == [("blue", 2), ("red", 2)]
    uses = json.loads(casemate("gpu", "usage", "--json").stdout)
    assert sums[1]["seconds"] == pytest.approx(sum(use["seconds"] for use in uses[:2]))
    assert casemate("gpu", "usage", "--tenants").stdout.splitlines()[0].split() == [
        "TENANT",
        "USES",
        "SECONDS",
    ]


def test_log_says_what_happened_to_whom_and_by_whom(casemate: Casemate, ledger: Ledger) -> None:
    ledger.use(claim(ledger, TRAINING))
    ledger.quarantine(at("42:00.0"), "fell off the bus")
    lines = casemate("gpu", "log", "11:00.0").stdout.splitlines()
    assert [line.split("  ", 2)[2] for line in lines] == [
        "new > claimed  pod k8s.io/training  (the test)",
        "claimed > in use  pod k8s.io/training  (the test)",
    ]
    last = casemate("gpu", "log", "-n", "1").stdout
    assert "new > quarantined  fell off the bus" in last
    entries = json.loads(casemate("gpu", "log", "--json").stdout)
    assert [each["number"] for each in entries] == sorted(each["number"] for each in entries)
    assert {each["cause"] for each in entries} == {"state", "claim"}


def test_clear_ends_a_quarantine_and_says_who_did(casemate: Casemate, ledger: Ledger) -> None:
    ledger.quarantine(FIRST, "fell off the bus")
    result = casemate("gpu", "clear", "11:00.0")
    assert result.stdout.strip() == "0000:11:00.0 is free; it was quarantined because: fell off the bus"
    assert ledger.device(FIRST).state is State.FREE
    assert ledger.log(FIRST)[-1].actor.startswith("casemate gpu clear, uid ")


def test_clear_says_it_as_json_too(casemate: Casemate, ledger: Ledger) -> None:
    ledger.quarantine(FIRST, "fell off the bus")
    said = json.loads(casemate("gpu", "clear", "11:00.0", "--json").stdout)
    assert (said["device"]["address"], said["device"]["state"]) == ("0000:11:00.0", "free")
    assert (said["device"]["reason"], said["was_quarantined"]) == ("", "fell off the bus")
    assert ledger.device(FIRST).state is State.FREE


def test_all_that_is_said_of_devices_is_said_as_json_too() -> None:
    commands = [each.callback for each in gpu.app.registered_commands if each.callback is not None]
    assert command.clear in commands
    assert [each.__name__ for each in commands if "as_json" not in signature(each).parameters] == []


def test_what_is_not_quarantined_is_not_cleared(casemate: Casemate, ledger: Ledger) -> None:
    claim(ledger, TRAINING)
    result = casemate("gpu", "clear", "11:00.0")
    assert result.exit_code == 1
    assert "is claimed, not quarantined" in result.stderr


def test_gc_leaves_devices_of_the_living_and_frees_those_of_the_dead(
    casemate: Casemate, ledger: Ledger, new_shim: Callable[[], Shim]
) -> None:
    shim = new_shim()
    claim(ledger, TRAINING, Process.here(shim.pid, shim.start_time))
    claim(ledger, SERVING)
    assert "nothing to clean up" in casemate("gc").stderr
    shim.kill()  # dead, though nobody has reaped it
    planned = casemate("gc", "--dry-run")
    assert "would release device 0000:11:00.0" in planned.stdout
    assert ledger.device(FIRST).state is State.CLAIMED
    assert "released device 0000:11:00.0" in casemate("gc").stdout
    assert [each.pod for each in ledger.claims()] == [SERVING]
    assert ledger.device(FIRST).state is State.FREE


def test_gc_frees_cpus_of_the_dead(casemate: Casemate, ledger: Ledger, new_shim: Callable[[], Shim]) -> None:
    shim = new_shim()
    ledger.claim(TRAINING, Process.here(shim.pid, shim.start_time), Wanted(cpus=4), dgx())
    ledger.claim(SERVING, me(), Wanted(cpus=2), dgx())
    assert json.loads(casemate("gc", "--json").stdout)["cpus"] == []
    shim.kill()
    assert "would release CPUs 0-1,64-65 of k8s.io/training" in casemate("gc", "--dry-run").stdout
    assert len(ledger.claims()) == 2
    found = json.loads(casemate("gc", "--json").stdout)["cpus"]
    assert [(each["pod"], each["cpus"]) for each in found] == [("training", [0, 1, 64, 65])]
    assert [each.pod for each in ledger.claims()] == [SERVING]
    assert "nothing to clean up" in casemate("gc").stderr


def test_gc_resets_what_a_dead_pod_used_and_quarantines_what_it_cannot(
    casemate: Casemate,
    ledger: Ledger,
    new_shim: Callable[[], Shim],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Written to files that nobody acts upon: a kernel that does nothing, so no device leaves vfio-pci."""
    tree = Tree(tmp_path / "host")
    model = Model("10de:2330", 0x030200, bars={0: (1 << 24, MEM64)}, driver="nvidia")
    for bus in (0x11, 0x12):
        tree.function(tree.root_bus(bus, 0), model)
    kernel = Kernel(tree)
    shim = new_shim()
    held = claim(ledger, TRAINING, Process.here(shim.pid, shim.start_time))
    Bus(str(tree.sys), write=kernel.write).bind(ledger, held, ledger.get(held).addresses)
    ledger.use(held)
    shim.end()
    monkeypatch.setattr(command, "_SYSFS", str(tree.sys))
    result = casemate("gc", "--json")
    assert result.exit_code == 1
    devices = json.loads(result.stdout)["devices"]
    assert [each["device"] for each in devices] == ["0000:11:00.0", "0000:12:00.0"]
    assert all("cannot go from vfio-pci to nvidia" in each["quarantined"] for each in devices)
    assert ledger.device(FIRST).state is State.QUARANTINED
    assert "reset" in [entry.cause.value for entry in ledger.log(FIRST)]


def test_a_damaged_ledger_does_not_keep_gc_from_the_rest(
    casemate: Casemate, host: Path, ledger: Ledger
) -> None:
    claim(ledger, TRAINING)
    ledger.close()
    (host / "ledger" / FILE).write_bytes(os.urandom(8192))
    result = casemate("gc")
    assert result.exit_code == 1
    assert "is damaged" in result.stderr
