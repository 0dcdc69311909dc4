"""`casemate gpu` on hosts of the library: what is listed, what is said of one device, what scripts get."""

import json
from pathlib import Path

import pytest

from cli import gpu
from tests import gpulist
from tests.unit.cli.conftest import Casemate
from tests.unit.vfio.machines import MACHINES
from tests.unit.vfio.trees import Tree
from vfio import inventory
from vfio.address import PciAddress
from vfio.kinds import Kind
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Pod, Process
from vfio.offer import offer


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Thousands of files: made once, for those who only look."""
    return MACHINES["dgx-h100"](tmp_path_factory.mktemp("dgx"))


@pytest.fixture
def dgx(one_for_all: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return on(one_for_all, monkeypatch)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A workstation, to change."""
    return on(MACHINES["workstation"](tmp_path / "desk"), monkeypatch)


def on(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(gpu, "_SYSFS", str(tree.sys))
    monkeypatch.setattr(gpu, "_PROC", str(tree.proc))
    return tree


def test_list_has_gpus_switches_cards_and_disks(casemate: Casemate, dgx: Tree) -> None:
    lines = casemate("gpu", "list").stdout.splitlines()
    assert " ".join(lines[0].split()) == "ADDRESS KIND DEVICE DRIVER NUMA GROUP BAR LINK STATE POD FINDINGS"
    rows = [line.split() for line in lines[1:]]
    kinds = [row[1] for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {"gpu": 9, "nvswitch": 4, "nic": 15, "nvme": 10}
    (first,) = [line for line in lines if line.startswith("0000:1b:00.0")]
    assert "nvidia" in first
    assert "128 GiB" in first
    assert "32.0 GT/s x16" in first


def test_what_is_not_listed_is_counted_and_all_has_its_reason(casemate: Casemate, dgx: Tree) -> None:
    result = casemate("gpu", "list")
    listed = len(result.stdout.splitlines()) - 1
    assert result.stderr.splitlines() == [
        f"{len(dgx.nodes) - listed} more PCI functions: casemate gpu list --all"
    ]
    every = casemate("gpu", "list", "--all")
    assert every.stderr == ""
    for address in dgx.nodes:
        assert str(address) in every.stdout
    (port,) = [line for line in every.stdout.splitlines() if line.startswith("0000:00:00.0")]
    assert port.endswith("a bridge: what other devices are reached by")


def test_list_for_scripts(casemate: Casemate, dgx: Tree) -> None:
    answer = json.loads(casemate("gpu", "list", "--json").stdout)
    gpus = [each for each in answer["devices"] if each["device_id"] == "2330"]
    assert [each["numa_node"] for each in gpus] == [0] * 4 + [1] * 4
    assert gpus[0]["address"] == "0000:1b:00.0"
    assert gpus[0]["group_members"] == ["0000:1b:00.0"]
    assert [bar["size_bytes"] for bar in gpus[0]["bars"]] == [1 << 24, 1 << 37, 1 << 25]
    assert answer["skipped"] == []
    assert answer["vanished"] == []
    every = json.loads(casemate("gpu", "list", "--all", "--json").stdout)
    assert len(every["devices"]) + len(every["skipped"]) == len(dgx.nodes)
    assert all(each["reason"] for each in every["skipped"])


def test_a_device_that_vanishes_is_said(casemate: Casemate, desk: Tree) -> None:
    desk.remove(desk.nodes[PciAddress.parse("01:00.0")])
    assert "0000:01:00.0 vanished while it was read" in casemate("gpu", "list").stderr
    assert json.loads(casemate("gpu", "list", "--json").stdout)["vanished"] == ["0000:01:00.0"]


def test_topology_is_a_tree_that_a_person_can_read(casemate: Casemate, dgx: Tree, host: Path) -> None:
    lines = casemate("gpu", "topology").stdout.splitlines()
    assert [line for line in lines if line[0] not in " ├└│"] == ["NUMA node 0", "NUMA node 1"]
    (gpu,) = [index for index, line in enumerate(lines) if "0000:1b:00.0" in line]
    assert lines[gpu - 2].startswith("├─ root port 0000:15:")
    assert lines[gpu - 1].startswith("│  └─ switch 0000:")
    group = (dgx.nodes[PciAddress.parse("1b:00.0")].directory / "iommu_group").readlink().name
    assert lines[gpu].startswith("│     ├─ 0000:1b:00.0  gpu  ")
    assert lines[gpu].endswith(f"nvidia  group {group}  ready")
    assert sum("  VF  nic  " in line for line in lines) == 4
    assert any(line.endswith("refused") for line in lines)


def test_topology_for_scripts_has_who_has_what(casemate: Casemate, desk: Tree, host: Path) -> None:
    desk.nodes[PciAddress.parse("01:00.0")].write("boot_vga", "0\n")
    found = inventory.read(str(desk.sys))
    wanted = Wanted((Request.at(PciAddress.parse("01:00.0")),))
    with Ledger(host / "ledger") as ledger:
        ledger.claim(Pod("k8s.io", "training"), Process(1, 1, "boot"), wanted, offer(found))
    answer = json.loads(casemate("gpu", "topology", "--json").stdout)
    assert [each["node"] for each in answer["nodes"]] == [0]
    (card,) = [
        device
        for port in answer["nodes"][0]["below"]
        for device in port["below"]
        if device["address"] == "0000:01:00.0"
    ]
    assert (card["what"], card["kind"], card["driver"]) == ("device", "gpu", "nvidia")
    assert (card["state"], card["pod"], card["below"]) == ("claimed", "k8s.io/training", [])
    assert "  claimed  pod k8s.io/training" in casemate("gpu", "topology").stdout
    assert "audio" not in casemate("gpu", "topology").stdout
    assert "audio" in casemate("gpu", "topology", "--all").stdout


def test_show_says_all_of_one_device(casemate: Casemate, desk: Tree) -> None:
    lines = dict(
        line.split(maxsplit=1)
        for line in casemate("gpu", "show", "01:00.0").stdout.replace("goes with", "goes-with").splitlines()
    )
    assert lines["goes-with"] == "0000:01:00.1"
    assert lines["path"] == "pci0000:00 > 0000:00:01.0"
    assert lines["resets"] == "bus"
    assert lines["5:"] == "128 I/O ports"
    assert lines["ROM"] == "512 KiB"
    shown = json.loads(casemate("gpu", "show", "01:00.0", "--json").stdout)
    assert shown["siblings"] == ["0000:01:00.1"]
    assert shown["boot_vga"] is True


def test_show_of_a_bridge_says_that_it_is_not_for_pods(casemate: Casemate, dgx: Tree) -> None:
    assert "not for pods  a bridge" in casemate("gpu", "show", "0000:00:00.0").stdout


def test_show_of_nothing_is_not_found(casemate: Casemate, dgx: Tree) -> None:
    result = casemate("gpu", "show", "77:00.0")
    assert result.exit_code == 3
    assert "no PCI device 0000:77:00.0" in result.stderr
    assert casemate("gpu", "show", "GPU-0").exit_code == 1


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(128 << 30, "128 GiB"), (16 << 20, "16 MiB"), (96, "96 B"), (0, "0 B")]
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert gpu.size(size_bytes) == text


# --- whether pods may have them ---


def test_list_says_who_is_refused_and_why(casemate: Casemate, dgx: Tree) -> None:
    rows = {line.split()[0]: line.split() for line in casemate("gpu", "list").stdout.splitlines()}
    assert rows["0000:1b:00.0"][-4:] == ["ready", "-", "ats", "host-driver"]
    assert rows["0000:1c:00.0"][-4:] == ["refused", "-", "vfs-enabled", "host-driver"]
    answer = json.loads(casemate("gpu", "list", "--json").stdout)
    (card,) = [each for each in answer["devices"] if each["address"] == "0000:1c:00.0"]
    assert card["state"] == "refused"
    assert [each["code"] for each in card["findings"]] == ["vfs-enabled", "host-driver"]
    assert answer["host"] == []


def test_list_and_show_say_which_pod_has_it(casemate: Casemate, dgx: Tree, host: Path) -> None:
    owner = Process(1, 1, "boot")
    with Ledger(host / "ledger") as ledger:
        wanted = Wanted((Request.at(PciAddress.parse("1b:00.0")),))
        claim = ledger.claim(Pod("k8s.io", "training"), owner, wanted, offer(inventory.read(str(dgx.sys))))
        ledger.use(claim.id)
        ledger.quarantine(PciAddress.parse("43:00.0"), "fell off the bus")
    rows = {line.split()[0]: line for line in casemate("gpu", "list").stdout.splitlines()}
    assert rows["0000:1b:00.0"].split()[-5:-2] == ["in", "use", "k8s.io/training"]
    assert rows["0000:43:00.0"].split()[11:13] == ["quarantined", "-"]
    shown = json.loads(casemate("gpu", "show", "1b:00.0", "--json").stdout)
    assert (shown["state"], shown["pod"]) == ("in use", "k8s.io/training")
    assert "k8s.io/training" in casemate("gpu", "show", "1b:00.0").stdout


def test_a_waiver_of_the_config_counts_and_is_shown(casemate: Casemate, dgx: Tree, host: Path) -> None:
    (host / "etc/config.toml").write_text('[vfio]\nwaive = ["vfs-enabled"]\n')
    answer = json.loads(casemate("gpu", "show", "1c:00.0", "--json").stdout)
    assert answer["state"] == "ready"
    assert [each["waived"] for each in answer["findings"]] == [True, False]
    assert "waived  vfs-enabled: 0000:1c:00.0 has 4 VFs" in casemate("gpu", "show", "1c:00.0").stdout


def test_a_card_is_refused_for_any_of_its_functions(casemate: Casemate, desk: Tree) -> None:
    (desk.sys / "bus/pci/devices/0000:01:00.0/boot_vga").write_text("0\n")
    assert json.loads(casemate("gpu", "show", "01:00.0", "--json").stdout)["state"] == "ready"
    (desk.sys / "bus/pci/devices/0000:01:00.1/reset_method").write_text("\n")
    shown = json.loads(casemate("gpu", "show", "01:00.0", "--json").stdout)
    assert shown["state"] == "refused"
    assert ("no-reset", "0000:01:00.1") in [(each["code"], each["subject"]) for each in shown["findings"]]


def test_what_comes_with_a_device_keeps_it_from_pods(
    casemate: Casemate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laptop = on(MACHINES["laptop"](tmp_path / "laptop"), monkeypatch)
    devices = inventory.read(str(laptop.sys)).devices
    (disk,) = [each.address for each in devices if each.kind is Kind.NVME]
    (with_disk,) = [
        each.address for each in devices if each.kind is Kind.GPU and each.group and not each.boot_vga
    ]
    assert casemate("gpu", "audit", str(with_disk)).exit_code == 0
    laptop.nodes[disk].write("reset_method", "\n")
    for command in ("show", "audit"):
        answer = json.loads(casemate("gpu", command, str(with_disk), "--json").stdout)
        found = [(each["code"], each["subject"]) for each in answer["findings"]]
        assert ("no-reset", str(disk)) in found
    assert casemate("gpu", "audit", str(with_disk)).exit_code == 1


def test_audit_of_devices_for_one_pod(casemate: Casemate, dgx: Tree) -> None:
    given = casemate("gpu", "audit", "1b:00.0", "43:00.0")
    assert given.exit_code == 0
    assert "warning host-driver: 0000:43:00.0 is bound to nvidia" in given.stdout
    refused = casemate("gpu", "audit", "1b:00.0", "1c:00.0")
    assert refused.exit_code == 1
    lines = refused.stdout.splitlines()
    at = lines.index("refused vfs-enabled: 0000:1c:00.0 has 4 VFs")
    assert lines[at + 1] == "        fix: echo 0 > sriov_numvfs, or give away VFs"
    assert json.loads(casemate("gpu", "audit", "1b:00.0", "1c:00.0", "--json").stdout)["given"] is False


def test_audit_of_a_host_without_an_iommu(
    casemate: Casemate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(MACHINES["no-iommu"](tmp_path / "no-iommu"), monkeypatch)
    result = casemate("gpu", "audit")
    assert result.exit_code == 1
    assert result.stdout.startswith("refused iommu-off: the kernel has no IOMMU groups\n")
    listed = casemate("gpu", "list")
    assert "refused" in listed.stdout
    assert "iommu-off: the kernel has no IOMMU groups" in listed.stderr


def test_nothing_to_say_is_said(casemate: Casemate, desk: Tree) -> None:
    card = PciAddress.parse("03:00.0")
    assert casemate("gpu", "audit", str(card)).stdout.startswith("warning host-driver: 0000:03:00.0")
    desk.bind(desk.nodes[card], "vfio-pci")
    result = casemate("gpu", "audit", str(card))
    assert (result.exit_code, result.stdout) == (0, "nothing speaks against it\n")


def test_what_no_pod_gets_cannot_be_audited(casemate: Casemate, desk: Tree) -> None:
    result = casemate("gpu", "audit", "00:01.0")
    assert result.exit_code == 1
    assert "0000:00:01.0 is not for pods: a bridge" in result.stderr


# --- what it costs: figures in docs/gpus.md, of `python -m tests.gpulist` ---


def test_list_as_a_process_of_its_own_imports_nothing_heavy() -> None:
    with gpulist.stand() as stand:
        said, _ = stand.listed()
        modules = stand.modules()
    states = [line.split() for line in said.splitlines()[1:]]
    assert sum("claimed" in words for words in states) == gpulist.GPUS_WANTED
    assert len(states) == 38
    assert {"cli.gpu", "vfio.inventory", "vfio.ledger.ledger"} <= modules
    # pydantic is there all the same: typer needs it to read its arguments
    heavy = {"rich.console", "config.schema", "grpc", "yaml", "libvirt", "asyncio", "multiprocessing"}
    assert not modules & (
        heavy | {"shim", "images", "cli.check", "vfio.ahead", "vfio.binding", "vfio.release"}
    )


def test_the_figures_are_shown_by_their_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpulist.main(["--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "casemate gpu list, by the clock",
        "casemate gpu list, of processors",
        "inventory, after import",
    ]
