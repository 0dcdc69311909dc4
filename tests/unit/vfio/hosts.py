"""Hosts as the ledger sees them: devices, NUMA nodes, NVLink partitions; and a clock that a test turns."""

from dataclasses import dataclass

from vfio.address import PciAddress
from vfio.ledger.demand import Candidate, Host, HostNode, Pages, Partition
from vfio.ledger.records import Instant, Pod, Process

NVIDIA = 0x10DE
H100 = 0x2330
TWO_MIB = 2 << 20

BOOT = "b5a1f3c2-0000-4000-8000-000000000001"
POD = Pod("k8s.io", "training", "red")
OTHER = Pod("k8s.io", "serving", "blue")
OWNER = Process(4242, 1000, BOOT)
WORKER = Process(4243, 1001, BOOT)


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def gpu(
    address: str, *, node: int | None = 0, switch: str | None = None, companions: tuple[str, ...] = ()
) -> Candidate:
    return Candidate(
        at(address),
        NVIDIA,
        H100,
        "GH100 [H100 SXM5 80GB]",
        "gpu",
        node,
        at(switch) if switch else None,
        frozenset(map(at, companions)),
    )


def nic(address: str, *, node: int | None = 0, switch: str | None = None) -> Candidate:
    below = at(switch) if switch else None
    return Candidate(at(address), 0x15B3, 0x1021, "MT2910 [ConnectX-7]", "nic", node, below)


def plain(count: int) -> Host:
    """GPUs 0000:01:00.0 and on, all alike."""
    return Host(tuple(gpu(f"{number:02x}:00.0") for number in range(1, count + 1)))


def dgx() -> Host:
    """Eight GPUs, two below each of four switches, two switches on each node, a NIC beside each pair;
    partitions of 1, 2, 4 and 8 as the fabric manager of an HGX H100 has them."""
    gpus, nics = [], []
    for number in range(8):
        switch = f"{0x10 + 0x10 * (number // 2):02x}:00.0"
        node = number // 4
        gpus.append(gpu(f"{0x11 + 0x10 * (number // 2) + number % 2:02x}:00.0", node=node, switch=switch))
        if number % 2 == 0:
            nics.append(nic(f"{0x15 + 0x10 * (number // 2):02x}:00.0", node=node, switch=switch))
    partitions = [
        Partition(f"{size}.{start // size}", frozenset(c.address for c in gpus[start : start + size]))
        for size in (8, 4, 2, 1)
        for start in range(0, 8, size)
    ]
    nodes = tuple(
        HostNode(
            node,
            tuple((node * 8 + core, 64 + node * 8 + core) for core in range(8)),
            {TWO_MIB: Pages(total=1000, free=1000)},
        )
        for node in (0, 1)
    )
    return Host((*gpus, *nics), tuple(partitions), nodes)


@dataclass(slots=True)
class Clock:
    """Both clocks of a host, which go on by hand."""

    wall_s: float = 1_000_000.0
    uptime_s: float = 100.0
    boot: str = BOOT

    def __call__(self) -> Instant:
        return Instant(self.wall_s, self.uptime_s, self.boot)

    def go(self, seconds: float) -> None:
        self.wall_s += seconds
        self.uptime_s += seconds

    def reboot(self, off_s: float) -> None:
        self.wall_s += off_s
        self.uptime_s = 10.0
        self.boot = "b5a1f3c2-0000-4000-8000-000000000002"
