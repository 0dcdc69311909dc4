"""What is done in the machine of test_giving.py: devices go to vfio-pci and back, on a real kernel.

Its /init's main(); answers with what was seen at each step. Knows nothing of what should be.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm import hostscan
from vfio import inventory
from vfio.address import PciAddress
from vfio.binding import Bus, Node
from vfio.inventory import Device
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Claim, Entry, Pod, Process
from vfio.names import PciNames
from vfio.offer import offer
from vfio.release import Release

NVME, EDU = (0x1B36, 0x0010), (0x1234, 0x11E8)


@dataclass
class Seen:
    """By step. drivers: of the NVMe, then of edu."""

    claim: Claim | None = None
    nodes: tuple[Node, ...] = ()
    opens: dict[str, bool] = field(default_factory=dict)
    drivers: dict[str, list[str]] = field(default_factory=dict)
    resets: dict[str, str | None] = field(default_factory=dict)
    disks: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, dict[PciAddress, str]] = field(default_factory=dict)
    states: dict[str, list[str]] = field(default_factory=dict)
    cleared: str = ""
    log: list[Entry] = field(default_factory=list)


def main() -> None:
    hostscan.answer(_give)


def _give() -> Seen:
    seen, bus = Seen(), Bus()
    me = Process.here(os.getpid(), 0)
    with Ledger(Path("/tmp/ledger")) as ledger:
        found = inventory.read(names=PciNames())
        nvme, edu = _the(found.devices, NVME), _the(found.devices, EDU)
        release = Release(bus, ledger)

        def look(step: str) -> None:
            seen.drivers[step] = [bus.driver(nvme), bus.driver(edu)]
            seen.disks[step] = sorted(os.listdir("/sys/block"))
            seen.states[step] = [each.state.value for each in ledger.devices()]

        def given(pod: str) -> Claim:
            claim = ledger.claim(Pod("test", pod), me, Wanted((Request.at(nvme, edu),)), offer(found))
            seen.nodes = bus.bind(ledger, claim.id, claim.addresses)
            ledger.use(claim.id)
            return claim

        look("before")
        seen.claim = given("first")
        look("bound")
        for node in seen.nodes:
            seen.opens[str(node.address)] = _opens(node.group_path)
        seen.resets = {str(each): bus.read(each, "reset_method") for each in (nvme, edu)}
        seen.failed["first"] = release.give_back(ledger.release(seen.claim.id, me))
        look("given back")
        seen.resets |= {f"{each} after": bus.read(each, "reset_method") for each in (nvme, edu)}

        second = given("second")
        bus.write(nvme, "remove", "1")  # as if it were pulled out
        seen.failed["second"] = release.give_back(ledger.release(second.id, me))
        look("pulled out")
        Path("/sys/bus/pci/rescan").write_text("1")
        seen.cleared = release.clear(nvme)
        look("put in")
        seen.log = ledger.log()
    return seen


def _the(devices: tuple[Device, ...], ids: tuple[int, int]) -> PciAddress:
    return next(each.address for each in devices if (each.vendor_id, each.device_id) == ids)


def _opens(path: str) -> bool:
    os.close(os.open(path, os.O_RDWR))
    return True
