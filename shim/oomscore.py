"""How readily the host's kernel takes a pod's machine when memory is short: as the pod's containers ask.

A container's processes are in the guest, which heeds process.oomScoreAdj among them; on the host the machine
stands for all of them, and the kubelet says by it which pods of a node go first.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence

from shim.helper import Watched

log = logging.getLogger("casemate")


class OomScores:
    """Of the containers that there are. The machine is as precious as the most precious of them."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}

    @contextlib.contextmanager
    def asked(self, container_id: str, score: int | None, machine: Sequence[Watched]) -> Iterator[None]:
        """While the container is there. score: None where it does not say; runc leaves it as it is, too.

        machine: the processes that are taken with it.
        """
        if score is None:
            yield
            return
        self._asked[container_id] = score
        self._apply(machine)
        try:
            yield
        finally:
            del self._asked[container_id]
            self._apply(machine)

    def _apply(self, machine: Sequence[Watched]) -> None:
        if not self._asked:
            return
        score = min(self._asked.values())
        for process in machine:
            if process.exited.is_set():
                continue
            try:
                with open(f"/proc/{process.pid}/oom_score_adj", "w") as file:
                    file.write(str(score))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ends
            except PermissionError as error:  # below what it began with, without CAP_SYS_RESOURCE
                log.warning("oom_score_adj of %s is not %d: %s", process.name, score, error)
