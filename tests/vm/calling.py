"""A client that is called to its end, or until something is so. It must not know which client."""

import time
from collections.abc import Callable

from bench.ctr import Client, CtrTimeout, Result

RUN_S = 60.0
WAIT_S = 30.0


class Calling(Client):
    """Some client's program, where an instance is."""

    run_s = RUN_S
    wait_s = WAIT_S

    def __call__(self, *argv: str, stdin: bytes | None = None, timeout_s: float | None = None) -> Result:
        """The client to its end. stdin is empty unless given."""
        began = time.monotonic()
        with self.start(*argv) as running:
            if stdin:
                running.write(stdin)
            done = running.finish(timeout_s or self.run_s)
        return Result(argv, done.code, done.stdout, done.stderr, time.monotonic() - began)

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        """For what the client has no words to wait for: hence a bounded poll."""
        limit_s = timeout_s or self.wait_s
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise CtrTimeout(f"not so within {limit_s} s: {what}")
            time.sleep(0.2)
