"""What `casemate check` says of devices, on hosts of the library."""

from pathlib import Path

import pytest

from cli.checks import devices as of_devices
from cli.checks.devices import devices, partitions
from cli.checks.result import CheckContext, Level, Result
from config.sources import read_defaults
from tests.unit.vfio.machines import MACHINES, no_iommu
from tests.unit.vfio.trees import Tree
from vfio import inventory
from vfio.kinds import Kind

SETTINGS = read_defaults().settings


def check(tree: Tree, *waive: str) -> list[Result]:
    settings = SETTINGS.replace(vfio=SETTINGS.vfio.replace(waive=waive))
    return list(devices(CheckContext(settings, "containerd.sock", tree.root)))


@pytest.fixture
def hgx(tmp_path: Path) -> Tree:
    tree = MACHINES["hgx-b200"](tmp_path)
    (tree.sys / "bus/pci/drivers/vfio-pci").mkdir(parents=True)
    return tree


def test_a_server_is_fit(hgx: Tree) -> None:
    vfio, said = check(hgx)
    assert (vfio.name, vfio.level) == ("vfio-pci", Level.OK)
    assert said == Result("devices", Level.OK, "8 of 8 GPUs and switches may be given to pods")


def test_which_way_of_vfios_it_will_be_and_why(hgx: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, tuple[int, int] | None] = {"QEMU": (10, 0), "libvirt": (12, 8)}
    monkeypatch.setattr(of_devices, "versions", lambda _: found)
    assert check(hgx)[0].found == "loaded; by groups, not by iommufd: no /dev/iommu"
    hgx.put("dev/iommu", "")
    assert check(hgx)[0].found == "loaded; by iommufd"
    found["libvirt"] = (11, 3)
    assert check(hgx)[0].found == "loaded; by groups, not by iommufd: libvirt is 11.3; 12.1 is needed"


def test_vfio_pci_that_is_not_there_is_a_warning(hgx: Tree) -> None:
    (hgx.sys / "bus/pci/drivers/vfio-pci").rmdir()
    assert (check(hgx)[0].name, check(hgx)[0].level) == ("vfio-pci", Level.WARNING)


def test_what_is_wrong_with_the_host_and_a_gpu_has_its_line(hgx: Tree) -> None:
    hgx.put("proc/cmdline", "pcie_acs_override=downstream\n")
    (hgx.sys / "bus/pci/devices/0000:18:00.0/reset_method").write_text("\n")
    _, host, said = check(hgx)
    assert (host.name, host.level) == ("acs-override", Level.WARNING)
    assert said.level is Level.WARNING
    assert said.found == (
        "0 of 8 GPUs and switches may be given to pods; the others not: acs-override, no-reset"
    )
    _, host, said = check(hgx, "acs-override")
    assert host.found.endswith("(waived)")
    assert said.found == "7 of 8 GPUs and switches may be given to pods; the others not: no-reset"


def test_a_host_without_an_iommu_or_gpus_or_pci_is_as_fit_as_before(tmp_path: Path) -> None:
    without = no_iommu(tmp_path / "no-iommu")
    (said,) = check(without)
    assert said.level is Level.OK
    assert "1 GPUs or switches, which no pod gets without an IOMMU" in said.found
    screen = MACHINES["workstation"](tmp_path / "workstation")
    assert check(screen) == [Result("devices", Level.OK, "no GPU beside the console's")]
    (said,) = devices(CheckContext(SETTINGS, "containerd.sock", tmp_path / "nothing"))
    assert said.level is Level.OK


def of_partitions(tree: Tree, **members: tuple[str, ...]) -> list[Result]:
    settings = SETTINGS.replace(vfio=SETTINGS.vfio.replace(partitions=members))
    return list(partitions(CheckContext(settings, "containerd.sock", tree.root)))


def test_nvlink_partitions_are_of_gpus_that_are_there(hgx: Tree) -> None:
    assert of_partitions(hgx) == []
    found = inventory.read(str(hgx.sys)).devices
    first, second, *_ = (str(each.address) for each in found if each.kind is Kind.GPU)
    nic = next(str(each.address) for each in found if each.kind is Kind.NIC)
    (said,) = of_partitions(hgx, two=(first, second), one=(first,))
    assert said == Result("NVLink partitions", Level.OK, "two of 2 GPUs, one of 1 GPUs")
    gone, other = of_partitions(hgx, two=(first, "0000:ff:1f.7"), one=(nic,), good=(second,))
    assert (gone.level, other.level) == (Level.WARNING, Level.WARNING)
    assert gone.found == "two of vfio.partitions is given to no pod: 0000:ff:1f.7 is not there"
    assert other.found == f"one of vfio.partitions is given to no pod: {nic} is no GPU but of kind nic"
