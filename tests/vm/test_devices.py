"""vfio/ on a real kernel: its sysfs, its groups, the configuration space of devices that QEMU emulates."""

import os
from pathlib import Path

import pytest

from images.store import ImageStore
from tests.vm import hostscan
from tests.vm.conftest import KERNEL_VARIABLE
from tests.vm.hostscan import Scan
from vfio.address import PciAddress
from vfio.configspace import ISOLATING, PortType
from vfio.findings import Code, Finding
from vfio.inventory import Bar, Device
from vfio.kinds import Kind

pytestmark = pytest.mark.skipif(
    os.environ.get(KERNEL_VARIABLE) == "tuned",
    reason="the tuned guest kernel has no IOMMU and no PCI Express ports",
)

IOMMU = ["-device", "intel-iommu,intremap=on,device-iotlb=on"]
EDU, TEST_DEVICE, NVME, NET = (0x1234, 0x11E8), (0x1B36, 0x0005), (0x1B36, 0x0010), (0x1AF4, 0x1041)


def host(directory: Path) -> list[str]:
    """Node 0: a device alone; a card of two functions with ATS; two behind conventional PCI. Node 1: a switch
    without ACS, with a device and an NVMe that can have VFs below it."""
    disk = directory / "disk"
    disk.write_bytes(bytes(4 << 20))
    vfs = "sriov_max_vfs=4,max_ioqpairs=16,msix_qsize=32,sriov_vq_flexible=8,sriov_vi_flexible=8"
    return [
        *IOMMU,
        *("-device", "pxb-pcie,id=node1,bus_nr=64,numa_node=1,bus=pcie.0"),
        *("-device", "pcie-root-port,id=alone,bus=pcie.0,chassis=1,slot=1"),
        *("-device", "pci-testdev,membar=1G,bus=alone"),
        *("-device", "pcie-root-port,id=card,bus=pcie.0,chassis=2,slot=2"),
        *("-device", "virtio-net-pci,bus=card,addr=0.0,multifunction=on,iommu_platform=on,ats=on"),
        *("-device", "virtio-rng-pci,bus=card,addr=0.1"),
        *("-device", "pcie-root-port,id=old,bus=pcie.0,chassis=3,slot=3"),
        *("-device", "pcie-pci-bridge,id=pci,bus=old"),
        *("-device", "edu,bus=pci,addr=1", "-device", "edu,bus=pci,addr=2"),
        *("-device", "pcie-root-port,id=far,bus=node1,chassis=4,slot=4"),
        *("-device", "x3130-upstream,id=switch,bus=far"),
        *("-device", "xio3130-downstream,id=down1,bus=switch,chassis=5,slot=5"),
        *("-device", "xio3130-downstream,id=down2,bus=switch,chassis=6,slot=6"),
        *("-device", "edu,bus=down1"),
        *("-drive", f"if=none,id=disk,file={disk},format=raw", "-device", "nvme-subsys,id=subsystem"),
        *("-device", f"nvme,serial=a,bus=down2,subsys=subsystem,{vfs}"),
    ]


@pytest.fixture(scope="module")
def kernel(image_store: Path) -> Path:
    return ImageStore(image_store).resolve("default").kernel


@pytest.fixture(scope="module")
def seen(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Scan:
    directory = tmp_path_factory.mktemp("host")
    return hostscan.scan(kernel, directory, host(directory), "intel_iommu=on")


def the(seen: Scan, ids: tuple[int, int], index: int = 0) -> Device:
    return [each for each in seen.found.devices if (each.vendor_id, each.device_id) == ids][index]


def codes(findings: tuple[Finding, ...]) -> set[Code]:
    return {each.code for each in findings}


def port_types(seen: Scan, device: Device) -> list[PortType | None]:
    return [seen.found.functions[each].config.port_type for each in device.path]


def test_nothing_vanishes_and_every_group_has_its_members(seen: Scan) -> None:
    assert seen.found.vanished == ()
    assert sum(map(len, seen.found.groups.values())) == len(seen.found.functions)
    assert {each.kind for each in seen.found.skipped} == {Kind.BRIDGE, Kind.PLATFORM}


def test_bars_and_nodes(seen: Scan) -> None:
    device = the(seen, TEST_DEVICE)
    assert Bar(2, 1 << 30, is_io=False, prefetchable=True, is_64_bit=True) in device.bars
    assert any(bar.is_io and bar.size_bytes == 256 for bar in device.bars)
    disk = the(seen, NVME)
    assert (disk.kind, disk.numa_node) == (Kind.NVME, 1)
    assert disk.root_bus == "pci0000:40"
    assert disk.total_vfs == 4
    assert "flr" in disk.reset_methods
    assert disk.link is not None
    assert disk.link.most_width == 1


def test_ports_and_what_the_kernel_set_in_them(seen: Scan) -> None:
    edu, disk = the(seen, EDU, 2), the(seen, NVME)
    assert port_types(seen, disk) == [PortType.ROOT_PORT, PortType.UPSTREAM, PortType.DOWNSTREAM]
    assert seen.found.nearest_common([edu.address, disk.address]) == disk.path[1]
    root = seen.found.functions[disk.path[0]].config.acs
    assert root is not None
    assert root.enabled & ISOLATING == ISOLATING
    assert seen.found.functions[disk.path[2]].config.acs is None


def test_a_card_of_two_functions(seen: Scan) -> None:
    card = the(seen, NET)
    second = PciAddress(card.address.domain, card.address.bus, card.address.slot, 1)
    assert card.kind is Kind.NIC
    assert card.config.multifunction
    assert seen.found.siblings(card.address) == (second,)
    assert seen.found.members(card.address) == (card.address, second)
    assert codes(seen.audit.of(card.address)) >= {Code.ATS}
    assert Code.ATS not in codes(seen.audit.of(second))


def test_a_device_alone_below_a_port_with_acs_may_be_given(seen: Scan) -> None:
    device = the(seen, TEST_DEVICE)
    assert seen.found.members(device.address) == (device.address,)
    assert seen.audit.of(device.address) == ()


def test_conventional_pci_is_one_group(seen: Scan) -> None:
    first, second = the(seen, EDU, 0), the(seen, EDU, 1)
    assert first.group == second.group
    assert Code.GROUP_SHARED in codes(seen.audit.of(first.address))
    assert Code.ACS_MISSING in codes(seen.audit.of(first.address))


def test_a_switch_without_acs_is_two_groups_to_the_kernel_and_one_to_us(seen: Scan) -> None:
    edu, disk = the(seen, EDU, 2), the(seen, NVME)
    assert edu.group != disk.group  # if this fails, the kernel has learnt it: switch-acs can go
    assert Code.SWITCH_ACS in codes(seen.audit.refusals(edu.address))
    assert Code.SWITCH_ACS in codes(seen.audit.refusals(disk.address))


def test_without_root_nothing_below_a_port_may_be_given(seen: Scan) -> None:
    device = the(seen, TEST_DEVICE)
    assert Code.CONFIG_UNREADABLE in codes(seen.header_only.refusals(device.address))


def test_interrupts_are_remapped(seen: Scan) -> None:
    assert any(name.startswith("IR-") for name in seen.interrupts)
    assert seen.audit.host == ()


def test_interrupts_that_are_not(kernel: Path, tmp_path: Path) -> None:
    seen = hostscan.scan(kernel, tmp_path, IOMMU, "intel_iommu=on intremap=off")
    assert not any(name.startswith("IR-") for name in seen.interrupts)
    assert codes(seen.audit.host) == {Code.INTERRUPT_REMAPPING}


def test_a_host_without_an_iommu(kernel: Path, tmp_path: Path) -> None:
    seen = hostscan.scan(kernel, tmp_path, [], "")
    assert seen.found.groups == {}
    assert codes(seen.audit.host) == {Code.IOMMU_OFF}
