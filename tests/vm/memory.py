"""What lies in the memory of a host's processes, guests' RAM included: a search from outside.

It sees what no program in a guest could look for without bringing it along: free pages, the guest's page
cache, QEMU's own heap. It must not know what is looked for, nor why.
"""

import errno
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from shim.vm.ram import extents

PAGE = os.sysconf("SC_PAGESIZE")
PIECE_PAGES = 2048
OVERLAP = 128
"""Bytes that two pieces of one stretch of pages have in common: no match may be longer."""
THERE = 3 << 62
"""Of an entry of /proc/PID/pagemap: the page is in memory, or swapped out (proc(5))."""


def found_in(pids: Iterable[int], pattern: re.Pattern[bytes]) -> set[bytes]:
    """What matches in all memory that these processes may write to. One that has ended has none."""
    found: set[bytes] = set()
    for pid in pids:
        try:
            for piece in _written(pid):
                found.update(pattern.findall(piece))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _written(pid: int) -> Iterator[bytes]:
    proc = Path(f"/proc/{pid}")
    for line in (proc / "maps").read_text().splitlines():
        addresses, rights, *_ = line.split()
        start, end = (int(word, 16) for word in addresses.split("-"))
        if rights.startswith("rw") and rights[3] == "s" and "/" in line:
            yield from _of_file(proc / "map_files" / addresses)
        elif rights.startswith("rw"):
            yield from _of_process(proc, start, end)


def _of_file(path: Path) -> Iterator[bytes]:
    """A file that is mapped to be shared: all that it has, also what nobody has touched yet."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # a device, which has no content of its own
    try:
        for start, end in extents(fd):
            for offset in range(start, end, PIECE_PAGES * PAGE):
                yield os.pread(fd, min(PIECE_PAGES * PAGE, end - offset) + OVERLAP, offset)
    finally:
        os.close(fd)


def _of_process(proc: Path, start: int, end: int) -> Iterator[bytes]:
    """The pages that are there: reading others would bring them into being."""
    with (
        open(proc / "pagemap", "rb", buffering=0) as pagemap,
        open(proc / "mem", "rb", buffering=0) as memory,
    ):
        first, last = start // PAGE, end // PAGE
        for page in range(first, last, PIECE_PAGES):
            pagemap.seek(page * 8)
            entries = array("Q", pagemap.read(min(PIECE_PAGES, last - page) * 8))
            for begin, stop in _runs(entries):
                memory.seek((page + begin) * PAGE)
                try:
                    yield memory.read((stop - begin) * PAGE)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise  # else it was unmapped since


def _runs(entries: "array[int]") -> Iterator[tuple[int, int]]:
    """Neighbours that are there."""
    begin = None
    for number, entry in enumerate(entries):
        if entry & THERE and begin is None:
            begin = number
        elif not entry & THERE and begin is not None:
            yield begin, number
            begin = None
    if begin is not None:
        yield begin, len(entries)
