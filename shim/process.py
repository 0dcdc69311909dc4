"""The life of a process, one small type per state: a move is a method, an illegal one is an error.

    Created --start--> Running --pause--> Paused --resume--> Running
    any of them --exit--> Stopped --delete--> gone

It must not know of guests, RPC or stdio.
"""

from dataclasses import dataclass

from rpc.api.task import Status
from rpc.errors import FailedPrecondition

SIGKILL = 9
KILLED = 128 + SIGKILL


class State:
    """What every state refuses unless it says otherwise. `name` is for messages, `status` for containerd."""

    status = Status.UNKNOWN
    name = "unknown"

    def start(self) -> "Running":
        raise FailedPrecondition(f"cannot start a process that is {self.name}")

    def pause(self) -> "Paused":
        raise FailedPrecondition(f"cannot pause a process that is {self.name}")

    def resume(self) -> "Running":
        raise FailedPrecondition(f"cannot resume a process that is {self.name}")

    def exec(self) -> None:
        """Whether another process may join this one's container."""
        raise FailedPrecondition(f"cannot exec in a container that is {self.name}")

    def delete(self) -> None:
        raise FailedPrecondition(f"cannot delete a process that is {self.name}")

    def exit(self, exit_status: int, exited_at_ns: int) -> "Stopped":
        return Stopped(exit_status, exited_at_ns)


@dataclass(frozen=True, slots=True)
class Created(State):
    status = Status.CREATED
    name = "created"

    def start(self) -> "Running":
        return Running()

    def delete(self) -> None:
        """One that never ran may be taken away."""


@dataclass(frozen=True, slots=True)
class Running(State):
    status = Status.RUNNING
    name = "running"

    def pause(self) -> "Paused":
        return Paused()

    def exec(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Paused(State):
    status = Status.PAUSED
    name = "paused"

    def resume(self) -> "Running":
        return Running()


@dataclass(frozen=True, slots=True)
class Stopped(State):
    """exit_status as a shell counts, 128 + signal for one that was killed; exited_at_ns since the epoch."""

    exit_status: int
    exited_at_ns: int

    status = Status.STOPPED
    name = "stopped"

    def exit(self, exit_status: int, exited_at_ns: int) -> "Stopped":
        """The first end counts: a second event, or one after the machine was lost, changes nothing."""
        return self

    def delete(self) -> None:
        return None
