"""Whether the guest's kernel has given a PCI function addresses for its memory: what has none is of no use to
any driver, and Linux leaves the function there all the same.

Must not know what the function is.
"""

from __future__ import annotations

import os
import re

from agent.files import read
from rpc.errors import FailedPrecondition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Of a function itself: what follows in `resource` is its ROM, its VFs' and a bridge's.
_BARS = 6
# include/linux/ioport.h. Ports are left out: they run out behind a few root ports, and no driver minds.
_MEMORY, _UNSET = 0x200, 0x2000_0000
# In drivers/pci/setup-res.c of Linux 6.12 "BAR 2 [mem size 0x20000000 64bit]: can't assign; no space", of 6.1
# "BAR 2: no space for [mem size 0x20000000 64bit]". Both say "failed to assign" and "assigned", too.
_SAID = re.compile(r"BAR (\d)\b.*\[mem\b")
_REFUSED = ("failed to assign", "can't assign", "no space")


def check(directory: str, words: Sequence[str], proc: str = "/proc") -> None:
    """Of the function of this directory of sysfs. words: what the kernel's log has of it, oldest first.

    Raises FailedPrecondition naming all that have none. One that the kernel has only begun to set up (it was
    plugged in while the guest ran) is not judged.
    """
    domain, bus, place = os.path.basename(directory).split(":")
    known = bus if int(domain, 16) == 0 else f"{domain}:{bus}"
    # Made once addresses have been given (pci_bus_add_device in drivers/pci/bus.c); sysfs is there before.
    if not os.path.exists(f"{proc}/bus/pci/{known}/{place}"):
        return
    try:
        lines = read(f"{directory}/resource").decode().splitlines()[:_BARS]
    except OSError:  # it has just gone, as whoever uses it next will say
        return
    refused = _refused(words)
    lacking = []
    for number, line in enumerate(lines):
        start, end, flags = (int(word, 16) for word in line.split())
        if flags & _MEMORY and (flags & _UNSET or not start):
            lacking.append(f"BAR {number} ({_size(end - start + 1)})")
        elif not flags and number in refused:  # older kernels forget it altogether
            lacking.append(f"BAR {number}")
    if lacking:
        raise FailedPrecondition(f"the guest's kernel has no room for {', '.join(lacking)}")


def _refused(words: Sequence[str]) -> set[int]:
    """BARs of memory of which the last that was said is that there is no room."""
    found: set[int] = set()
    for line in words:
        if said := _SAID.search(line):
            if any(refusal in line for refusal in _REFUSED):
                found.add(int(said[1]))
            else:
                found.discard(int(said[1]))
    return found


def _size(count: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >> shift:
            return f"{count >> shift} {unit}"
    return f"{count} bytes"
