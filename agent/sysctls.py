"""Kernel parameters of the guest's own namespaces: net.* of a container's linux.sysctl, and all of a pod's.

crun sets them only in namespaces that it makes. A pod's containers have no network of their own: the guest's
is the pod's, and so is its kernel. Knows kernel parameters and their files; must not know a container's life.
"""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager

from agent.files import read
from rpc.errors import FailedPrecondition, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Json = dict[str, Any]

ROOT = "/proc/sys"
MAX_VALUE_BYTES = 4096
_log = logging.getLogger("casemate.agent")
_PREFIX = re.compile(r"net[./]")
_SEPARATOR = re.compile(r"[./]")


def take_network(spec: Json) -> dict[str, str]:
    """Takes net.* out of an OCI config.json whose container stays in the guest's network; {} if it does not.

    Raises InvalidArgument for what the OCI runtime specification does not allow there.
    """
    linux = spec.get("linux") or {}
    sysctl = linux.get("sysctl") or {}
    namespaces = linux.get("namespaces") or []
    if not isinstance(sysctl, dict) or not all(isinstance(value, str) for value in sysctl.values()):
        raise InvalidArgument("linux.sysctl is not a table of texts")
    if any(entry.get("type") == "network" for entry in namespaces):
        return {}
    network = {name: value for name, value in sysctl.items() if _PREFIX.match(name)}
    if network:
        linux["sysctl"] = {name: value for name, value in sysctl.items() if name not in network}
    return network


@contextmanager
def all_set(wanted: dict[str, str], root: str | None, *, shared: bool) -> Iterator[None]:
    """Sets them, and puts the former values back if the block raises.

    root: where the parameters' files are, None where the kernel is not ours to change. shared: other
    containers are in it, so it has to be as wanted already. Raises FailedPrecondition for either,
    InvalidArgument for a name or a value that the kernel does not take.
    """
    former: list[tuple[str, str, str]] = []
    try:
        for name, value in wanted.items():
            if root is None:
                raise FailedPrecondition(f"sysctl {name}: this agent does not own its kernel")
            path = f"{root}/{_relative(name)}"
            before = _read(name, path)
            if before.split() == value.split():
                continue
            if shared:
                raise FailedPrecondition(
                    f"sysctl {name}: the containers of a pod share one network, where it is "
                    f"{before.strip()!r}, not {value!r}",
                    hint="set it in the pod's first container (Kubernetes: the pod's securityContext)",
                )
            former.append((name, path, before))
            _write(name, path, value)
        yield
    except BaseException:
        for name, path, before in reversed(former):
            try:
                _write(name, path, before)
            except InvalidArgument as error:  # the one that is under way is to be told
                _log.warning("not put back: %s", error)
        raise


def _relative(name: str) -> str:
    """As sysctl(8): where the first separator is a dot, the others separate, and slashes stand for dots."""
    first = _SEPARATOR.search(name)
    if first is not None and first[0] == ".":
        name = name.translate(str.maketrans("./", "/."))
    if not {"", ".", ".."}.isdisjoint(name.split("/")) or not name.isprintable():
        raise InvalidArgument(f"{name!r} is no sysctl's name")
    return name


def _read(name: str, path: str) -> str:
    try:
        return read(path, MAX_VALUE_BYTES).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidArgument(f"sysctl {name}: the guest's kernel has none of this name") from None
    except OSError as error:
        raise InvalidArgument(f"sysctl {name}: {error.strerror}") from None


def _write(name: str, path: str, value: str) -> None:
    try:
        with open(path, "wb", buffering=0) as file:  # the kernel takes a value in one write
            file.write(value.encode(errors="replace"))
    except OSError as error:
        raise InvalidArgument(
            f"sysctl {name}: the kernel does not take {value!r}: {error.strerror}"
        ) from None
