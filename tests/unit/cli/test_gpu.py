"""`casemate gpu` on hosts of the library: what is listed, what is said of one device, what scripts get."""

import json
from pathlib import Path

import pytest

from cli import gpu
from tests.unit.cli.conftest import Casemate
from tests.unit.vfio.machines import MACHINES
from tests.unit.vfio.trees import Tree


@pytest.fixture
def dgx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return on(MACHINES["dgx-h100"](tmp_path / "dgx"), monkeypatch)


def on(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(gpu, "_SYSFS", str(tree.sys))
    return tree


def test_list_has_gpus_switches_cards_and_disks(casemate: Casemate, dgx: Tree) -> None:
    lines = casemate("gpu", "list").stdout.splitlines()
    assert " ".join(lines[0].split()) == "ADDRESS KIND DEVICE DRIVER NUMA GROUP LARGEST BAR LINK"
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


def test_a_device_that_vanishes_is_said(casemate: Casemate, dgx: Tree) -> None:
    node = next(node for address, node in dgx.nodes.items() if str(address) == "0000:1b:00.0")
    dgx.remove(node)
    assert "0000:1b:00.0 vanished while it was read" in casemate("gpu", "list").stderr
    assert json.loads(casemate("gpu", "list", "--json").stdout)["vanished"] == ["0000:1b:00.0"]


def test_show_says_all_of_one_device(
    casemate: Casemate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(MACHINES["workstation"](tmp_path / "workstation"), monkeypatch)
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
