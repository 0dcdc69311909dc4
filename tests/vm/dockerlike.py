"""Clients whose command line is Docker's: what tests say to have a container of theirs.

It knows that command line; what should come of it is the tests' business.
"""

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bench.ctr import CtrFailed, Result
from images import oci
from tests.vm.calling import RUN_S, Calling

IMAGE = oci.DEMO
_numbers = itertools.count(1)


class DockerLike(Calling):
    """docker, or nerdctl."""

    runtime: tuple[str, ...] = ()
    """What a `run` has to say to have casemate, where its daemon does not make that the default."""

    def out(self, *argv: str) -> str:
        """What a command that goes well has to say, without the last end of line."""
        return self(*argv).ok().out.removesuffix("\n")

    def json(self, *argv: str) -> Any:
        return json.loads(self.out(*argv))

    def run(self, *argv: str, timeout_s: float = RUN_S) -> Result:
        """`run --rm`, to its end. argv: options, IMAGE and the command."""
        return self("run", "--rm", *self.runtime, *argv, timeout_s=timeout_s)

    @contextlib.contextmanager
    def detached(self, *command: str, options: Sequence[str] = ()) -> Iterator[str]:
        """The name of a container that runs in the background; removed at the end of the block."""
        name = f"casemate{next(_numbers)}"
        try:
            self("run", "--detach", "--name", name, *self.runtime, *options, IMAGE, *command).ok()
            yield name
        finally:
            self("rm", "--force", "--volumes", name).ok()

    def beside(self, script: str, *argv: str) -> str:
        """What a Python program of the host's says that is where the client is."""
        command = self.instance.inside(sys.executable, "-c", script, *argv)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def exec(self, name: str, *command: str) -> str:
        """What it wrote, if it went well."""
        return self("exec", name, *command).ok().out

    def wait_said(self, name: str, words: str, timeout_s: float = 60.0) -> None:
        """Until its log has a line of these words, or one that ends so."""
        with self.start("logs", "--follow", name) as log:
            log.read_until(f"{words}\n".encode(), timeout_s)

    def inspect(self, name: str) -> dict[str, Any]:
        (found,) = self.json("inspect", name)
        about: dict[str, Any] = found
        return about


def failure(result: Result) -> str:
    """What the client said of a call that failed."""
    if result.code == 0:
        raise CtrFailed(f"it did not fail: {result}")
    return result.err
