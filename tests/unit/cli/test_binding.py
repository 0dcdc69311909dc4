"""`casemate gpu bind | unbind | reset` on files, with a kernel's part in it: what is said, and left."""

import json
from pathlib import Path

import pytest

from cli import binding, gpu
from tests.unit.cli.conftest import Casemate
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.machines import MACHINES
from tests.unit.vfio.trees import Tree
from vfio.address import PciAddress
from vfio.binding import Bus

CARD, SOUND, DISK = (PciAddress.parse(each) for each in ("01:00.0", "01:00.1", "02:00.0"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A workstation: a card without a screen on it, a disk that is mounted."""
    tree = MACHINES["workstation"](tmp_path / "desk")
    tree.nodes[CARD].write("boot_vga", "0\n")
    tree.mounts(("259:1", "/dev/nvme0n1p1", "/data"))
    tree.nvme(tree.nodes[DISK], 0, 1)
    for module in (binding, gpu):
        monkeypatch.setattr(module, "_SYSFS", str(tree.sys))
        monkeypatch.setattr(module, "_PROC", str(tree.proc))
    return tree


@pytest.fixture
def kernel(desk: Tree, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(desk)
    defaults = Bus.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(Bus.__init__, "__kwdefaults__", defaults | {"write": kernel.write})
    return kernel


def test_bound_with_its_nodes_and_given_back(casemate: Casemate, kernel: Kernel) -> None:
    group = kernel.at(CARD, "iommu_group").readlink().name
    result = casemate("gpu", "bind", "01:00.0")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{CARD} is bound to vfio-pci, from nvidia, /dev/vfio/{group} /dev/vfio/devices/vfio1",
        f"{SOUND} is bound to vfio-pci, from snd_hda_intel, /dev/vfio/{group} /dev/vfio/devices/vfio2",
    ]
    lines = casemate("gpu", "log", "01:00.0").stdout.splitlines()
    assert "bind  from nvidia  (casemate gpu bind, uid " in lines[1]
    assert "keep  with vfio-pci  (casemate gpu bind, uid " in lines[2]
    assert "all devices are free" in casemate("gpu", "claims").stderr
    assert casemate("gpu", "usage").stdout == ""
    assert json.loads(casemate("gpu", "usage", "--tenants", "--json").stdout) == []
    assert casemate("gpu", "unbind", "01:00.0").stdout.splitlines() == [
        f"{CARD} is bound to nvidia, from vfio-pci",
        f"{SOUND} is bound to snd_hda_intel, from vfio-pci",
    ]


def test_for_scripts(casemate: Casemate, kernel: Kernel) -> None:
    group = kernel.at(CARD, "iommu_group").readlink().name
    bound = json.loads(casemate("gpu", "bind", "--json", str(CARD)).stdout)
    assert bound["left"] == []
    assert bound["devices"][0] == {
        "address": str(CARD),
        "before": "nvidia",
        "driver": "vfio-pci",
        "group_node": f"/dev/vfio/{group}",
        "device_node": "/dev/vfio/devices/vfio1",
    }
    done = json.loads(casemate("gpu", "reset", "--json", str(CARD)).stdout)
    assert [each["quarantined"] for each in done["devices"]] == [None, None]
    assert done["devices"][0]["reset"].startswith("bus in ")
    back = json.loads(casemate("gpu", "unbind", "--json", str(CARD)).stdout)
    assert [each["driver"] for each in back["devices"]] == ["nvidia", "snd_hda_intel"]
    assert [each["device_node"] for each in back["devices"]] == [None, None]


def test_all_of_a_kind_says_what_it_leaves(casemate: Casemate, kernel: Kernel) -> None:
    refused = casemate("gpu", "bind", "--all", "nvme")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert (
        f"{DISK} is left as it is: PCI device {DISK} is not bound to vfio-pci: disk-in-use" in refused.stderr
    )
    assert "/dev/nvme0n1p1 is mounted at /data" in refused.stderr
    assert casemate("gpu", "bind", "--all", "gpu").exit_code == 0
    again = casemate("gpu", "bind", "--all", "gpu")
    assert again.exit_code == 0
    assert again.stdout.startswith(f"{CARD} is bound to vfio-pci, as it was, /dev/vfio/")
    assert "this host has no device of kind nvswitch" in casemate("gpu", "bind", "--all", "nvswitch").stderr


@pytest.mark.parametrize("words", [(), ("01:00.0", "--all", "gpu"), ("--all", "bridge")])
def test_addresses_or_a_kind(casemate: Casemate, kernel: Kernel, words: tuple[str, ...]) -> None:
    assert casemate("gpu", "bind", *words).exit_code == 2
    assert kernel.written == []


def test_one_that_is_not_as_it_was_is_quarantined(casemate: Casemate, kernel: Kernel) -> None:
    kernel.effects["bus"] = kernel.narrowing
    result = casemate("gpu", "reset", "01:00.0")
    assert result.exit_code == 1
    assert f"{CARD} is quarantined: device {CARD} could not be reset" in result.stdout
    assert "link of 8 lanes, was 16" in result.stdout
    assert "quarantined" in casemate("gpu", "claims").stdout
