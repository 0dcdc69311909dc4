"""Brings a process of a container to life through crun: its streams, its terminal, its pid.

Common to a container's init and to an exec. Must not know of RPC types or of events.
"""

from __future__ import annotations

from agent.files import read, remove
from agent.stdio import ConsoleSocket, Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.crun import Crun
    from agent.process import Process
    from agent.reaper import Reaper


def make_stdio(*, terminal: bool, stdin: bool) -> Stdio:
    return Stdio.terminal() if terminal else Stdio.pipes(stdin=stdin)


async def launch(
    crun: Crun, reaper: Reaper, process: Process, files: str, terminal: bool, command: str, *arguments: str
) -> None:
    """Runs `crun COMMAND`, which leaves a process behind, and makes it a child we follow.

    files: prefix of the paths of what crun reads and writes meanwhile; removed again, save the log.
    """
    pid_file = f"{files}.pid"
    console = ConsoleSocket(f"{files}.tty") if terminal else None
    try:
        with reaper.expecting():
            options = ["--pid-file", pid_file]
            if console is not None:
                options += ["--console-socket", console.path]
            await crun.run(f"{files}.log", command, *options, *arguments, stdio=process.stdio.inherited)
            pid = int(read(pid_file))
            process.created(pid, reaper.watch(pid))
        if console is not None:
            process.stdio.adopt(console.receive())
    finally:
        process.stdio.handed_over()
        if console is not None:
            console.close()
        remove(pid_file)
