"""Whether the guest's kernel has the file systems that a container wants mounted: crun says "No such device".

Must not know which of them a container may have: the shim refuses what is not a kernel's own (shim/spec.py).
"""

from __future__ import annotations

from agent.files import read
from rpc.errors import Unimplemented

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Every guest's kernel has these, or crun has its own way of making them (cgroup: what there is of cgroup2).
_USUAL = frozenset(("bind", "none", "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"))


def check(spec: dict[str, Any], known: str = "/proc/filesystems") -> None:
    """Raises Unimplemented for a mount of a type that the kernel does not know (filesystems(5))."""
    for mount in spec.get("mounts") or ():
        kind = mount.get("type") or "none"
        if kind in _USUAL or not {"bind", "rbind"}.isdisjoint(mount.get("options") or ()):
            continue
        if kind not in (line.split()[-1].decode() for line in read(known).splitlines()):
            raise Unimplemented(
                f"mount {mount.get('destination')}: type {kind!r}: the guest's kernel has no such file system"
            )
