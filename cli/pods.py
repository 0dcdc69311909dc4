"""The pods of this host as their shims wrote them down, running and ended, and how to find one.

Reads RUN/pods, RUN/spares and RUN/ended and /proc only. What a file lacks is unknown, never guessed.
"""

import json
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from rpc.errors import NotFound
from shim import system
from shim.paths import PODS, SPARES, PodPaths, run_dir

UNKNOWN, STALE = "unknown", "stale"


@dataclass(frozen=True, slots=True)
class Pod:
    """One directory of RUN/pods, RUN/spares or RUN/ended."""

    directory: Path
    ended: bool
    record: dict[str, Any]  # state.json; {} where it cannot be read
    alive: bool  # the shim that wrote it still runs
    problem: str | None  # why record is empty

    @property
    def key(self) -> str:
        return self.directory.name

    @property
    def paths(self) -> PodPaths:
        is_spare = self.directory.parent.name == SPARES
        return PodPaths.of_spare(self.key) if is_spare else PodPaths.from_key(self.key)

    @property
    def namespace(self) -> str:
        return str(self.record.get("namespace", "?"))

    @property
    def id(self) -> str:
        return str(self.record.get("id", "?"))

    @property
    def state(self) -> str:
        """As recorded; "stale" where the shim is gone and nobody has cleaned up after it."""
        if not self.record:
            return UNKNOWN
        if not self.ended and not self.alive:
            return STALE
        return str(self.record.get("state", UNKNOWN))

    @property
    def created_at(self) -> float:
        """Unix time in seconds; the directory's own where the record does not say."""
        value = self.record.get("created_at")
        return float(value) if isinstance(value, int | float) else self.directory.stat().st_mtime


def shim_alive(record: dict[str, Any]) -> bool:
    """Whether the very process that wrote record runs: a pid alone may be another's by now."""
    process = open_shim(record)
    if process is None:
        return False
    os.close(process)
    return True


def open_shim(record: dict[str, Any]) -> int | None:
    """A pidfd of the process that wrote record; None if it is gone, or dead and not yet reaped."""
    pid, started = record.get("pid"), record.get("start_time")
    if not isinstance(pid, int) or pid <= 0 or not isinstance(started, int):
        return None
    process = system.open_process(pid, started)
    if process is not None and select.select([process], [], [], 0)[0]:
        os.close(process)
        return None
    return process


def running() -> list[Pod]:
    return sorted(_read(run_dir() / PODS, ended=False), key=lambda pod: (pod.namespace, pod.id))


def spares() -> list[Pod]:
    """The machines of the pool, those that have waited longest first."""
    return sorted(_read(run_dir() / SPARES, ended=False), key=lambda pod: pod.created_at)


def ended() -> list[Pod]:
    """Newest first."""
    return sorted(_read(run_dir() / "ended", ended=True), key=lambda pod: -pod.created_at)


def _read(directory: Path, *, ended: bool) -> Iterator[Pod]:
    try:
        found = sorted(path for path in directory.iterdir() if path.is_dir())
    except FileNotFoundError:
        return
    for path in found:
        try:
            record, problem = _record(path / "state.json"), None
        except (OSError, ValueError) as error:
            if isinstance(error, PermissionError):
                raise
            if not path.exists():
                continue  # the pod ended while we were looking
            record, problem = {}, str(error)
        yield Pod(path, ended, record, not ended and shim_alive(record), problem)


def _record(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a JSON object")
    return record


def find(wanted: str) -> Pod:
    """The pod meant by an id, NAMESPACE/ID, or the unique beginning of an id; running ones first.

    Raises NotFound, or BadParameter where several would do.
    """
    for pods in (running(), ended()):
        for matches in (
            [pod for pod in pods if wanted in (pod.id, f"{pod.namespace}/{pod.id}", pod.key)],
            [pod for pod in pods if pod.id.startswith(wanted)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                names = ", ".join(f"{pod.namespace}/{pod.id}" for pod in matches)
                raise typer.BadParameter(f"{wanted} may be any of {names}")
    raise NotFound(f"no pod {wanted}", hint="casemate ps --all lists those that are known")


def complete(incomplete: str) -> list[str]:
    """For the shell's completion: ids that begin so."""
    try:
        return sorted({pod.id for pod in running() + ended() if pod.id.startswith(incomplete)})
    except PermissionError:
        return []
