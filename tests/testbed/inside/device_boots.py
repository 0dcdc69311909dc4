"""Run in the bed by device_boots.sh and, in part, by device_pods.py: what devices cost a boot.

Pods of one machine with more or fewer devices, by each way of VFIO's, in turns. QEMU says what it maps for
DMA (-d trace), the kernel what it keeps in its place for it, casemate when the agent was ready.
"""

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from shim.vm.passthrough import IOMMUFD, LEGACY
from tests.testbed.inside import places
from tests.testbed.inside.given import SEEN, Long, casemate, record, until_free
from tests.testbed.inside.numa_pods import PAGE_MIB, huge_pages

PROFILE = "boots"
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
    """access: the way of VFIO's, "" without devices. huge: whether RAM is of huge pages."""

    devices: int
    access: str
    huge: bool = False


@dataclass(frozen=True, slots=True)
class Boot:
    """ready_s: from QEMU's start to an agent that answered; create_s of it, until QEMU answers libvirt.

    ram_maps: of the guest's RAM. all_maps: those of BARs, too, which the other devices may then reach.
    pinned_bytes: what the kernel keeps in its place of QEMU's memory.
    """

    shape: Shape
    access: str
    page_bytes: int
    ready_s: float
    create_s: float
    ram_maps: int
    all_maps: int
    pinned_bytes: int
    memory_bytes: int


@contextmanager
def machines(wrapper: str, profiles: Mapping[str, Sequence[str]], memory_mib: int) -> Iterator[None]:
    """Pods may ask for machines of these profiles, whose QEMU is run by that script. profiles: more lines."""
    MAPS.mkdir()
    MAPS.chmod(0o777)
    TELLING.write_text(wrapper)
    TELLING.chmod(0o755)
    lines = [f'qemu = "{TELLING}"', f'qemu_paths = ["{MAPS}"]']
    for name, more in profiles.items():
        lines += [f"[profiles.{name}]", f'memory = "{memory_mib}MiB"', 'image = "cloud"', *more]
    SETTINGS.write_text("\n".join([*lines, ""]))
    try:
        with huge_pages(0, each=memory_mib // PAGE_MIB):
            yield
    finally:
        SETTINGS.unlink()


def profile(memory_mib: int) -> AbstractContextManager[None]:
    """QEMU tells what it maps."""
    pages = {False: "never", True: "required"}
    more = {
        _profile(huge=huge): (f'hugepages = "{word}"', 'template = "off"') for huge, word in pages.items()
    }
    return machines(WRAPPER, more, memory_mib)


def _profile(*, huge: bool) -> str:
    return f"{PROFILE}-{'huge' if huge else 'ordinary'}"


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


def boot(shape: Shape) -> Boot:
    for path in MAPS.iterdir():
        path.unlink()
    names, where = DEVICES[shape.devices], places.addresses()
    with ExitStack() as undo:
        undo.callback(until_free, names)
        undo.enter_context(by(shape.access))
        wish = ",".join(where[name] for name in names)
        pod = Long("boots", wish, ("--annotation", f"dev.casemate.profile={_profile(huge=shape.huge)}"))
        undo.callback(pod.end)
        pod.sees()
        about = record(pod.name)
        spans = {span["name"]: span for span in casemate("trace", pod.name)["spans"]}
        maps = list(_maps(shape.access)) if shape.access else []
        return Boot(
            shape,
            about["device_access"],
            about["hugepage_bytes"],
            spans["guest.boot"]["end_s"] - started_s(about["qemu_pid"]),
            spans["libvirt.create"]["end_s"] - started_s(about["qemu_pid"]),
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


def shapes(devices: Iterable[int], accesses: Sequence[str]) -> Iterator[Shape]:
    for count, access, huge in product(devices, accesses, (False, True)):
        if count:
            yield Shape(count, access, huge)
        elif (access, huge) == (accesses[0], False):  # pages are huge for devices alone
            yield Shape(0, "")


def table(boots: Sequence[Boot]) -> Iterator[str]:
    """Medians of each shape, as lines of Markdown."""
    yield "| devices | way | pages | ready, s | of it QEMU, s | maps of RAM | of BARs, too | pinned, MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for shape in dict.fromkeys(each.shape for each in boots):
        alike = [each for each in boots if each.shape == shape]
        times = [
            statistics.median(one) for one in zip(*((b.ready_s, b.create_s) for b in alike), strict=True)
        ]
        counts = zip(*((b.ram_maps, b.all_maps, b.pinned_bytes >> 20) for b in alike), strict=True)
        words = [*(f"{time:.1f}" for time in times), *(_range(one) for one in counts)]
        yield f"| {' | '.join((str(shape.devices), shape.access or '-', _size(shape), *words))} |"


def _size(shape: Shape) -> str:
    return "2 MiB" if shape.huge else "4 KiB"


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def tell(lines: Iterable[str], arguments: argparse.Namespace, boots: Sequence[Mapping[str, object]]) -> None:
    """The table, and each boot for who has a share."""
    print(*lines, f"n = {arguments.rounds}, {arguments.memory_mib} MiB", sep="\n")
    if SEEN.parent.is_mount():
        SEEN.write_text(json.dumps(boots))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--access", nargs="+", default=[IOMMUFD, LEGACY], choices=[IOMMUFD, LEGACY])
    parser.add_argument("--memory-mib", type=int, default=512)
    arguments = parser.parse_args()
    boots = []
    with profile(arguments.memory_mib):
        for number in range(1, arguments.rounds + 1):
            for shape in shapes(arguments.devices, arguments.access):
                boots.append(boot(shape))
                print(f"{number}: {boots[-1]}", flush=True)
    tell(table(boots), arguments, [asdict(each) for each in boots])
    return 0


if __name__ == "__main__":
    sys.exit(main())
