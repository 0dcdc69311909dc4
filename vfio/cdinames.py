"""What the names of the Container Device Interface stand for on this host: nodes in /dev, by anybody's files.

Casemate's own files are cdi.py's; here are all that a client would look into, JSON or YAML (SPEC.md of
github.com/cncf-tags/container-device-interface). Of a file that is none no name is known, and why is said.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rpc.errors import FailedPrecondition

MOST_BYTES = 4 << 20  # of a file
MOST_FILES = 256  # of a directory
_SUFFIXES = (".json", ".yaml")


@dataclass(frozen=True, slots=True)
class Named:
    """nodes: of the host's, paths in /dev. file: which says so."""

    nodes: tuple[str, ...]
    file: str


class Names:
    """left_out: the files that no name is known of, and why."""

    def __init__(self, directories: Iterable[str]) -> None:
        """directories: of those that have a name, the last counts."""
        self.left_out: dict[str, str] = {}
        self._found: list[dict[str, list[Named]]] = [self._of(directory) for directory in directories]

    def get(self, name: str) -> Named | None:
        """name: VENDOR/CLASS=NAME. Raises FailedPrecondition for one that two files of a directory have, of
        which clients take neither."""
        for names in reversed(self._found):
            if found := names.get(name):
                if len(found) > 1:
                    files = ", ".join(each.file for each in found)
                    raise FailedPrecondition(f"the CDI name {name} is in several files: {files}")
                return found[0]
        return None

    def _of(self, directory: str) -> dict[str, list[Named]]:
        try:
            listed = sorted(name for name in os.listdir(directory) if name.endswith(_SUFFIXES))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found: dict[str, list[Named]] = {}
        for at, name in enumerate(listed):
            path = os.path.join(directory, name)
            if at >= MOST_FILES:
                self.left_out[path] = f"it is beyond {MOST_FILES} files"
                break
            try:
                for key, nodes in _read(path).items():
                    found.setdefault(key, []).append(Named(nodes, path))
            except (OSError, ValueError) as error:
                self.left_out[path] = error.strerror or "" if isinstance(error, OSError) else str(error)
        return found


def _read(path: str) -> dict[str, tuple[str, ...]]:
    """Raises OSError, and ValueError for what is no such file."""
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    spec = _mapping(_parsed(path, data), "it")
    kind = _text(spec, "kind")
    everybodys = _nodes(spec)
    found: dict[str, tuple[str, ...]] = {}
    for each in _list(spec, "devices"):
        device = _mapping(each, "a device")
        name = f"{kind}={_text(device, 'name')}"
        if name in found:
            raise ValueError(f"it has {name} twice")
        found[name] = tuple(dict.fromkeys((*everybodys, *_nodes(device))))
    return found


def _parsed(path: str, data: bytes) -> object:
    try:
        if path.endswith(".json"):
            return json.loads(data)
        import yaml  # type: ignore[import-untyped]  # a pod whose kubelet has nothing for it does without

        try:
            return yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise ValueError(f"it is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _nodes(holder: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the host's: a node may have another path in the container."""
    edits = holder.get("containerEdits")
    nodes = [] if edits is None else _list(_mapping(edits, "containerEdits"), "deviceNodes")
    found = []
    for each in nodes:
        node = _mapping(each, "a node")
        found.append(_text(node, "hostPath") if node.get("hostPath") else _text(node, "path"))
    return tuple(found)


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    return value


def _list(holder: Mapping[str, Any], name: str) -> list[Any]:
    value = holder.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value


def _text(holder: Mapping[str, Any], name: str) -> str:
    value = holder.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is no text")
    return value
