"""The hooks that are to be run when a container is gone, written down so that they are, and once.

Whoever is about to run them says so first: what is killed in the middle of it does not begin anew. For the
shim, and for what cleans up after it. It must not know what hooks do.
"""

import fcntl
import json
from collections.abc import Iterable
from contextlib import suppress

from rpc.errors import DataLoss
from shim import hookrun, system
from shim.journal import Entry, Journal, Kind, read_journal
from shim.oci import Document, Hook

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path


def owe(journal: Journal, hooks: Iterable[Hook], state: Document) -> None:
    """Before anything is done that they undo. Raises OSError: then nothing must be."""
    listed = [
        {"path": hook.path, "args": hook.args, "env": hook.env, "timeout_s": hook.timeout_s} for hook in hooks
    ]
    journal.add(Entry(Kind.POSTSTOP, json.dumps({"hooks": listed, "state": state})))


def begin(journal: Journal, container_id: str) -> None:
    """Also on a full file system: that they might be run twice is better than that they are not."""
    try:
        journal.add(Entry(Kind.POSTSTOP_BEGUN, container_id))
    except OSError as error:
        if not system.is_no_space(error):
            raise


def run_owed(path: "Path") -> list[str]:
    """Those that a killed shim still owed, in the calling process's namespaces. Returns what was run, or why
    not, a line each; beside another that does the same.
    """
    lines = []
    for hooks, state in _take(path):
        for outcome in hookrun.run_all(hooks, state, go_on=True):
            how = f" failed: {outcome.failure}: {outcome.words}" if outcome.failure else ""
            lines.append(f"what poststop hook {outcome.path} of {state['id']} undoes{how}")
    return lines


def _take(path: "Path") -> list[tuple[list[Hook], Document]]:
    """What is owed, and from now on no more."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        owed: dict[str, tuple[list[Hook], Document]] = {}
        for entry in read_journal(path):
            if entry.kind is Kind.POSTSTOP:
                hooks, state = _parse(path, entry.value)
                owed[str(state["id"])] = hooks, state
            elif entry.kind is Kind.POSTSTOP_BEGUN:
                owed.pop(entry.value, None)
        if owed:
            journal = Journal(path)
            for container_id in owed:
                begin(journal, container_id)
            journal.close()
        return list(owed.values())
    return []


def _parse(path: "Path", value: str) -> tuple[list[Hook], Document]:
    try:
        words = json.loads(value)
        hooks = [
            Hook(hook["path"], tuple(hook["args"]), dict(hook["env"]), int(hook["timeout_s"]))
            for hook in words["hooks"]
        ]
        state = words["state"]
        state["id"], state["bundle"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"{path}: poststop hooks cannot be read", details=str(error)) from error
    return hooks, state
