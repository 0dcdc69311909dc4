"""Run in the bed by plugged_boots.sh: a pod booted with a device, or restored and then given it.

casemate boots such pods. Here a restored pod without devices is given one past casemate, by QEMU's own
monitor, as IOMMUFD's descriptors: what that takes is what restoring a pod with devices would take.
"""

import argparse
import json
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from shim.vm.designer import PORT_BUSES
from tests.testbed.inside import places
from tests.testbed.inside.device_boots import MAPS, QEMU, machines, pinned_bytes, started_s, tell
from tests.testbed.inside.given import PCI, Long, casemate, record, until_free

DEVICE = "nvme0"
WRAPPER = f"""\
#!/bin/sh
exec {QEMU} "$@" -qmp unix:{MAPS}/$$.qmp,server=on,wait=off
"""
# Until the guest's kernel has the device, beside which nothing new comes.
UNTIL_PLUGGED = """\
count=$(ls /sys/bus/pci/devices | wc -l)
echo up
until [ $(ls /sys/bus/pci/devices | wc -l) -gt $count ]; do sleep 0.1; done
echo up
"""
BOOTED, HUGE, PLUGGED = "booted", "booted, huge pages", "restored, then plugged"
MACHINES = {BOOTED: ("never", "off"), HUGE: ("required", "off"), PLUGGED: ("never", "shared")}


@dataclass(frozen=True, slots=True)
class Boot:
    """ready_s: from QEMU's start to an agent that answered. plugged_s: from the first word to the monitor
    until it has the device, all of the guest's RAM pinned; seen_s: until the guest has it, too.
    """

    way: str
    ready_s: float
    plugged_s: float
    seen_s: float
    pinned_bytes: int

    @property
    def whole_s(self) -> float:
        return self.ready_s + self.seen_s


def _profile(way: str) -> str:
    return way.replace(",", "").replace(" ", "-")


def boot(way: str) -> Boot:
    for path in MAPS.iterdir():
        path.unlink()
    options = ("--annotation", f"dev.casemate.profile={_profile(way)}")
    with ExitStack() as undo:
        address = places.addresses()[DEVICE]
        if way == PLUGGED:
            casemate("gpu", "bind", address)
            undo.callback(casemate, "gpu", "unbind", address)
            pod = Long("boots", options=options, more=UNTIL_PLUGGED)
        else:
            undo.callback(until_free, (DEVICE,))
            pod = Long("boots", address, options)
        undo.callback(pod.end)
        pod.sees()
        about = record(pod.name)
        spans = {span["name"]: span for span in casemate("trace", pod.name)["spans"]}
        began = "guest.resume" if way == PLUGGED else "guest.boot"
        ready_s = spans[began]["end_s"] - started_s(about["qemu_pid"])
        plugged_s = seen_s = 0.0
        if way == PLUGGED:
            start_s = time.monotonic()
            plug(about["qemu_pid"], address)
            plugged_s = time.monotonic() - start_s
            pod.sees()
            seen_s = time.monotonic() - start_s
        return Boot(way, ready_s, plugged_s, seen_s, pinned_bytes(about["qemu_pid"]))


def plug(pid: int, address: str) -> None:
    """A device that vfio-pci has, into the machine's last free port. Raises OSError, RuntimeError."""
    resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (node,) = (PCI / "devices" / address / "vfio-dev").iterdir()
    with Monitor() as monitor:
        monitor.hand_over("iommufd", Path("/dev/iommu"))
        monitor.hand_over("device", Path("/dev/vfio/devices") / node.name)
        monitor.ask("object-add", {"qom-type": "iommufd", "id": "plugged", "fd": "iommufd"})
        device = {"driver": "vfio-pci", "id": "late", "fd": "device", "iommufd": "plugged"}
        monitor.ask("device_add", device | {"bus": f"pci.{PORT_BUSES[-1]}"})


class Monitor:
    """Of the one QEMU that runs (qemu-qmp-ref(7)). Sockets of those that libvirt has asked are dead."""

    def __init__(self) -> None:
        for path in MAPS.glob("*.qmp"):
            self._connection = socket.socket(socket.AF_UNIX)
            try:
                self._connection.connect(str(path))
            except ConnectionRefusedError:
                self._connection.close()
            else:
                break
        self._lines = self._connection.makefile("r")
        self._lines.readline()  # its greeting
        self.ask("qmp_capabilities", {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._connection.close()

    def hand_over(self, name: str, path: Path) -> None:
        with path.open("r+b", buffering=0) as file:
            self.ask("getfd", {"fdname": name}, [file.fileno()])

    def ask(self, command: str, arguments: dict[str, Any], fds: Sequence[int] = ()) -> None:
        words = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._connection, [words], fds)
        while "return" not in (answer := json.loads(self._lines.readline())):
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")


def table(boots: Sequence[Boot]) -> Iterator[str]:
    """Medians of each way, as lines of Markdown."""
    yield "| | agent ready, s | device plugged, s | seen by the guest, s | whole, s | pinned, MiB |"
    yield "|---|---|---|---|---|---|"
    for way in MACHINES:
        alike = [each for each in boots if each.way == way]
        columns = zip(*((b.ready_s, b.plugged_s, b.seen_s, b.whole_s) for b in alike), strict=True)
        times = [f"{statistics.median(one):.1f}" for one in columns]
        pinned = statistics.median(each.pinned_bytes >> 20 for each in alike)
        yield f"| {way} | {' | '.join(times)} | {pinned:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-mib", type=int, default=512)
    arguments = parser.parse_args()
    boots = []
    more = {
        _profile(way): (f'hugepages = "{hugepages}"', f'template = "{template}"')
        for way, (hugepages, template) in MACHINES.items()
    }
    with machines(WRAPPER, more, arguments.memory_mib):
        subprocess.run(["casemate", "template", "build", "--profile", _profile(PLUGGED)], check=True)
        for number in range(1, arguments.rounds + 1):
            for way in MACHINES:
                boots.append(boot(way))
                print(f"{number}: {boots[-1]}", flush=True)
    tell(table(boots), arguments, [asdict(each) for each in boots])
    return 0


if __name__ == "__main__":
    sys.exit(main())
