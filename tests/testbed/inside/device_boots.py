"""Run in the bed by device_boots.sh and, in part, by device_pods.py: what devices cost a boot.

Pods of one machine with more or fewer devices, by each way of VFIO's, in turns. QEMU says what it maps for
DMA (-d trace), the kernel what it keeps in its place for it, casemate when the agent was ready.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from shim.vm.passthrough import IOMMUFD, LEGACY
from tests.testbed.inside import places
from tests.testbed.inside.given import SEEN, Long, casemate, record, until_free
from tests.testbed.inside.numa_pods import PAGE_MIB, huge_pages

PROFILE, BOOTED, RESTORED = "boots", "booted", "restored"
MADE_S = 600.0
SETTINGS = Path("/etc/casemate/config.d/zz-device-boots.toml")
QEMU, TELLING = "/usr/bin/qemu-system-x86_64", Path("/run/device-boots-qemu")
MAPS = Path("/tmp/device-boots")
IOMMU, AWAY = Path("/dev/iommu"), Path("/dev/iommu.away")
# What libvirt asks of QEMU beforehand is told, too: a file for each process.
WRAPPER = f"""\
#!/bin/sh
exec {QEMU} -d trace:iommufd_backend_map*,trace:vfio_listener_region_add_ram -D {MAPS}/%d.log "$@"
"""
# Of IOMMUFD, each that the kernel did; of type 1, what the one container of all groups was told to map.
EVENTS = {
    IOMMUFD: re.compile(r"iommufd_backend_map(?:_file)?_dma .* iova=(0x[0-9a-f]+) .* \(0\)"),
    LEGACY: re.compile(r"vfio_listener_region_add_ram .*\[ram\] (0x[0-9a-f]+) - "),
}
# All of one NUMA node, so that the machine is the same.
DEVICES = {0: (), 1: ("gpu0",), 2: ("gpu0", "gpu1"), 4: ("gpu0", "gpu1", "nvme0", "nic0")}


@dataclass(frozen=True, slots=True)
class Shape:
    """access: the way of VFIO's, "" without devices. huge: whether RAM is of huge pages. restored: from a
    template, its devices plugged in then.
    """

    devices: int
    access: str
    huge: bool = False
    restored: bool = False


@dataclass(frozen=True, slots=True)
class Boot:
    """ready_s: from QEMU's start to an agent that answered; create_s of it, until QEMU answers libvirt, and
    devices_s beyond it, until all devices are up.

    ram_maps: of the guest's RAM. all_maps: those of BARs, too, which the other devices may then reach.
    pinned_bytes: what the kernel keeps in its place of QEMU's memory.
    """

    shape: Shape
    access: str
    page_bytes: int
    ready_s: float
    create_s: float
    devices_s: float
    ram_maps: int
    all_maps: int
    pinned_bytes: int
    memory_bytes: int


@contextmanager
def profile(memory_mib: int) -> Iterator[None]:
    """Pods may ask for machines whose QEMU tells what it maps."""
    MAPS.mkdir()
    MAPS.chmod(0o777)
    TELLING.write_text(WRAPPER)
    TELLING.chmod(0o755)
    lines = [f'qemu = "{TELLING}"', f'qemu_paths = ["{MAPS}"]']
    for huge, restored in product((False, True), (False, True)):
        lines += [f"[profiles.{_profile(huge=huge, restored=restored)}]"]
        lines += [f'memory = "{memory_mib}MiB"', 'image = "cloud"']
        lines += [f'hugepages = "{"required" if huge else "never"}"']
        lines += [f'template = "{"shared" if restored else "off"}"']
    SETTINGS.write_text("\n".join([*lines, ""]))
    try:
        with huge_pages(0, each=memory_mib // PAGE_MIB):
            yield
    finally:
        SETTINGS.unlink()
        shutil.rmtree(MAPS)


def _profile(*, huge: bool, restored: bool) -> str:
    return f"{PROFILE}-{'huge' if huge else 'ordinary'}-{'restored' if restored else 'booted'}"


@contextmanager
def by(access: str) -> Iterator[None]:
    """A host that has IOMMUFD, or has not."""
    if access != LEGACY:
        yield
        return
    IOMMU.rename(AWAY)
    try:
        yield
    finally:
        AWAY.rename(IOMMU)


def _pod(shape: Shape, where: Mapping[str, str]) -> Long:
    wish = ",".join(where[name] for name in DEVICES[shape.devices])
    return Long("boots", wish, profile_of(shape))


def profile_of(shape: Shape) -> tuple[str, ...]:
    """Options of ctr's."""
    name = _profile(huge=shape.huge, restored=shape.restored)
    return ("--annotation", f"dev.casemate.profile={name}")


def have_a_template(shape: Shape) -> None:
    """The first pod of a shape boots, and has a template made; of shapes whose machines are the same there is
    one. A bounded poll: nobody tells when it is there."""
    before, end = _templates(), time.monotonic() + MADE_S
    pod = _pod(shape, places.addresses())
    try:
        pod.sees()
        while record(pod.name)["source"] == "boot" and _templates() == before and time.monotonic() < end:
            time.sleep(0.5)
    finally:
        pod.end()
        until_free(DEVICES[shape.devices])


def _templates() -> set[str]:
    return {each["key"] for each in casemate("template", "list")}


def boot(shape: Shape) -> Boot:
    for path in MAPS.iterdir():
        path.unlink()
    names, where = DEVICES[shape.devices], places.addresses()
    with ExitStack() as undo:
        undo.callback(until_free, names)
        undo.enter_context(by(shape.access))
        pod = _pod(shape, where)
        undo.callback(pod.end)
        pod.sees()
        about = record(pod.name)
        spans = {span["name"]: span for span in casemate("trace", pod.name)["spans"]}
        maps = list(_maps(shape.access)) if shape.access else []
        ready_s = spans["guest.resume" if shape.restored else "guest.boot"]["end_s"]
        return Boot(
            shape,
            about["device_access"],
            about["hugepage_bytes"],
            ready_s - started_s(about["qemu_pid"]),
            spans["libvirt.create"]["end_s"] - started_s(about["qemu_pid"]),
            spans["devices.ready"]["end_s"] - ready_s if shape.devices else 0.0,
            sum(at < about["memory_bytes"] for at in maps),  # all of it is below BARs
            len(maps),
            pinned_bytes(about["qemu_pid"]),
            about["memory_bytes"],
        )


def _maps(access: str) -> Iterator[int]:
    """The guest's address of each."""
    for path in MAPS.iterdir():
        for found in EVENTS[access].finditer(path.read_text()):
            yield int(found[1], 16)


def pinned_bytes(pid: int) -> int:
    """Type 1 counts them as locked, IOMMUFD as pinned, and by default as locked, too."""
    status = Path(f"/proc/{pid}/status").read_text()
    return max(int(kib) << 10 for kib in re.findall(r"Vm(?:Lck|Pin):\s+(\d+) kB", status))


def started_s(pid: int) -> float:
    """By the clock of a trace: nothing here is ever suspended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def shapes(devices: Iterable[int], accesses: Sequence[str], ways: Sequence[str]) -> Iterator[Shape]:
    restored = [way == RESTORED for way in ways]
    for count, access, huge, again in product(devices, accesses, (False, True), restored):
        if count:
            yield Shape(count, access, huge, again)
        elif (access, huge) == (accesses[0], False):  # pages are huge for devices alone
            yield Shape(0, "", restored=again)


def table(boots: Sequence[Boot]) -> Iterator[str]:
    """Medians of each shape, as lines of Markdown."""
    yield (
        "| devices | machine | way | pages | ready, s | of it QEMU, s | devices, s "
        "| maps of RAM | of BARs, too | pinned, MiB |"
    )
    yield "|---" * 10 + "|"
    for shape in dict.fromkeys(each.shape for each in boots):
        alike = [each for each in boots if each.shape == shape]
        times = [
            statistics.median(one)
            for one in zip(*((b.ready_s, b.create_s, b.devices_s) for b in alike), strict=True)
        ]
        counts = zip(*((b.ram_maps, b.all_maps, b.pinned_bytes >> 20) for b in alike), strict=True)
        words = [*(f"{time:.1f}" for time in times), *(_range(one) for one in counts)]
        way = RESTORED if shape.restored else BOOTED
        yield f"| {' | '.join((str(shape.devices), way, shape.access or '-', _size(shape), *words))} |"


def _size(shape: Shape) -> str:
    return "2 MiB" if shape.huge else "4 KiB"


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--access", nargs="+", default=[IOMMUFD, LEGACY], choices=[IOMMUFD, LEGACY])
    parser.add_argument("--ways", nargs="+", default=[BOOTED, RESTORED], choices=[BOOTED, RESTORED])
    parser.add_argument("--memory-mib", type=int, default=512)
    arguments = parser.parse_args()
    boots = []
    wanted = list(shapes(arguments.devices, arguments.access, arguments.ways))
    with profile(arguments.memory_mib):
        for shape in (each for each in wanted if each.restored):
            have_a_template(shape)
        for number in range(1, arguments.rounds + 1):
            for shape in wanted:
                boots.append(boot(shape))
                print(f"{number}: {boots[-1]}", flush=True)
    print(*table(boots), f"n = {arguments.rounds}, {arguments.memory_mib} MiB", sep="\n")
    if SEEN.parent.is_mount():
        SEEN.write_text(json.dumps([asdict(each) for each in boots]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
