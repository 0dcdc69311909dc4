"""The one place that calls waitpid: PID 1 collects every child, its own and the orphans.

Nothing else may wait for a process. It must not know what the processes are.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Exit:
    """How a process ended: status as a shell counts it (128 + signal), and when (CLOCK_REALTIME)."""

    __slots__ = ("at_ns", "status")

    def __init__(self, status: int, at_ns: int) -> None:
        self.status = status
        self.at_ns = at_ns

    def __repr__(self) -> str:
        return f"Exit({self.status})"


class Reaper:
    def __init__(self) -> None:
        self._watched: dict[int, asyncio.Future[Exit]] = {}
        self._early: dict[int, Exit] = {}
        self._expecting = 0
        self._wakeup: tuple[socket.socket, socket.socket] | None = None

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reaps from now on. (add_signal_handler would load inspect, to look at its argument.)"""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = (ours, theirs)
        loop.add_reader(ours.fileno(), self._woken, ours)
        self.reap()

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reaps no more."""
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            loop.remove_reader(self._wakeup[0].fileno())
            for end in self._wakeup:
                end.close()
            self._wakeup = None

    def _woken(self, wakeup: socket.socket) -> None:
        with suppress(BlockingIOError):
            while wakeup.recv(4096):
                pass
        self.reap()

    def reap(self) -> None:
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(wait_status)
            ended = Exit(code if code >= 0 else 128 - code, time.time_ns())
            future = self._watched.pop(pid, None)
            if future is not None:
                if not future.done():
                    future.set_result(ended)
            elif self._expecting:
                self._early[pid] = ended

    def watch(self, pid: int) -> asyncio.Future[Exit]:
        """The exit to come of a child. Call it before the event loop runs again, or within expecting()."""
        future: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        early = self._early.pop(pid, None)
        if early is not None:
            future.set_result(early)
        else:
            self._watched[pid] = future
        return future

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While it lasts, exits of children not watched yet are kept: a process that crun starts for
        us can end before crun has told us its pid."""
        self._expecting += 1
        try:
            yield
        finally:
            self._expecting -= 1
            if not self._expecting:
                self._early.clear()
