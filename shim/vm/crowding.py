"""How much more a host has to do than it can: what a short time limit has to be multiplied by.

A limit that tells a machine which hangs from one that works is right for a host with processors to spare.
With 32 starts at once it took restored guests for broken that had only not had their turn, and booted them
instead, which is many times the work.
"""

import os
from pathlib import Path

LOADAVG = Path("/proc/loadavg")
MOST = 10.0
"""A guest that hangs has to be found out in the end on every host."""


def crowding(loadavg: Path = LOADAVG, cpus: int | None = None) -> float:
    """Processes that want a processor, for each that there is: now or of late (proc(5)); from 1 to MOST."""
    words = loadavg.read_text().split()
    wanting = max(float(words[0]), int(words[3].partition("/")[0]))
    return min(max(wanting / (cpus or os.cpu_count() or 1), 1.0), MOST)
