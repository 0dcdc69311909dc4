"""A network namespace for a test: a thread's, so that the others of the process stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from shim.network import make_network


def in_a_network_of_its_own(function: Callable[[], None]) -> None:
    """Returns when it has; raises what it raises. The namespace ends with its thread."""

    def work() -> None:
        make_network()
        function()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result(60)
