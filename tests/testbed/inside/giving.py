"""Run in the bed for test_giving.py: devices of each kind go to vfio-pci, are used, reset and given back.

What should be seen is the test's business.
"""

import mmap
import os
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from config.load import load
from tests.testbed.gauges import Fault
from tests.testbed.inside import places, vfiouse
from vfio import inventory, isolation
from vfio.address import PciAddress
from vfio.binding import Bus, Node
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Pod, Process
from vfio.names import PciNames
from vfio.offer import offer
from vfio.release import Release

PCI = Path("/sys/bus/pci/devices")
IOVA = 0x100000
RAM_BYTES = 2 << 20
RESET_S = 6.0  # of a device that answers no more; the kernel goes on to wait for it
PULL_S = 60.0
FAULT_S = 60.0
# Slot Control: power and its lamp off, upon which QEMU takes the card out; and on again, or Linux thinks that
# somebody has switched the slot off in good order (pciehp: "Already disabled"). It is told in the end only.
PULL = ("CAP_EXP+0x18.w=0x0700:0x0720", "CAP_EXP+0x18.w=0x0120:0x0720")
EDU_SOURCE, EDU_TARGET, EDU_COUNT, EDU_COMMAND, EDU_BUFFER = 0x80, 0x88, 0x90, 0x98, 0x40000
EDU_FROM_MEMORY, EDU_TO_MEMORY = 0x1, 0x3


@dataclass
class Trip:
    """Of one pod. By the device's name; counted: of fake GPUs at the steps bound, used, released."""

    claimed: list[str] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    cdevs: dict[str, bool] = field(default_factory=dict)
    drivers: dict[str, dict[str, str]] = field(default_factory=dict)
    counted: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    used: dict[str, object] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    resets: dict[str, str] = field(default_factory=dict)


class Host:
    def __init__(self, ledger: Ledger) -> None:
        self.bus = Bus()
        self.ledger = ledger
        self.where = {name: PciAddress.parse(each) for name, each in places.addresses().items()}
        self._me = Process.here(os.getpid(), 0)

    def trip(
        self,
        pod: str,
        *wanted: str,
        use: Callable[[dict[str, Node]], dict[str, object]] = lambda nodes: {},
        fault: Fault = Fault.NONE,
    ) -> Trip:
        """fault: of all fake GPUs among the wanted, from when they were used until they were given back."""
        trip = Trip()
        request = Request.at(*(self.where[name] for name in wanted))
        found = offer(inventory.read(names=PciNames()))
        claim = self.ledger.claim(Pod("test", pod), self._me, Wanted((request,)), found)
        names = {address: self._name(address) for address in claim.addresses}
        trip.claimed = sorted(names.values())
        self._look(trip, "before", names)
        nodes = {names[node.address]: node for node in self.bus.bind(self.ledger, claim.id, claim.addresses)}
        self.ledger.use(claim.id)
        self._look(trip, "bound", names)
        trip.groups = {name: node.group for name, node in nodes.items()}
        trip.cdevs = {name: os.path.exists(node.cdev_path or "/nowhere") for name, node in nodes.items()}
        trip.used = use(nodes)
        self._look(trip, "used", names)
        for name in wanted:
            if fault:
                places.fail(name, fault)
        addresses = self.ledger.release(claim.id, self._me)
        # One that answers takes its time, too, on a host that has none.
        release = Release(self.bus, self.ledger)
        if fault is Fault.DIES_BY_RESET:
            release = Release(self.bus, self.ledger, reset_s=RESET_S)
        failed = release.give_back(addresses)
        trip.failed = {names[address]: reason for address, reason in failed.items()}
        self._look(trip, "released", names)
        states = {each.address: each.state.value for each in self.ledger.devices()}
        trip.states = {name: states[address] for address, name in names.items()}
        for entry in self.ledger.log():
            if entry.pod == claim.pod and entry.cause.value == "reset" and entry.address is not None:
                trip.resets[names[entry.address]] = entry.detail
        return trip

    def _name(self, address: PciAddress) -> str:
        return next((name for name, each in self.where.items() if each == address), str(address))

    def _look(self, trip: Trip, step: str, names: dict[PciAddress, str]) -> None:
        trip.drivers[step] = {name: self.bus.driver(address) for address, name in names.items()}
        gauges = places.EXCHANGE / "gauges"
        gpus = [name for name in names.values() if (gauges / name).exists()]
        trip.counted[step] = {name: places.counted(name) for name in gpus}


def use_gpu(device: vfiouse.Opened, ram: mmap.mmap, name: str) -> dict[str, object]:
    """DMA both ways, and to where nothing is mapped. Its memory keeps what was written to it."""
    before = places.counted(name)
    device.write(0, 0x04, b"left")
    ram[:6] = b"tenant"
    results = []
    for where, way in ((IOVA, 1), (IOVA + RAM_BYTES - 6, 2), (IOVA + RAM_BYTES, 2)):
        device.write(0, 0x10, struct.pack("<QI", where, 6))
        device.write(0, 0x1C, struct.pack("<I", way))
        results.append(struct.unpack("<I", device.read(0, 0x20, 4))[0])
    return {
        "bars": [device.size(index) for index in range(6)],
        "results": results,
        "came": ram[-6:].decode(),
        "register": device.read(0, 0x04, 4).decode(),
        "mapped_bytes": before["mapped_bytes"],
    }


def use_edu(device: vfiouse.Opened, ram: mmap.mmap) -> dict[str, object]:
    """The same; what the IOMMU refuses is in the kernel's log."""
    ram[:4] = b"data"

    def copy(source: int, target: int, way: int) -> None:
        for register, value in ((EDU_SOURCE, source), (EDU_TARGET, target), (EDU_COUNT, 4)):
            device.write(0, register, struct.pack("<Q", value))
        device.write(0, EDU_COMMAND, struct.pack("<Q", way))
        while struct.unpack("<Q", device.read(0, EDU_COMMAND, 8))[0] & 1:
            time.sleep(0.02)  # it has no other way to say so but an interrupt

    copy(IOVA, EDU_BUFFER, EDU_FROM_MEMORY)
    copy(EDU_BUFFER, IOVA + 4096, EDU_TO_MEMORY)
    came = ram[4096:4100].decode()
    copy(EDU_BUFFER, IOVA + RAM_BYTES, EDU_TO_MEMORY)
    deadline = time.monotonic() + FAULT_S
    while True:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
        faults = [line for line in log.splitlines() if "DMAR" in line and "fault addr" in line]
        told = any(f"fault addr {IOVA + RAM_BYTES:#x}" in line for line in faults)
        if told or time.monotonic() > deadline:  # an interrupt of the IOMMU's has the kernel say it
            return {"came": came, "faults": faults}
        time.sleep(0.1)


def each_kind(host: Host) -> Trip:
    ram = mmap.mmap(-1, RAM_BYTES)

    def use(nodes: dict[str, Node]) -> dict[str, object]:
        gpu, edu = nodes["gpu0"], nodes["edu0"]
        with vfiouse.by_cdev(gpu.cdev_path or "", ram, IOVA) as device:
            by_cdev = use_gpu(device, ram, "gpu0")
        with vfiouse.by_group(gpu.group_path, str(gpu.address), ram, IOVA) as device:
            by_group = use_gpu(device, ram, "gpu0")
        with vfiouse.by_group(edu.group_path, str(edu.address), ram, IOVA) as device:
            edus = use_edu(device, ram)
        return {"cdev": by_cdev, "group": by_group, "edu": edus}

    return host.trip("each-kind", "gpu0", "a6000", "nvme0", "nic0", "edu0", use=use)


def cleared(host: Host, name: str) -> dict[str, str]:
    """What a person does who has seen to it."""
    places.fail(name, Fault.NONE)
    address = host.where[name]
    reason = Release(host.bus, host.ledger).clear(address)
    return {
        "reason": reason,
        "state": host.ledger.device(address).state.value,
        "driver": host.bus.driver(address),
    }


def virtual_functions(host: Host) -> dict[str, object]:
    nic = host.where["nic0"]
    host.bus.write(nic, "sriov_numvfs", "2")
    found = inventory.read(names=PciNames())
    vfs = found.function(nic).vfs
    host.where |= {f"vf{number}": address for number, address in enumerate(vfs)}
    audit = isolation.audit(found)
    trip = host.trip("vf", "vf0")
    host.bus.write(nic, "sriov_numvfs", "0")
    return {
        "count": len(vfs),
        "groups": [found.function(each).group for each in (nic, *vfs)],
        "card": [each.code.value for each in audit.devices[nic]],
        "refused": [each.code.value for vf in vfs for each in audit.refusals(vf)],
        "trip": asdict(trip),
    }


def pulled(host: Host) -> Trip:
    """It is taken out while a pod has it."""
    address = host.where["gpu3"]

    def use(_: dict[str, Node]) -> dict[str, object]:
        port = inventory.read(names=PciNames()).function(address).path[-1]
        subprocess.run(["setpci", "-s", str(port), *PULL], check=True)
        deadline = time.monotonic() + PULL_S
        while (there := (PCI / str(address)).exists()) and time.monotonic() < deadline:
            time.sleep(0.1)  # pciehp's interrupt is answered by a thread of the kernel's
        return {"there": there}

    return host.trip("pulled", "gpu3", use=use)


def give() -> dict[str, object]:
    """What leaves a device gone or in quarantine comes last."""
    seen: dict[str, object] = {}
    with Ledger(Path(load().ledger_dir)) as ledger:
        host = Host(ledger)
        steps: dict[str, Callable[[], object]] = {
            "each_kind": lambda: asdict(each_kind(host)),
            "virtual_functions": lambda: virtual_functions(host),
            "narrow": lambda: asdict(host.trip("narrow", "gpu1", fault=Fault.NARROW_AFTER_RESET)),
            "narrow_cleared": lambda: cleared(host, "gpu1"),
            "dies": lambda: asdict(host.trip("dies", "gpu2", fault=Fault.DIES_BY_RESET)),
            "dies_cleared": lambda: cleared(host, "gpu2"),
            "shared": lambda: asdict(host.trip("shared", "edu1")),
            "pulled": lambda: asdict(pulled(host)),
        }
        for name, step in steps.items():
            began = time.monotonic()
            seen[name] = step()
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    return seen
