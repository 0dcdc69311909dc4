"""The host's devices in a machine that is restored: which can be plugged in, and what its RAM is then.

The template of such a machine has its root ports, and nothing behind them: QEMU can save no device of the
host's. It must not know whose they are.
"""

import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shim import phases
from shim.trace import Trace
from shim.vm import passthrough, ram, slots
from shim.vm.backing import Backing, Cell
from shim.vm.blame import TemplateUnusable
from shim.vm.passthrough import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.vm.setting import MachineRequest, Setting

# What the kernel keeps for each page, 64 bytes of 4096, is in a template and copied: beyond this that likely
# takes longer than a boot, which makes it by several CPUs at once. Computed, not measured.
MOST_MEMORY_BYTES = 16 << 30
log = logging.getLogger("casemate")
LEAST_WINDOW_BYTES = 2 << 20  # Linux' own (pci=hpmmiosize of kernel-parameters.txt)
MEMFD = "/memfd:memory-backend-memfd"  # what QEMU calls RAM of huge pages (backends/hostmem-memfd.c)


def windows(functions: Sequence[Function]) -> tuple[int, int]:
    """How much room the guest's kernel is to leave behind each of its ports, in bytes: below 4 GiB, and
    beyond for what can be prefetched. Where it is not asked to, it leaves 2 MiB of each: all that there is
    for a device that comes later by ACPI, as QEMU's do (acpiphp moves no window)."""
    low = max(each.low_bytes for each in functions)
    high = max(each.bar_bytes for each in functions)
    return _window(low), _window(high)


def _window(size_bytes: int) -> int:
    """A power of two: room for the largest BAR where its size has it, and for the others beside it."""
    return max(LEAST_WINDOW_BYTES, 1 << (size_bytes - 1).bit_length() if size_bytes else 0)


def hole_bytes(functions: Sequence[Function], ports: int) -> int:
    """Of guest addresses for these windows, each aligned to its size; a power of two."""
    wanted = 2 * ports * windows(functions)[1]
    return max(passthrough.LEAST_HOLE_BYTES, 1 << (wanted - 1).bit_length())


def has_to_boot(request: "MachineRequest") -> bool:
    why = why_booted(request.functions, request.backing, request.profile.memory_bytes)
    if why:
        log.info("the machine is booted, not restored: %s", why)
    return bool(why)


def why_booted(functions: Sequence[Function], backing: Backing | None, memory_bytes: int) -> str:
    """Why a machine with these is booted though there may be a template; "" if it need not be."""
    if any(each.several for each in functions):
        return "a card of several functions is plugged in one by one"
    if backing is not None and len(backing.cells) > 1:
        return "its RAM is of several NUMA nodes"
    if memory_bytes > MOST_MEMORY_BYTES:
        return f"more than {MOST_MEMORY_BYTES >> 30} GiB of RAM are ready sooner"
    return ""


def make_reachable(setting: "Setting") -> None:
    """The devices, for QEMU, in this mount namespace. libvirt is loaded: the way to them depends on it.

    Raises as passthrough.prepare()."""
    access, request = setting.access, setting.request
    assert access is not None
    log.info("the host's devices are passed by %s", access)
    passthrough.prepare(
        request.functions,
        access,
        setting.user.uid,
        request.profile.memory_bytes,
        huge_pages=setting.page_bytes > 0,
    )


def plug(setting: "Setting", trace: Trace) -> None:
    """Into a machine that is restored and does not run yet. In a thread: libvirt's calls block. Raises
    Unavailable."""
    from shim.vm.designer import LAST_BUS  # which has windows() of this

    request, access = setting.request, setting.access
    places = slots.layout(request.functions, request.backing, LAST_BUS)
    iommufd = access is not None and access.is_iommufd
    with trace.span(phases.DEVICES_PLUG, phases.POD_READY, str(request.backing or "")):
        for each in slots.host_devices(request.functions, places, iommufd=iommufd):
            setting.host.attach(each.xml())


@contextmanager
def _pages(pid: int, size_bytes: int) -> "Iterator[mmap.mmap]":
    """The RAM of a QEMU that has it in huge pages. Raises TemplateUnusable, OSError."""
    directory = Path(f"/proc/{pid}/fd")
    found = [each for each in directory.iterdir() if _target(each).startswith(MEMFD)]
    sizes = [each.stat().st_size for each in found]
    if sizes != [size_bytes]:
        raise TemplateUnusable("QEMU keeps a guest's RAM elsewhere", f"{sizes}, expected {size_bytes} bytes")
    fd = os.open(found[0], os.O_RDWR | os.O_CLOEXEC)
    try:
        with mmap.mmap(fd, size_bytes) as pages:
            yield pages
    finally:
        os.close(fd)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # closed while we looked
        return ""


def fill_pages(source: int, pid: int, size_bytes: int) -> None:
    """Copies a template's RAM into huge pages, which no system call writes to. Raises as _pages()."""
    if (found := os.fstat(source).st_size) != size_bytes:
        raise OSError(f"the template's RAM has {found} bytes, expected {size_bytes}")
    with _pages(pid, size_bytes) as pages, memoryview(pages) as whole:
        for start, end in ram.extents(source):
            while start < end:
                with whole[start : min(end, start + ram.COPY_BYTES)] as part:
                    copied = os.preadv(source, [part], start)
                if copied == 0:
                    raise OSError(f"the template's RAM ended at {start}, expected {end}")
                start += copied


def as_json(functions: Sequence[Function], backing: Backing | None) -> "dict[str, Any]":
    """For another process that makes a template of such a machine's shape."""
    from dataclasses import asdict

    return {
        "functions": [asdict(each) for each in functions],
        "backing": None if backing is None else asdict(backing),
    }


def from_json(told: "dict[str, Any]") -> tuple[tuple[Function, ...], Backing | None]:
    backing = None
    if (of := told["backing"]) is not None:
        cells = tuple(Cell(**cell | {"cpus": tuple(cell["cpus"])}) for cell in of["cells"])
        backing = Backing(of["page_bytes"], of["why"], cells)
    functions = (Function(**each | {"ips": tuple(each["ips"])}) for each in told["functions"])
    return tuple(functions), backing
