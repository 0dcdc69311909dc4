"""AMD's GPUs in a guest: amdgpu loaded, whose nodes are whose, and what a container gets of them."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from agent import amd, boot, passthrough
from agent.passthrough import Passthrough
from rpc.api.agent import GivenDevice, PciDevice
from rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from tests.unit.agent.amdguest import DRM, FIRST, KFD, SECOND, Guest

A = PciDevice(name="0000:3b:00.0", port="00:06.0", function=0, kind="gpu")
B = PciDevice(name="0000:86:00.0", port="00:06.1", function=0, kind="gpu")


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    guest = Guest(tmp_path)
    guest.at_load = [
        guest.begin,
        lambda: guest.bring_up(FIRST, 0),
        lambda: guest.bring_up(SECOND, 1),
    ]
    monkeypatch.setattr(boot, "load_feature", guest.load)
    monkeypatch.setattr(boot, "features", lambda: {"amdgpu": []})
    monkeypatch.setattr(boot, "driver_of", lambda modalias: None)
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("")
    monkeypatch.setattr(passthrough, "KMSG", str(kmsg))
    return guest


def come_up(guest: Guest, *devices: PciDevice, limit_s: float = 10.0) -> tuple[Passthrough, list[Any]]:
    found = Passthrough(str(guest.sys))
    return found, asyncio.run(found.come_up(devices, limit_s))


def spec() -> dict[str, Any]:
    return {"process": {"env": ["PATH=/bin", "ROCR_VISIBLE_DEVICES=0"]}, "root": {"path": "/run/root"}}


def given(guest: Guest, *devices: GivenDevice) -> dict[str, Any]:
    found, _ = come_up(guest, A, B)
    what = spec()
    found.add(what, devices)
    return what


def wait_for(event: threading.Event) -> None:
    event.wait()


def paths(what: dict[str, Any]) -> list[str]:
    return [each["path"] for each in what["linux"]["devices"]]


def test_nothing_of_it_is_imported_for_others() -> None:
    code = "import agent.__main__, agent.passthrough, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"agent.amd", "agent.cdi", "agent.threads"} & set(done.stdout.split())


# --- coming up ---


def test_amdgpu_is_loaded_once_for_all_gpus(guest: Guest) -> None:
    _, found = come_up(guest, A, B)
    assert guest.loaded == 1
    assert [(each.problem, each.driver, each.nodes) for each in found] == [
        ("", "amdgpu", ["dri/card0", "dri/renderD128", "kfd"]),
        ("", "amdgpu", ["dri/card1", "dri/renderD129", "kfd"]),
    ]


def test_a_gpu_that_kfd_leaves_out_is_up_and_is_shown_without_it(guest: Guest) -> None:
    guest.at_load = [guest.begin, lambda: guest.take(FIRST)]
    guest.at_load.append(lambda: guest.drm(guest.gpu(FIRST).resolve() / "drm", 0))
    _, (gpu,) = come_up(guest, A)
    assert (gpu.problem, gpu.nodes) == ("", ["dri/card0", "dri/renderD128"])


def test_one_that_amdgpu_gives_up_on_names_itself_at_once_with_the_drivers_words(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passthrough, "kernel_words", lambda *about: [f"said of {about}"])
    guest.at_load = [guest.begin, lambda: guest.bring_up(SECOND, 0)]
    _, (first, second) = come_up(guest, A, B, limit_s=600.0)
    assert first.problem == f"GPU {FIRST} is none that amdgpu brings up"
    assert first.words == [f"said of {((FIRST, 'amdgpu', 'kfd'), [SECOND[:-2]])}"]
    assert (second.problem, second.nodes[0]) == ("", "dri/card0")


@pytest.mark.parametrize(
    ("up", "problems"),
    [
        ((), [f"GPU {FIRST}: amdgpu did not initialise it", f"GPU {SECOND}: amdgpu did not come to it"]),
        ((SECOND,), [f"GPU {FIRST}: amdgpu did not initialise it", ""]),
    ],
    ids=["waits", "is-up"],
)
def test_one_that_never_gets_done_is_told_from_one_that_waits_for_it_or_is_up(
    guest: Guest, up: tuple[str, ...], problems: list[str]
) -> None:
    """amdgpu initialises them one after the other."""
    go_on = threading.Event()
    guest.begin()
    guest.take(FIRST)
    for address in up:
        guest.bring_up(address, 1)
    guest.at_load = [lambda: wait_for(go_on)]
    found = Passthrough(str(guest.sys))

    async def scenario() -> list[Any]:
        try:
            return await found.come_up([A, B], 0.2)
        finally:
            go_on.set()
            if loading := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(loading)

    seen = asyncio.run(scenario())
    assert [each.problem.partition(" within 0.2 s")[0] for each in seen] == problems


def test_one_that_waits_for_others_has_its_time_once_each_of_them_has_had_its_own(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, seen = amd.Driver._count_renders, list[int]()
    late, done = threading.Event(), threading.Event()

    def count_and_go_on(driver: amd.Driver) -> int:
        seen.append(count(driver))
        if len(seen) == 1:
            guest.bring_up(FIRST, 0)
        elif len(seen) == 2:
            late.set()
            wait_for(done)
        return seen[-1]

    guest.at_load = [lambda: wait_for(late), guest.begin, lambda: guest.bring_up(SECOND, 1), done.set]
    monkeypatch.setattr(amd.Driver, "_count_renders", count_and_go_on)
    driver = amd.Driver(str(guest.sys))
    asyncio.run(driver.come_up(str(guest.gpu(SECOND)), 0.5))
    assert seen[:2] == [0, 1], "it has waited for longer than 0.5 s"
    assert driver.nodes(SECOND)[0] == "dri/card1"


def test_an_amdgpu_that_cannot_be_loaded_is_each_gpus_problem(guest: Guest) -> None:
    def fail() -> None:
        raise FailedPrecondition("kernel module amdgpu.ko cannot be loaded", "Invalid argument")

    guest.at_load = [fail]
    _, found = come_up(guest, A, B)
    assert all("amdgpu.ko cannot be loaded" in each.problem for each in found)


def test_a_kernel_whose_kfd_does_not_come_up_says_so(guest: Guest) -> None:
    guest.at_load = [lambda: guest.bring_up(FIRST, 0)]
    _, (gpu,) = come_up(guest, A)
    assert gpu.problem == f"GPU {FIRST}: amdgpu made no /dev/kfd, which ROCm takes"


def test_a_guest_without_amdgpu_has_the_device_as_it_is(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "features", lambda: {"nvidia": []})
    found, (gpu,) = come_up(guest, A)
    assert (gpu.problem, gpu.nodes, guest.loaded) == ("", [], 0)
    what = spec()
    found.add(what, [GivenDevice(name=A.name)])
    assert what["linux"]["devices"] == []


@pytest.mark.parametrize(("vendor", "kind"), [("0x10de", "gpu"), ("0x1002", "audio")])
def test_other_devices_are_none_of_its(guest: Guest, vendor: str, kind: str) -> None:
    (guest.gpu(FIRST) / "vendor").write_text(f"{vendor}\n")
    other = PciDevice(name=A.name, port=A.port, function=0, kind=kind)
    _, (found,) = come_up(guest, other)
    assert (found.problem, guest.loaded) == ("", 0)


# --- in a container ---


def test_a_container_has_its_gpu_and_the_kfd_that_all_share(guest: Guest) -> None:
    what = given(guest, GivenDevice(name=B.name, mode=0o600))
    assert what["linux"]["devices"] == [
        {"path": "/dev/dri/card1", "type": "c", "major": DRM, "minor": 1, "fileMode": 0o666},
        {"path": "/dev/dri/renderD129", "type": "c", "major": DRM, "minor": 129, "fileMode": 0o666},
        {"path": "/dev/kfd", "type": "c", "major": KFD, "minor": 0, "fileMode": 0o666},
    ]
    rules = what["linux"]["resources"]["devices"]
    assert [(rule["minor"], rule["allow"], rule["access"]) for rule in rules] == [
        (1, True, "rwm"),
        (129, True, "rwm"),
        (0, True, "rwm"),
    ]


def test_of_two_gpus_it_has_kfd_once(guest: Guest) -> None:
    what = given(guest, GivenDevice(name=B.name), GivenDevice(name=A.name))
    dri = [f"/dev/dri/{name}" for name in ("card1", "renderD129", "card0", "renderD128")]
    assert paths(what) == [*dri, "/dev/kfd"]


def test_it_gets_neither_libraries_nor_variables_nor_hooks(guest: Guest) -> None:
    what = given(guest, GivenDevice(name=A.name))
    assert what["process"]["env"] == ["PATH=/bin", "ROCR_VISIBLE_DEVICES=0"]
    assert (what["mounts"], "hooks" in what) == ([], False)


def test_a_gpus_partitions_are_its_own_and_nobody_elses(guest: Guest) -> None:
    guest.at_load += [lambda: guest.partition(FIRST, 1, 2), lambda: guest.partition(SECOND, 7, 3)]
    found, (first, second) = come_up(guest, A, B)
    own = ["card0", "card2", "renderD128", "renderD130"]
    assert first.nodes == [*(f"dri/{name}" for name in own), "kfd"]
    assert second.nodes[:2] == ["dri/card1", "dri/card3"]
    what = spec()
    found.add(what, [GivenDevice(name=A.name)])
    assert paths(what) == [*(f"/dev/dri/{name}" for name in own), "/dev/kfd"]


def test_a_gpu_that_is_divided_later_has_more_nodes_in_later_containers(guest: Guest) -> None:
    found, _ = come_up(guest, A)
    guest.partition(FIRST, 1, 2)
    what = spec()
    found.add(what, [GivenDevice(name=A.name)])
    assert "/dev/dri/renderD130" in paths(what)


def test_a_path_of_its_own_is_refused_because_libraries_would_not_look_there(guest: Guest) -> None:
    found, _ = come_up(guest, A)
    with pytest.raises(InvalidArgument, match="libraries look for it at /dev/dri/card0 /dev/dri/renderD128"):
        found.add(spec(), [GivenDevice(name=A.name, path="/dev/gpu")])
    found.add(spec(), [GivenDevice(name=A.name, path="/dev/dri/renderD128")])


@pytest.mark.parametrize("gone", ["nodes", "nodes and link"])
def test_one_that_has_lost_its_nodes_is_not_found(guest: Guest, gone: str) -> None:
    found, _ = come_up(guest, A)
    (guest.gpu(FIRST) / "drm").rename(guest.gpu(FIRST) / "gone")
    if "link" in gone:
        (guest.sys / "class/drm/renderD128").unlink()
    with pytest.raises(NotFound, match=f"{FIRST} has no nodes in this guest any more"):
        found.add(spec(), [GivenDevice(name=A.name)])


def test_a_specification_names_gpus_by_the_order_of_their_addresses(guest: Guest) -> None:
    driver = amd.Driver(str(guest.sys))

    async def scenario() -> None:
        for address in (SECOND, FIRST):
            await driver.come_up(str(guest.gpu(address)), 10.0)

    asyncio.run(scenario())
    made, names = driver.specification()
    assert names == {FIRST: "0", SECOND: "1"}
    assert (made["kind"], made["cdiVersion"]) == ("amd.com/gpu", "0.5.0")
    assert [each["name"] for each in made["devices"]] == ["0", "1"]
