"""What this process has loaded, and whether it is still what lies on disk.

A process that lives long forks shims of the code that was there when it began. It must not go on once a
package was replaced: a shim of yesterday's code would run today's QEMU driver. It must not know which
packages matter; all that is loaded does.
"""

import os
import sys
import time

# A file that was changed this shortly before it was loaded may be changed again with the same times.
RACY_S = 0.1

# The exit status of a process that is to be begun anew (EX_TEMPFAIL of sysexits.h).
STALE = 75

Stamp = tuple[int, int, int, int]


class Loaded:
    """The files behind our modules and mapped libraries, the Python itself among them, as they were."""

    def __init__(self, begun_s: float) -> None:
        """begun_s: time.time() when loading began. Raises StaleError where a file was changed since."""
        self._stamps = {path: _stamp(path) for path in sorted(_module_files() | _mapped_files())}
        newest_ns = (begun_s - RACY_S) * 1e9
        for path in self._stamps:
            if os.stat(path).st_ctime_ns > newest_ns:
                raise StaleError(path)

    def changed(self) -> str:
        """A file that is not what was loaded; empty if there is none."""
        for path, stamp in self._stamps.items():
            try:
                if _stamp(path) != stamp:
                    return path
            except OSError:
                return path
        return ""


class StaleError(Exception):
    """A file was changed while it was loaded: the process has to begin anew."""


def _stamp(path: str) -> Stamp:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _module_files() -> set[str]:
    found = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return {os.path.abspath(path) for path in found if isinstance(path, str)}


def _mapped_files() -> set[str]:
    """proc(5), /proc/PID/maps: the sixth field. Raises StaleError for one that is deleted already."""
    found = set()
    with open("/proc/self/maps") as file:
        for line in file:
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if path and path[0].startswith("/"):
                if path[0].endswith(" (deleted)"):
                    raise StaleError(path[0])
                found.add(path[0])
    return found


def wait_s(begun_s: float) -> float:
    """How long to wait before a process that found itself stale should begin anew."""
    return max(begun_s + 2 * RACY_S - time.time(), RACY_S)
