"""A process of a container, from created to exited, one small type per state.

An illegal move is a named error. Must not know of crun, cgroups or RPC types.
"""

from __future__ import annotations

import asyncio
import os
import signal

from rpc.errors import FailedPrecondition, InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.reaper import Exit
    from agent.stdio import Input, Stdio


class State:
    """What every state answers, unless it can do better."""

    name = "?"

    def started(self, who: str) -> State:
        raise FailedPrecondition(f"{who} is {self.name}, it cannot be started")

    def signal(self, who: str, pid: int, number: int) -> None:
        raise FailedPrecondition(f"{who} is {self.name}, it cannot be signalled")

    def deleted(self, who: str) -> None:
        raise FailedPrecondition(f"{who} is {self.name}, it cannot be deleted")


class Starting(State):
    """Crun is at work; there is no process yet, or we do not know it."""

    name = "being created"


class Created(State):
    name = "created"

    def started(self, who: str) -> State:
        return Running()

    def signal(self, who: str, pid: int, number: int) -> None:
        os.kill(pid, number)


class Running(State):
    name = "running"

    def signal(self, who: str, pid: int, number: int) -> None:
        os.kill(pid, number)


class Exited(State):
    name = "stopped"

    def __init__(self, how: Exit) -> None:
        self.how = how

    def signal(self, who: str, pid: int, number: int) -> None:
        raise NotFound(f"{who} has exited already")

    def deleted(self, who: str) -> None:
        return None


class Process:
    """pid is 0 until known. ended is what the reaper will report; settled is set when the exit has been
    announced, or when the process never came to be. unwanted: it is to be killed as soon as it is there, and
    nobody is to hear of it."""

    def __init__(self, container_id: str, exec_id: str, stdio: Stdio) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdio = stdio
        self.pid = 0
        self.state: State = Starting()
        self.ended: asyncio.Future[Exit] | None = None
        self.settled = asyncio.Event()
        self.unwanted = False

    @property
    def who(self) -> str:
        container = f"container {self.container_id}"
        return f"exec {self.exec_id} of {container}" if self.exec_id else container

    @property
    def gone(self) -> bool:
        """Reaped: its pid may belong to another process by now."""
        return self.ended is not None and self.ended.done()

    def created(self, pid: int, ended: asyncio.Future[Exit]) -> None:
        self.pid = pid
        self.ended = ended
        self.state = Created()

    def started(self) -> None:
        self.state = self.state.started(self.who)

    def exited(self, how: Exit) -> None:
        self.state = Exited(how)

    def signal(self, number: int) -> None:
        self.check_signal(number)
        self.state.signal(self.who, self.pid, number)

    def check_signal(self, number: int) -> None:
        """Raises if this process cannot be sent this signal (any more)."""
        if not 0 < number < signal.NSIG:
            raise InvalidArgument(f"there is no signal {number}")
        if self.gone:
            raise NotFound(f"{self.who} has exited already")

    async def end(self) -> None:
        """Kills it, whatever it is doing, and returns when it is gone or has never come to be."""
        self.unwanted = True
        if self.pid and not self.gone:
            os.kill(self.pid, signal.SIGKILL)
        await self.settled.wait()

    def stdin(self) -> Input:
        if self.stdio.input is None:
            raise FailedPrecondition(f"{self.who} has no standard input")
        return self.stdio.input
