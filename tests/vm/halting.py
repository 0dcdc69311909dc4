"""What a shim of tests/vm/test_killed_at.py does beside its work: at each step it says which, and waits.

It runs in the shim's process, in `start` and in the daemon. The steps are the beginnings and ends of the
phases that shim/phases.py declares, the entries of the journal, and what follows a pod's last phase. What
happens at a step is the test's business.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from shim import phases
from shim.journal import Entry, Journal
from shim.trace import SHIM, Trace

OF_A_PROCESS = (phases.START_TASK, phases.RUN, phases.CLIENT, phases.DELETE)
"""Phases whose detail is the id of an exec, or empty."""


def halt(address: str, step: str) -> None:
    """Returns when the test says so, or has gone."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendall(step.encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def halt_at_steps(address: str) -> None:
    """From here on, in this process and what is forked of it. address: of the test's socket."""
    span, add, write = Trace.span, Trace.add, Journal.add

    def name_of(phase: str, detail: str) -> str:
        return f"{phase}/exec" if phase in OF_A_PROCESS and detail else phase

    @contextmanager
    def halting_span(self: Trace, name: str, parent: str | None = None, detail: str = "") -> Iterator[None]:
        halt(address, f"begin {name_of(name, detail)}")
        with span(self, name, parent, detail):
            yield

    def halting_add(
        self: Trace,
        name: str,
        start_s: float,
        end_s: float,
        where: str = SHIM,
        parent: str | None = None,
        detail: str = "",
    ) -> None:
        if where == SHIM or name == phases.CLIENT:  # the guest has names of its own
            halt(address, f"end {name_of(name, detail)}")
        add(self, name, start_s, end_s, where, parent, detail)
        if name == phases.DETACH:
            _halt_when_it_ends(address)

    def halting_write(self: Journal, entry: Entry) -> None:
        halt(address, f"journal {entry.kind.value}")
        write(self, entry)

    Trace.span, Trace.add, Journal.add = halting_span, halting_add, halting_write  # type: ignore[method-assign]


def _halt_when_it_ends(address: str) -> None:
    """Not before DETACH: it is where the daemon imports these."""
    from shim import main
    from shim.cgroup import Place
    from shim.pod import Pod

    Pod.stop = _before(address, "stop", Pod.stop)  # type: ignore[method-assign]
    Place.leave = _before(address, "leave", Place.leave)  # type: ignore[method-assign]
    main.retire = _before(address, "retire", main.retire)  # type: ignore[attr-defined]


def _before(address: str, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def halting(*arguments: Any) -> Any:
        halt(address, step)
        return function(*arguments)

    return halting
