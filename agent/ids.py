"""User and group IDs of a container with a user namespace, and what these are outside of it.

Knows how linux.uidMappings and gidMappings are said; must not know how a namespace is made.
"""

from __future__ import annotations

from rpc.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, TypeAlias

    # (inside, outside, how many)
    Mapping: TypeAlias = Sequence[tuple[int, int, int]]

MOST_LINES = 340  # user_namespaces(7)
_END = (1 << 32) - 1  # the last number is no ID


class Ids:
    """uids, gids: None where IDs are the same inside and outside."""

    __slots__ = ("gids", "uids")

    def __init__(self, uids: Mapping | None = None, gids: Mapping | None = None) -> None:
        self.uids = None if uids is None else sorted(uids)  # as the kernel shows more than five of them
        self.gids = None if gids is None else sorted(gids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ids) and (self.uids, self.gids) == (other.uids, other.gids)

    __hash__ = None  # type: ignore[assignment]

    def is_same(self) -> bool:
        return self.uids is None

    def uid_inside(self, uid: int) -> int | None:
        """None for one that has no place in it."""
        return _inside(self.uids, uid)

    def gid_inside(self, gid: int) -> int | None:
        return _inside(self.gids, gid)

    def uid_outside(self, uid: int) -> int | None:
        return _outside(self.uids, uid)

    def gid_outside(self, gid: int) -> int | None:
        return _outside(self.gids, gid)


def of_spec(spec: dict[str, Any]) -> Ids:
    """Of an OCI config.json. Raises InvalidArgument for a user namespace whose mappings are none."""
    linux = spec.get("linux") or {}
    if not any(entry.get("type") == "user" for entry in linux.get("namespaces") or ()):
        return Ids()
    uids, gids = (_mapping(linux.get(name), name) for name in ("uidMappings", "gidMappings"))
    return Ids(uids, gids)


def lines(mapping: Mapping) -> str:
    """As /proc/PID/uid_map takes it."""
    return "".join(f"{inside} {outside} {size}\n" for inside, outside, size in mapping)


def read_lines(text: str) -> Mapping:
    """What lines() has written, as the kernel shows it to the first user namespace."""
    return [
        (int(inside), int(outside), int(size)) for inside, outside, size in map(str.split, text.splitlines())
    ]


def _mapping(given: object, name: str) -> Mapping:
    if not isinstance(given, list) or not 0 < len(given) <= MOST_LINES:
        raise InvalidArgument(f"linux.{name} is not 1 to {MOST_LINES} mappings")
    found = []
    for entry in given:
        said = entry if isinstance(entry, dict) else {}
        inside, outside, size = (said.get(key, 0) for key in ("containerID", "hostID", "size"))
        numbers = isinstance(inside, int) and isinstance(outside, int) and isinstance(size, int)
        if not numbers or min(inside, outside, size - 1) < 0 or max(inside, outside, size) > _END:
            raise InvalidArgument(f"linux.{name}: {entry!r} is no mapping")
        found.append((inside, outside, size))
    return found


def _inside(mapping: Mapping | None, number: int) -> int | None:
    if mapping is None:
        return number
    found = (inside + number - outside for inside, outside, size in mapping if 0 <= number - outside < size)
    return next(found, None)


def _outside(mapping: Mapping | None, number: int) -> int | None:
    if mapping is None:
        return number
    found = (outside + number - inside for inside, outside, size in mapping if 0 <= number - inside < size)
    return next(found, None)
