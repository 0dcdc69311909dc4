"""Brings a process of a container to life through crun: its streams, its terminal, its pid.

Common to a container's init and to an exec. Must not know of RPC types or of events.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from agent.files import read, remove
from agent.stdio import ConsoleSocket, Stdio
from rpc.errors import Internal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio

    from agent.crun import Crun
    from agent.process import Process
    from agent.reaper import Exit, Reaper


def make_stdio(*, terminal: bool, stdin: bool) -> Stdio:
    return Stdio.terminal() if terminal else Stdio.pipes(stdin=stdin)


async def launch(
    crun: Crun, reaper: Reaper, process: Process, files: str, terminal: bool, command: str, *arguments: str
) -> asyncio.Future[Exit]:
    """Runs `crun COMMAND`, which leaves a process behind: ours to follow. Returns its exit to come.

    files: prefix of the paths of what crun reads and writes meanwhile; removed again, save the log.
    """
    pid_file = f"{files}.pid"
    console = ConsoleSocket(f"{files}.tty") if terminal else None
    options = ["--pid-file", pid_file]
    if console is not None:
        options += ["--console-socket", console.path]
    try:
        with reaper.expecting():
            await crun.run(f"{files}.log", command, *options, *arguments, stdio=process.stdio.inherited)
            pid = _pid(pid_file)
            ended = reaper.watch(pid)
        process.created(pid, ended)
        if console is not None:
            process.stdio.adopt(console.receive())
        return ended
    except BaseException:
        _kill(pid_file)
        raise
    finally:
        process.stdio.handed_over()
        if console is not None:
            console.close()
        remove(pid_file)


def _pid(path: str) -> int:
    try:
        return int(read(path))
    except (FileNotFoundError, ValueError):
        raise Internal("crun started a process and did not say which") from None


def _kill(pid_file: str) -> None:
    """What crun may have started before it was stopped, or before we could use it."""
    with suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(int(read(pid_file)), signal.SIGKILL)
