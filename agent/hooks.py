"""A container's hooks that run in the guest: whether their programs are there, and what they have said.

crun runs them: those of createContainer as the guest's programs in the container's namespaces, those of
startContainer as the container's own. Must not know of RPC types.
"""

from __future__ import annotations

import os

from agent import executables
from agent.files import read
from rpc.errors import CasemateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Json = dict[str, Any]

MOST_WORDS_BYTES = 4096
_STREAMS = ("run.oci.hooks.stdout", "run.oci.hooks.stderr")  # crun(1); else they write to the container's
_PLACES = {
    "createContainer": ("the guest image", "programs of the host's are for prestart and createRuntime hooks"),
    "startContainer": ("the container's root", None),
}


def keep_words(spec: Json, path: str) -> None:
    """What the spec's hooks write goes to this file."""
    if spec.get("hooks"):
        spec["annotations"] = {**(spec.get("annotations") or {}), **dict.fromkeys(_STREAMS, path)}


def words(path: str) -> str:
    """The beginning of what hooks wrote there; empty if nothing."""
    try:
        return read(path, MOST_WORDS_BYTES).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def check(spec: Json, kind: str, root: str) -> None:
    """Raises why a hook's program cannot be executed in this root directory, naming both."""
    place, hint = _PLACES[kind]
    for hook in (spec.get("hooks") or {}).get(kind) or ():
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            executables.check(fd, executables.Command(hook["path"]))
        except CasemateError as error:
            raise type(error)(f"{kind} hook {hook['path']} in {place}", str(error), hint) from error
        finally:
            os.close(fd)
