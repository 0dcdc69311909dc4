"""What speaks against giving a device away: each code on a host that has it, and not on one that has not."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from tests.unit.vfio.conftest import Machine
from tests.unit.vfio.machines import (
    CONNECTX6_DX,
    CONNECTX7,
    CONNECTX_VF,
    H100,
    INTEL_PORT,
    NVME,
    RTX4090,
    RTX4090_AUDIO,
    SWITCH_PORT,
    XHCI,
)
from tests.unit.vfio.trees import DOWNSTREAM, PCI_BRIDGE, ROOT_PORT, UPSTREAM, Acs, Model, Node, Tree
from vfio import inventory, isolation, sysfs
from vfio.address import PciAddress
from vfio.findings import Code, Finding, Severity
from vfio.isolation import Audit
from vfio.kinds import Kind
from vfio.names import PciNames


def audit(tree: Tree, *together: PciAddress, waive: Iterable[str] = ()) -> Audit:
    found = inventory.read(str(tree.sys), PciNames())
    return isolation.audit(found, together or None, waive=waive, sys=str(tree.sys), proc=str(tree.proc))


def codes(findings: Iterable[Finding]) -> set[Code]:
    return {each.code for each in findings}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A host that is as it should be: one GPU in vfio-pci's hands, one port with ACS."""
    tree = Tree(tmp_path)
    port = tree.bridge(tree.root_bus(0, 0), INTEL_PORT, ROOT_PORT, acs=Acs())
    tree.bind(tree.function(port, H100), "vfio-pci")
    return tree


GPU = PciAddress.parse("0000:01:00.0")
PORT = PciAddress.parse("0000:00:00.0")


def text(tree: Tree, code: Code, address: PciAddress = GPU) -> str:
    (finding,) = [each for each in audit(tree).of(address) if each.code is code]
    return finding.text


def test_a_host_as_it_should_be_has_no_findings(tree: Tree) -> None:
    assert audit(tree).of(GPU) == ()
    audit(tree, GPU).require()


# --- the host ---


def test_without_an_iommu_nothing_is_given(machine: Machine) -> None:
    found = audit(machine("no-iommu"))
    assert codes(found.host) == {Code.IOMMU_OFF}
    for address in found.devices:
        assert found.refusals(address)
        assert Code.NO_GROUP not in codes(found.of(address))  # said once, of the host


PARAMETERS = {
    "vfio/parameters/enable_unsafe_noiommu_mode": Code.NOIOMMU,
    "vfio_iommu_type1/parameters/allow_unsafe_interrupts": Code.UNSAFE_INTERRUPTS,
    "iommufd/parameters/allow_unsafe_interrupts": Code.UNSAFE_INTERRUPTS,
    "vfio_pci/parameters/disable_denylist": Code.DENYLIST_OFF,
}


@pytest.mark.parametrize(("parameter", "code"), PARAMETERS.items())
def test_parameters_of_modules(tree: Tree, parameter: str, code: Code) -> None:
    tree.put(f"sys/module/{parameter}", "N\n")
    assert audit(tree).host == ()
    tree.put(f"sys/module/{parameter}", "Y\n")
    assert codes(audit(tree).host) == {code}
    assert codes(audit(tree).refusals(GPU)) == {code}


def test_acs_override_of_the_kernel(tree: Tree) -> None:
    tree.put("proc/cmdline", "ro pcie_acs_override=downstream,multifunction quiet\n")
    assert codes(audit(tree).host) == {Code.ACS_OVERRIDE}


def test_interrupts_that_are_not_remapped(tree: Tree) -> None:
    for chip in (tree.sys / "kernel/irq").glob("*/chip_name"):
        chip.write_text(chip.read_text().replace("IR-", ""))
    assert codes(audit(tree).host) == {Code.INTERRUPT_REMAPPING}


# --- groups ---


def two_in_a_group(tree: Tree, driver: str | None) -> tuple[Node, Node]:
    group = tree.new_group()
    port = tree.bridge(tree.root_bus(0x40, 0), INTEL_PORT, ROOT_PORT, acs=Acs(), group=group)
    gpu, other = tree.function(port, H100, group=group), tree.function(port, CONNECTX7, group=group)
    tree.bind(gpu, "vfio-pci")
    tree.bind(other, driver)
    return gpu, other


def test_a_group_with_a_host_driver_in_it_is_not_viable(tree: Tree) -> None:
    gpu, other = two_in_a_group(tree, "mlx5_core")
    found = audit(tree)
    assert codes(found.of(gpu.address)) == {Code.GROUP_NOT_VIABLE}
    assert f"{other.address} (mlx5_core)" in found.of(gpu.address)[0].text
    # The kernel would refuse it all the same, so that no waiver helps.
    assert audit(tree, waive=["group-not-viable"]).refusals(gpu.address)


@pytest.mark.parametrize("driver", [None, "vfio-pci", "mlx5_vfio_pci", "pci-stub"])
def test_a_group_that_others_are_in_is_a_warning(tree: Tree, driver: str | None) -> None:
    gpu, _ = two_in_a_group(tree, driver)
    assert codes(audit(tree).of(gpu.address)) == {Code.GROUP_SHARED}
    assert audit(tree).refusals(gpu.address) == ()


def test_a_group_that_goes_to_one_pod_is_fine(tree: Tree) -> None:
    gpu, other = two_in_a_group(tree, "mlx5_core")
    found = audit(tree, gpu.address, other.address)
    assert set(found.devices) == {gpu.address, other.address}
    assert codes(found.of(gpu.address)) == set()
    assert codes(found.of(other.address)) == {Code.HOST_DRIVER}


def test_functions_of_a_card_go_together(tree: Tree) -> None:
    group = tree.new_group()
    port = tree.bridge(tree.root_bus(0x40, 0), INTEL_PORT, ROOT_PORT, acs=Acs())
    gpu = tree.function(port, RTX4090, slot=0, group=group, multifunction=True)
    sound = tree.function(port, RTX4090_AUDIO, slot=0, function=1, group=group, multifunction=True)
    assert codes(audit(tree).of(gpu.address)) == {Code.HOST_DRIVER}
    asked = audit(tree, gpu.address)
    assert set(asked.devices) == {gpu.address, sound.address}
    assert codes(asked.of(sound.address)) == {Code.HOST_DRIVER}


def test_a_device_without_a_group(tree: Tree) -> None:
    (tree.nodes[GPU].directory / "iommu_group").unlink()
    assert codes(audit(tree).of(GPU)) == {Code.NO_GROUP}


def test_a_group_that_vfio_made_up(tree: Tree) -> None:
    group = inventory.read(str(tree.sys), PciNames()).device(GPU).group
    tree.put(f"sys/kernel/iommu_groups/{group}/name", "vfio-noiommu\n")
    assert codes(audit(tree).of(GPU)) == {Code.NOIOMMU_GROUP}


def test_the_laptop_has_no_group_to_give(machine: Machine) -> None:
    tree = machine("laptop")
    found = inventory.read(str(tree.sys), PciNames())
    gpu = next(each for each in found.devices if each.device_id == 0x28A1)
    assert codes(audit(tree).refusals(gpu.address)) == {Code.GROUP_NOT_VIABLE}


# --- the path ---


def below(tree: Tree, port_acs: Acs | None, switch_acs: Acs | None) -> PciAddress:
    root = tree.bridge(tree.root_bus(0x40, 0), INTEL_PORT, ROOT_PORT, acs=port_acs)
    down = tree.bridge(tree.bridge(root, SWITCH_PORT, UPSTREAM), SWITCH_PORT, DOWNSTREAM, acs=switch_acs)
    gpu = tree.function(down, H100)
    tree.bind(gpu, "vfio-pci")
    return gpu.address


def test_acs_on_at_every_port_is_fine(tree: Tree) -> None:
    gpu = below(tree, Acs(), Acs())
    assert audit(tree).of(gpu) == ()


def test_acs_that_somebody_switched_off(tree: Tree) -> None:
    """As `setpci ... ACS` does for peer-to-peer at full speed, after the groups were made."""
    gpu = below(tree, Acs(), Acs(enabled=0x11))
    assert "request redirect, completion redirect off" in text(tree, Code.ACS_OFF, gpu)
    assert codes(audit(tree).refusals(gpu)) == {Code.ACS_OFF}
    assert audit(tree, gpu, waive=["acs-off"]).refusals(gpu) == ()


def test_what_a_port_is_not_able_to_switch_is_no_finding(tree: Tree) -> None:
    gpu = below(tree, Acs(able=0x01, enabled=0x01), Acs())
    assert audit(tree).of(gpu) == ()


@pytest.mark.parametrize("driver", ["shpchp", "pci-pf-stub"])
def test_a_driver_that_is_not_known_to_do_no_dma_counts(tree: Tree, driver: str) -> None:
    gpu, _ = two_in_a_group(tree, driver)
    assert codes(audit(tree).of(gpu.address)) == {Code.GROUP_NOT_VIABLE}


def two_below_a_switch(tree: Tree, switch_acs: Acs | None) -> tuple[PciAddress, PciAddress]:
    """In groups of their own, as Linux 6.12 has them."""
    root = tree.bridge(tree.root_bus(0x40, 0), INTEL_PORT, ROOT_PORT, acs=Acs())
    up = tree.bridge(root, SWITCH_PORT, UPSTREAM)
    gpus = [
        tree.function(tree.bridge(up, SWITCH_PORT, DOWNSTREAM, acs=switch_acs), model)
        for model in (H100, CONNECTX7)
    ]
    for node in gpus:
        tree.bind(node, "vfio-pci")
    return gpus[0].address, gpus[1].address


def test_a_switch_without_acs_keeps_nobody_apart(tree: Tree) -> None:
    gpu, card = two_below_a_switch(tree, None)
    found = audit(tree)
    for one, other in ((gpu, card), (card, gpu)):
        assert codes(found.refusals(one)) == codes(found.of(one)) == {Code.SWITCH_ACS}
        assert f"has no ACS, and {other} below the same switch" in found.of(one)[0].text
    assert not audit(tree, waive=["switch-acs"]).refusals(gpu)
    # All that is below it in one pod's hands is as good as a group.
    assert codes(audit(tree, gpu, card).of(gpu)) == {Code.ACS_MISSING}


def test_a_switch_whose_group_is_one_is_the_groups_trouble(tree: Tree) -> None:
    """As below a root port without ACS: the kernel puts all into that port's group."""
    group = tree.new_group()
    root = tree.bridge(tree.root_bus(0x40, 0), INTEL_PORT, ROOT_PORT, group=group)
    up = tree.bridge(root, SWITCH_PORT, UPSTREAM, group=group)
    ports = [tree.bridge(up, SWITCH_PORT, DOWNSTREAM, group=group) for _ in range(2)]
    gpu, card = (tree.function(*each, group=group) for each in zip(ports, (H100, CONNECTX7), strict=True))
    for node in (gpu, card):
        tree.bind(node, None)
    assert codes(audit(tree).of(gpu.address)) == {Code.GROUP_SHARED, Code.ACS_MISSING}


def test_a_switch_with_acs_does(tree: Tree) -> None:
    gpu, card = two_below_a_switch(tree, Acs())
    assert audit(tree).of(gpu) == audit(tree).of(card) == ()


@pytest.mark.parametrize(("port", "switch"), [(None, Acs()), (Acs(), None)])
def test_a_port_without_acs_is_a_warning(tree: Tree, port: Acs | None, switch: Acs | None) -> None:
    gpu = below(tree, port, switch)
    assert codes(audit(tree).of(gpu)) == {Code.ACS_MISSING}
    assert audit(tree).refusals(gpu) == ()


def test_a_bridge_to_conventional_pci_is_a_warning(tree: Tree) -> None:
    root = tree.bridge(tree.root_bus(0x40, 0), INTEL_PORT, ROOT_PORT, acs=Acs())
    gpu = tree.function(tree.bridge(root, SWITCH_PORT, PCI_BRIDGE), H100)
    tree.bind(gpu, None)
    assert "conventional PCI" in text(tree, Code.ACS_MISSING, gpu.address)


def test_what_cannot_be_read_counts_against_it(tree: Tree) -> None:
    """As to anybody but root: 64 bytes."""
    for address in (PORT, GPU):
        config = tree.nodes[address].directory / "config"
        config.write_bytes(config.read_bytes()[:64])
    found = audit(tree, waive=["acs-off", "acs-missing"])
    assert [each.code for each in found.of(GPU)] == [Code.CONFIG_UNREADABLE] * 2
    assert found.refusals(GPU)


# --- the device ---


def test_a_device_off_the_bus(tree: Tree) -> None:
    (tree.nodes[GPU].directory / "config").write_bytes(b"\xff" * 4096)
    assert codes(audit(tree).refusals(GPU)) == {Code.NO_ANSWER}


def test_a_device_that_cannot_be_reset(tree: Tree) -> None:
    tree.nodes[GPU].write("reset_method", "\n")
    assert codes(audit(tree).refusals(GPU)) == {Code.NO_RESET}
    assert audit(tree, waive=["no-reset"]).refusals(GPU) == ()


def test_ats_is_a_warning_while_it_is_on(machine: Machine) -> None:
    h100, mi300x = audit(machine("dgx-h100")), audit(machine("mi300x"))
    assert Code.ATS in codes(h100.of(PciAddress.parse("0000:1b:00.0")))
    assert Code.ATS in codes(mi300x.of(next(iter(mi300x.devices))))
    assert all(Code.ATS not in codes(each) for each in audit(machine("hgx-b200")).devices.values())


def test_the_display_of_the_firmware(machine: Machine) -> None:
    gpu = PciAddress.parse("0000:01:00.0")
    tree = machine("workstation")
    assert codes(audit(tree).refusals(gpu)) == {Code.BOOT_DISPLAY}
    assert audit(tree, waive=["boot-display"]).refusals(gpu) == ()


def test_a_driver_of_the_host_is_a_warning(tree: Tree) -> None:
    tree.bind(tree.nodes[GPU], "nvidia")
    assert audit(tree).refusals(GPU) == ()
    assert "bound to nvidia" in text(tree, Code.HOST_DRIVER)


def test_physical_and_virtual_functions(tree: Tree) -> None:
    port = tree.bridge(tree.root_bus(0x40, 0), INTEL_PORT, ROOT_PORT, acs=Acs())
    physical = tree.function(port, CONNECTX7)
    first, _ = tree.vfs(physical, CONNECTX_VF, count=2, total=8)
    tree.bind(first, "vfio-pci")
    assert codes(audit(tree).refusals(physical.address)) == {Code.VFS_ENABLED}
    assert audit(tree).of(first.address) == ()
    tree.bind(physical, "vfio-pci")
    assert codes(audit(tree).refusals(first.address)) == {Code.FOREIGN_VF}
    tree.remove(physical)  # gone while it is looked at: what is not known counts against it
    assert codes(audit(tree).refusals(first.address)) == {Code.FOREIGN_VF}


# --- what the host does with it ---


def test_who_has_a_gpu_open_is_named(tree: Tree) -> None:
    tree.bind(tree.nodes[GPU], "nvidia")
    (tree.nodes[GPU].directory / "drm/renderD128").mkdir(parents=True)
    tree.put(f"proc/driver/nvidia/gpus/{GPU}/information", "Model: \t\t H100\nDevice Minor: \t 3\n")
    tree.process(41, "other", "/dev/nvidia4", "/dev/nvidiactl", "/dev/dri/renderD129")
    assert Code.OPEN_HANDLES not in codes(audit(tree).of(GPU))
    tree.process(42, "python3", "/dev/nvidia3", "/dev/nvidia3")
    tree.process(43, "Xorg", "/dev/dri/renderD128")
    said = text(tree, Code.OPEN_HANDLES)
    assert said == f"{GPU} is open: /dev/nvidia3 by python3 (42), /dev/dri/renderD128 by Xorg (43)"
    assert audit(tree, waive=["open-handles"]).refusals(GPU)


@pytest.mark.parametrize("node", ["/dev/vfio/devices/vfio7", "/dev/vfio/{group}"])
def test_another_virtual_machine_is_named(tree: Tree, node: str) -> None:
    (tree.nodes[GPU].directory / "vfio-dev/vfio7").mkdir(parents=True)
    group = inventory.read(str(tree.sys), PciNames()).device(GPU).group
    tree.process(42, "qemu-system-x86", node.format(group=group))
    assert "by qemu-system-x86 (42)" in text(tree, Code.OPEN_HANDLES)


@pytest.mark.parametrize(
    ("made", "node"),
    [
        ("drm/card1", "/dev/dri/card1"),
        ("accel/accel0", "/dev/accel/accel0"),
        ("infiniband_verbs/uverbs2", "/dev/infiniband/uverbs2"),
        ("nvme/nvme3", "/dev/nvme3"),
    ],
)
def test_every_kind_of_node_is_looked_for(tree: Tree, made: str, node: str) -> None:
    (tree.nodes[GPU].directory / made).mkdir(parents=True)
    tree.process(42, "worker", node)
    assert text(tree, Code.OPEN_HANDLES) == f"{GPU} is open: {node} by worker (42)"


def test_a_long_list_of_holders_is_cut_and_counted(tree: Tree) -> None:
    (tree.nodes[GPU].directory / "drm/card0").mkdir(parents=True)
    for pid in range(50, 60):
        tree.process(pid, "worker", "/dev/dri/card0")
    assert text(tree, Code.OPEN_HANDLES).endswith("worker (53) and 6 more")


def test_processes_that_may_not_be_looked_at(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree.nodes[GPU].directory / "drm/card0").mkdir(parents=True)
    tree.process(42, "worker", "/dev/dri/card0")
    real: Callable[[str], list[str]] = sysfs.names

    def denied(path: str) -> list[str]:  # root, who runs these tests, is denied nothing
        if path.endswith("/42/fd"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(sysfs, "names", denied)
    assert codes(audit(tree).of(GPU)) == {Code.HANDLES_UNKNOWN}


def four(tree: Tree, model: Model) -> list[Node]:
    """Four of a kind, each in a slot of its own."""
    bus = tree.root_bus(0x40, 0)
    return [tree.function(tree.bridge(bus, INTEL_PORT, ROOT_PORT, acs=Acs()), model) for _ in range(4)]


@pytest.fixture
def disks(tree: Tree) -> tuple[Tree, list[Node]]:
    return tree, four(tree, NVME)


def in_use(tree: Tree, node: Node) -> set[Code]:
    return codes(audit(tree).of(node.address)) & {Code.ROOT_DISK, Code.DISK_IN_USE}


def test_the_root_file_system_on_a_partition(disks: tuple[Tree, list[Node]]) -> None:
    tree, (first, second, *_) = disks
    tree.nvme(first, 0, 1, 2)
    tree.nvme(second, 1)
    tree.mounts(("259:2", "/dev/nvme0n1p2", "/"), ("0:5", "devtmpfs", "/dev"))
    assert in_use(tree, first) == {Code.ROOT_DISK}
    assert in_use(tree, second) == set()
    assert audit(tree, waive=["root-disk"]).refusals(first.address)


def test_the_root_file_system_on_lvm_on_raid(disks: tuple[Tree, list[Node]]) -> None:
    tree, (first, second, third, *_) = disks
    names = [f"{tree.nvme(node, index, 1)}p1" for index, node in enumerate((first, second))]
    tree.nvme(third, 2, 1)
    virtual = tree.sys / "devices/virtual/block"
    tree.block(virtual / "md0", "9:0", on=tuple(names))
    tree.block(virtual / "dm-0", "253:0", on=("md0",), mapper="system-root")
    tree.mounts(("253:0", "/dev/mapper/system-root", "/"))
    for node in (first, second):
        assert in_use(tree, node) == {Code.ROOT_DISK, Code.DISK_IN_USE}
    assert in_use(tree, third) == set()


@pytest.mark.parametrize("source", ["/dev/nvme0n1p1", "/dev/mapper/crypt"])
def test_btrfs_is_found_by_its_source(disks: tuple[Tree, list[Node]], source: str) -> None:
    """Its mounts have device numbers of their own."""
    tree, (first, *_) = disks
    tree.nvme(first, 0, 1)
    if "mapper" in source:
        tree.block(tree.sys / "devices/virtual/block/dm-3", "253:3", on=("nvme0n1p1",), mapper="crypt")
    tree.mounts(("0:27", source, "/"))
    assert Code.ROOT_DISK in in_use(tree, first)


def test_nvme_multipath_belongs_to_its_controllers(disks: tuple[Tree, list[Node]]) -> None:
    tree, (first, second, third, *_) = disks
    subsystem = tree.sys / "devices/virtual/nvme-subsystem/nvme-subsys0"
    tree.block(subsystem / "nvme0n1", "259:0")
    for index, node in enumerate((first, second)):
        (node.directory / f"nvme/nvme{index}").mkdir(parents=True)
        (subsystem / f"nvme{index}").symlink_to(node.directory / f"nvme/nvme{index}")
    tree.mounts(("259:0", "/dev/nvme0n1", "/"))
    assert in_use(tree, first) == in_use(tree, second) == {Code.ROOT_DISK}
    assert in_use(tree, third) == set()


def test_a_mount_swap_or_volume_group_is_use(disks: tuple[Tree, list[Node]]) -> None:
    tree, (first, second, third, fourth, *_) = disks
    for index, node in enumerate((first, second, third, fourth)):
        tree.nvme(node, index, 1)
    tree.mounts(("259:1", "/dev/nvme0n1p1", "/srv/data"))
    tree.put("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/nvme1n1p1 partition 8 0 -2\n")
    tree.block(tree.sys / "devices/virtual/block/dm-1", "253:1", on=("nvme2n1p1",), mapper="guests-a")
    for node in (first, second, third):
        assert in_use(tree, node) == {Code.DISK_IN_USE}
    assert in_use(tree, fourth) == set()
    assert "mounted at /srv/data" in text(tree, Code.DISK_IN_USE, first.address)
    assert "nvme2n1p1 is part of dm-1" in text(tree, Code.DISK_IN_USE, third.address)


def test_a_disk_that_a_process_has_open(disks: tuple[Tree, list[Node]]) -> None:
    tree, (first, second, *_) = disks
    tree.nvme(first, 0, 1)
    tree.nvme(second, 1, 1)
    tree.process(42, "postgres", "/dev/nvme0n1p1")
    assert "by postgres (42)" in text(tree, Code.OPEN_HANDLES, first.address)
    assert Code.OPEN_HANDLES not in codes(audit(tree).of(second.address))


@pytest.fixture
def cards(tree: Tree) -> tuple[Tree, list[Node]]:
    return tree, four(tree, CONNECTX6_DX)


def routed(tree: Tree, node: Node) -> bool:
    return Code.DEFAULT_ROUTE in codes(audit(tree).refusals(node.address))


@pytest.mark.parametrize("ipv6", [False, True])
def test_the_card_of_the_default_route(cards: tuple[Tree, list[Node]], ipv6: bool) -> None:
    tree, (first, second, third, *_) = cards
    tree.interface("eth0", first.directory)
    tree.interface("other0", second.directory)
    tree.interface("down0", third.directory, up=False)
    tree.default_route("eth0", ipv6=ipv6)
    assert [routed(tree, node) for node in (first, second, third)] == [True, False, False]
    assert Code.NETWORK_UP in codes(audit(tree).of(second.address))
    assert Code.NETWORK_UP not in codes(audit(tree).of(third.address))
    assert not audit(tree, waive=["default-route"]).refusals(first.address)


def test_the_default_route_through_a_vlan_of_a_bond(cards: tuple[Tree, list[Node]]) -> None:
    tree, (first, second, third, *_) = cards
    for index, node in enumerate((first, second, third)):
        tree.interface(f"eth{index}", node.directory)
    tree.interface("bond0", None, on=("eth0", "eth1"))
    tree.interface("bond0.7", None, on=("bond0",))
    tree.default_route("bond0.7")
    assert [routed(tree, node) for node in (first, second, third)] == [True, True, False]
    assert "bond0.7 through eth0" in text(tree, Code.DEFAULT_ROUTE, first.address)


def test_a_virtio_card_is_found_below_its_function(tree: Tree) -> None:
    device = tree.nodes[GPU].directory / "virtio2"
    device.mkdir()
    tree.interface("eth0", device)
    tree.default_route("eth0")
    assert routed(tree, tree.nodes[GPU])


# --- asking for devices ---


def test_require_names_device_codes_and_the_way_out(tree: Tree) -> None:
    gpu = below(tree, Acs(), Acs(enabled=0))
    tree.nodes[gpu].write("reset_method", "\n")
    with pytest.raises(FailedPrecondition) as refused:
        audit(tree, gpu).require()
    assert refused.value.brief == f"PCI device {gpu} is not given to a pod: acs-off, no-reset"
    assert "has no way to be reset" in (refused.value.details or "")
    assert '"acs-off" to vfio.waive' in (refused.value.hint or "")
    with pytest.raises(FailedPrecondition, match="no-reset"):
        audit(tree, gpu, waive=["acs-off"]).require()


def test_no_waiver_is_offered_for_what_cannot_be_waived(tree: Tree) -> None:
    (tree.nodes[GPU].directory / "iommu_group").unlink()
    with pytest.raises(FailedPrecondition) as refused:
        audit(tree, GPU, waive=["no-group"]).require()
    assert "vfio.waive" not in (refused.value.hint or "")


def test_a_waiver_is_logged_at_each_use(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    tree.put("proc/cmdline", "pcie_acs_override=downstream\n")
    with caplog.at_level(logging.INFO, "casemate"):
        audit(tree, GPU, waive=["acs-override"]).require()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "acs-override is waived by vfio.waive: the kernel was started with pcie_acs_override=downstream"
    )


def test_warnings_are_logged_too(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    tree.bind(tree.nodes[GPU], "nvidia")
    with caplog.at_level(logging.INFO, "casemate"):
        audit(tree, GPU).require()
    assert [record.getMessage() for record in caplog.records] == [f"host-driver: {GPU} is bound to nvidia"]


def test_only_what_pods_can_have_is_judged(tree: Tree) -> None:
    with pytest.raises(NotFound):
        audit(tree, PciAddress.parse("77:00.0"))
    with pytest.raises(InvalidArgument):
        audit(tree, PORT)
    assert set(audit(tree).devices) == {GPU}


def test_the_chipsets_usb_is_not_given(machine: Machine) -> None:
    tree = machine("dgx-h100")
    usb = next(address for address in audit(tree).devices if address.slot == 0x14)
    assert XHCI.resets == ""
    assert codes(audit(tree).refusals(usb)) == {Code.NO_RESET}


@pytest.mark.parametrize("name", ["dgx-h100", "hgx-b200", "mi300x"])
def test_servers_are_fit_for_tenants(machine: Machine, name: str) -> None:
    """Their GPUs and switches, that is, with their drivers from the factory and nothing running."""
    tree = machine(name)
    found, judged = inventory.read(str(tree.sys), PciNames()), audit(tree)
    assert judged.host == ()
    gpus = [each for each in found.devices if each.kind in (Kind.GPU, Kind.NVSWITCH) and not each.boot_vga]
    assert len(gpus) in (8, 12)
    for each in gpus:
        assert judged.refusals(each.address) == ()
        assert {finding.severity for finding in judged.of(each.address)} == {Severity.WARNING}
