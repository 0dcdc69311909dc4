"""Once a minute casemated has the ledger know that pods still have what they have (Ledger.still_held).

So a power cut takes at most a minute of what is counted for them. Once for the node, as a pod that merely
runs is woken by nobody: neither its shim nor its guest knows of this.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from config.places import LEDGER_FILE
from node.loaded import RACY_S
from rpc.errors import CasemateError

EVERY_S = 60.0

# Of each file that the database has: when it was last changed, and its size.
_State = list[tuple[int, int] | None]


class Witness:
    """Of the ledger in this directory, if there is one: it makes none. say: where to complain.

    It blocks as long as the disk does: no pod waits for casemated itself, and nothing that it would do is of
    use then.
    """

    def __init__(self, directory: str, say: Callable[[str], None]) -> None:
        self._directory = Path(directory)
        self._say = say
        self._idle: _State | None = None
        self._complaint = ""
        self.due_s = time.monotonic()

    def tend(self) -> None:
        """To be called when it is due (time.monotonic()), or later."""
        if time.monotonic() >= self.due_s:
            self.look()
            self.due_s = time.monotonic() + EVERY_S

    def look(self) -> None:
        """Writes, if a claim holds. A ledger in which none does is not even opened before it has changed."""
        before = self._state()
        if before[0] is None or before == self._idle:
            return
        complaint = ""
        try:
            # Late: most nodes never give a device away.
            from vfio.ledger.ledger import Ledger

            # Not kept open: a fork of casemated must not have it.
            with Ledger(self._directory, actor=f"casemated, uid {os.getuid()} pid {os.getpid()}") as ledger:
                self._idle = None if ledger.still_held() or _is_fresh(before) else before
        except (CasemateError, OSError) as error:
            complaint = f"how long devices are held is not written down: {error}"
        if complaint != self._complaint:
            self._say(complaint or "how long devices are held is written down again")
        self._complaint = complaint

    def _state(self) -> _State:
        """The database's file, and the log that is beside it while somebody writes."""
        return [_changed(self._directory / f"{LEDGER_FILE}{end}") for end in ("", "-wal")]


def _is_fresh(state: _State) -> bool:
    """Whether another change just afterwards may not be seen by it."""
    newest_ns = max(each[0] for each in state if each is not None)
    return time.time() < newest_ns / 1e9 + RACY_S


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None  # none yet; or not for this user, who could not write it either
    return about.st_mtime_ns, about.st_size
