"""The library of hosts: trees of sysfs for machines with GPUs, small and large.

Ids are pci.ids', classes and sizes of BARs as lspci showed them in public reports, said with each model.
Bus numbers of the GPUs of the DGX are a DGX H100's as nvidia-smi lists them; which port of which switch
a device is on is made up, in the shape of the maker's block diagrams.
"""

from collections.abc import Callable
from pathlib import Path

from tests.unit.vfio.trees import (
    ACS_ISOLATING,
    DOWNSTREAM,
    GIB,
    INTEGRATED,
    IO,
    KIB,
    MEM32,
    MEM64,
    MIB,
    PREF64,
    ROM,
    ROOT_PORT,
    UPSTREAM,
    Acs,
    Model,
    Node,
    RootBus,
    Tree,
)

# [10de:2330], class 0302. BARs: lspci in fastfetch-cli/fastfetch#1658, "Region 0 16M, 2 128G, 4 32M".
H100 = Model(
    "10de:2330",
    0x030200,
    "10de:16c1",
    {0: (16 * MIB, PREF64), 2: (128 * GIB, PREF64), 4: (32 * MIB, PREF64)},
    "nvidia",
)
# [10de:22a3], class 0680: that of a bridge, with the header of a device (lspci of HGX H100 boards).
NVSWITCH = Model("10de:22a3", 0x068000, "10de:1796", {0: (32 * MIB, PREF64)}, "nvidia-nvswitch")
# [10de:2901], class 0302, subsystem 10de:1999; "Region 0 64M, 2 256G, 4 32M" (lspci of a B200 host whose
# guests started slowly; Contrast's documentation has the subsystem).
B200 = Model(
    "10de:2901",
    0x030200,
    "10de:1999",
    {0: (64 * MIB, PREF64), 2: (256 * GIB, PREF64), 4: (32 * MIB, PREF64)},
    "nvidia",
    link=("32.0 GT/s PCIe", 16),
)
# [1002:74a1], class 1200. A switch of its own is in the package: bridges 1022:1500 and 1002:1501.
MI300X = Model(
    "1002:74a1",
    0x120000,
    "1002:74a1",
    {0: (256 * GIB, PREF64), 2: (2 * MIB, PREF64), 5: (512 * KIB, MEM32), 6: (128 * KIB, ROM)},
    "amdgpu",
)
MI300X_UP = Model("1022:1500", 0x060400, driver="pcieport")
MI300X_DOWN = Model("1002:1501", 0x060400, driver="pcieport")
RTX4090 = Model(
    "10de:2684",
    0x030000,
    "1043:889c",
    {
        0: (16 * MIB, MEM32),
        1: (32 * GIB, PREF64),
        3: (32 * MIB, PREF64),
        5: (128, IO),
        6: (512 * KIB, ROM),
    },
    "nvidia",
    resets="bus",
    link=("16.0 GT/s PCIe", 16),
)
RTX4090_AUDIO = Model(
    "10de:22ba",
    0x040300,
    "1043:889c",
    {0: (16 * KIB, MEM32)},
    "snd_hda_intel",
    resets="bus",
    link=("16.0 GT/s PCIe", 16),
)
RTX4050_MOBILE = Model(
    "10de:28a1", 0x030000, "1025:1731", {0: (16 * MIB, MEM32), 1: (8 * GIB, PREF64)}, "nvidia"
)
CONNECTX7 = Model("15b3:1021", 0x020700, "15b3:0023", {0: (32 * MIB, PREF64)}, "mlx5_core")
CONNECTX_VF = Model("15b3:101e", 0x020700, "15b3:0023", {0: (2 * MIB, PREF64)}, "mlx5_core", resets="flr")
CONNECTX6_DX = Model("15b3:101d", 0x020000, "15b3:0043", {0: (32 * MIB, PREF64)}, "mlx5_core")
NVME = Model("144d:a824", 0x010802, "144d:a801", {0: (32 * KIB, MEM64)}, "nvme", link=("16.0 GT/s PCIe", 4))
NVME_CLIENT = Model(
    "144d:a80a", 0x010802, "144d:a801", {0: (16 * KIB, MEM64)}, "nvme", link=("16.0 GT/s PCIe", 4)
)
I210 = Model("8086:1533", 0x020000, "8086:0001", {0: (512 * KIB, MEM32)}, "igb", link=("2.5 GT/s PCIe", 1))
I225 = Model("8086:15f3", 0x020000, "1043:87d2", {0: (MIB, MEM32)}, "igc", link=("5.0 GT/s PCIe", 1))
IRIS_XE = Model("8086:9a49", 0x030000, "1025:1533", {0: (16 * MIB, MEM64), 2: (256 * MIB, PREF64)}, "i915")
ASPEED = Model("1a03:2000", 0x030000, "1a03:2000", {0: (16 * MIB, MEM32)}, "ast", resets="", link=None)

HOST_BRIDGE = Model("8086:09a2", 0x060000, link=None, resets="")
INTEL_PORT = Model("8086:352a", 0x060400, driver="pcieport")
AMD_PORT = Model("1022:14ab", 0x060400, driver="pcieport")
SWITCH_PORT = Model("1000:c030", 0x060400, driver="pcieport")
ISA = Model("8086:7a84", 0x060100, link=None, resets="")
SMBUS = Model("8086:7aa3", 0x0C0500, driver="i801_smbus", link=None, resets="")
SPI = Model("8086:7aa4", 0x0C8000, driver="intel-spi", link=None, resets="")
SATA = Model("8086:7ae2", 0x010601, driver="ahci", link=None, resets="")
XHCI = Model("8086:7ae0", 0x0C0330, driver="xhci_hcd", link=None, resets="")
UNCORE = Model("8086:3241", 0x110100, link=None, resets="")

ON = Acs()


def _switch(tree: Tree, parent: RootBus | Node, ports: int, *, secondary: int | None = None) -> list[Node]:
    """A PCI Express switch with ACS in its downstream ports: what servers with GPUs have."""
    up = tree.bridge(parent, SWITCH_PORT, UPSTREAM, secondary=secondary)
    return [tree.bridge(up, SWITCH_PORT, DOWNSTREAM, acs=ON) for _ in range(ports)]


def _chipset(tree: Tree, uncore: int) -> RootBus:
    """Bus 0 of an Intel host: what no pod gets."""
    bus = tree.root_bus(0, 0)
    tree.function(bus, HOST_BRIDGE, port_type=INTEGRATED)
    for _ in range(uncore):
        tree.function(bus, UNCORE, port_type=INTEGRATED)
    pch = tree.new_group()
    for number, model in enumerate((ISA, SMBUS, SPI)):
        tree.function(bus, model, slot=0x1F, function=number, group=pch, port_type=INTEGRATED)
    tree.function(bus, XHCI, slot=0x14, port_type=INTEGRATED)
    return bus


def dgx_h100(root: Path) -> Tree:
    """8 H100, 4 NVSwitches, 8 ConnectX-7 beside the GPUs, 2 ConnectX-6, 10 NVMe, 2 sockets.

    The first ConnectX-7 has 4 of 16 VFs.
    """
    tree = Tree(root)
    _chipset(tree, uncore=16)
    for socket, gpus in enumerate(((0x1B, 0x43, 0x52, 0x61), (0x9D, 0xC3, 0xD1, 0xDF))):
        for gpu in gpus:
            bus = tree.root_bus(gpu - 6, socket)
            for _ in range(5):
                tree.function(bus, UNCORE, port_type=INTEGRATED)
            port = tree.bridge(bus, INTEL_PORT, ROOT_PORT, acs=ON)
            up = tree.bridge(port, SWITCH_PORT, UPSTREAM)
            slots = [
                tree.bridge(up, SWITCH_PORT, DOWNSTREAM, acs=ON, secondary=gpu + number)
                for number in range(3)
            ]
            tree.function(slots[0], H100, ats=0x8000)
            nic = tree.function(slots[1], CONNECTX7)
            if gpu == 0x1B:
                tree.vfs(nic, CONNECTX_VF, count=4, total=16)
            tree.function(slots[2], NVME)
    fabric = tree.root_bus(0x01, 0)
    for down in _switch(tree, tree.bridge(fabric, INTEL_PORT, ROOT_PORT, acs=ON), 4):
        tree.function(down, NVSWITCH)
    storage = tree.root_bus(0x25, 0)
    for model in (CONNECTX6_DX, CONNECTX6_DX, NVME, NVME, I210, ASPEED):
        node = tree.function(tree.bridge(storage, INTEL_PORT, ROOT_PORT, acs=ON), model)
        if model is ASPEED:
            node.write("boot_vga", "1\n")
    return tree


def hgx_b200(root: Path) -> Tree:
    """8 B200. Their switches have no PCI function: two ConnectX-7 manage them (Fabric Manager User Guide)."""
    tree = Tree(root)
    _chipset(tree, uncore=4)
    for socket in (0, 1):
        for number in range(4):
            bus = tree.root_bus(0x15 + 0x60 * socket + 0x14 * number, socket)
            slots = _switch(tree, tree.bridge(bus, INTEL_PORT, ROOT_PORT, acs=ON), 2)
            tree.function(slots[0], B200, ats=0)
            tree.function(slots[1], CONNECTX7)
    fabric = tree.root_bus(0x05, 0)
    for _ in range(2):
        tree.function(tree.bridge(fabric, INTEL_PORT, ROOT_PORT, acs=ON), CONNECTX7)
    return tree


def mi300x(root: Path) -> Tree:
    """8 MI300X behind switches, each with the switch of its own package; AMD's IOMMU."""
    tree = Tree(root)
    (tree.sys / "class/iommu/dmar0/intel-iommu/ecap").unlink()
    tree.put("sys/class/iommu/ivhd0/amd-iommu/features", "25bf732fa2295afe:1d\n")
    for socket in (0, 1):
        for number in range(4):
            bus = tree.root_bus(0x05 + 0x80 * socket + 0x14 * number, socket)
            tree.function(bus, Model("1022:14a4", 0x060000, link=None, resets=""), port_type=INTEGRATED)
            (down,) = _switch(tree, tree.bridge(bus, AMD_PORT, ROOT_PORT, acs=ON), 1)
            inner = tree.bridge(down, MI300X_UP, UPSTREAM)
            gpu = tree.function(tree.bridge(inner, MI300X_DOWN, DOWNSTREAM, acs=ON), MI300X, ats=0x8000)
            gpu.write("current_compute_partition", "SPX\n")
            gpu.write("available_compute_partition", "SPX, DPX, QPX, CPX\n")
    return tree


def workstation(root: Path) -> Tree:
    """A GeForce with the screen on it and its audio function in its group; NVMe, network, SATA."""
    tree = Tree(root)
    bus = _chipset(tree, uncore=0)
    tree.function(bus, SATA, slot=0x17, port_type=INTEGRATED)
    port = tree.bridge(bus, Model("8086:460d", 0x060400, driver="pcieport"), ROOT_PORT, slot=1, acs=ON)
    group = tree.new_group()
    gpu = tree.function(port, RTX4090, slot=0, group=group, multifunction=True)
    gpu.write("boot_vga", "1\n")
    tree.function(port, RTX4090_AUDIO, slot=0, function=1, group=group, multifunction=True)
    for slot, model in ((6, NVME_CLIENT), (0x1C, I225)):
        tree.function(tree.bridge(bus, INTEL_PORT, ROOT_PORT, slot=slot, acs=ON), model)
    return tree


def laptop(root: Path) -> Tree:
    """A discrete GPU whose root port has no ACS: port, GPU and an NVMe's port are one group."""
    tree = Tree(root)
    bus = _chipset(tree, uncore=0)
    tree.function(bus, IRIS_XE, slot=2, port_type=INTEGRATED).write("boot_vga", "1\n")
    group = tree.new_group()
    for function, model in ((0, RTX4050_MOBILE), (1, NVME_CLIENT)):
        port = tree.bridge(
            bus, INTEL_PORT, ROOT_PORT, slot=6, function=function, group=group, multifunction=True
        )
        tree.function(port, model, group=group)
    return tree


def no_iommu(root: Path) -> Tree:
    """The workstation with VT-d off in its firmware."""
    tree = Tree(root, iommu=False)
    bus = _chipset(tree, uncore=0)
    port = tree.bridge(bus, INTEL_PORT, ROOT_PORT, slot=1)
    tree.function(port, RTX4090, slot=0, multifunction=True)
    tree.function(port, RTX4090_AUDIO, slot=0, function=1, multifunction=True)
    return tree


MACHINES: dict[str, Callable[[Path], Tree]] = {
    "dgx-h100": dgx_h100,
    "hgx-b200": hgx_b200,
    "mi300x": mi300x,
    "workstation": workstation,
    "laptop": laptop,
    "no-iommu": no_iommu,
}
assert ON.enabled == ACS_ISOLATING
