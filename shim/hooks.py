"""A container's hooks on the host, as its shim has them run: which are due, and what their failure means.

They are run by the process that `start` left for it (hookserver.py), over one connection. It must not know
what else of a container is made or undone at those moments.
"""

import asyncio
import json
import logging

from rpc.errors import FailedPrecondition, ResourceExhausted, Unavailable
from shim import phases, poststop
from shim.hookserver import HOST_HOOKS
from shim.journal import Journal
from shim.oci import Spec
from shim.paths import hooks_socket
from shim.trace import Trace

MOST_ANSWER_BYTES = 1 << 20
log = logging.getLogger("casemate")


class HostHooks:
    """Of one container. Every call is over when the hooks are, and does nothing where there are none."""

    def __init__(
        self, spec: Spec, container_id: str, bundle: str, namespace: str, journal: Journal, trace: Trace
    ) -> None:
        self._spec = spec
        self._container_id = container_id
        self._bundle = bundle
        self._namespace = namespace
        self._journal = journal
        self._trace = trace
        self._pid = 0
        self._owed = False
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connect(self) -> None:
        """Raises Unavailable if nobody is there to run them."""
        if self._spec.hooks.keys().isdisjoint(HOST_HOOKS):
            return
        path = hooks_socket(self._namespace, self._container_id)
        try:
            self._server = await asyncio.open_unix_connection(path, limit=MOST_ANSWER_BYTES)
        except OSError as error:
            raise Unavailable(
                f"hooks of {self._container_id}: the process that `start` left to run them is not there",
                details=str(error),
            ) from error

    async def create(self, pid: int) -> None:
        """prestart, then createRuntime. pid: what stands for the container, as the host counts it.

        Raises FailedPrecondition with the words of the first that fails.
        """
        self._pid = pid
        if hooks := self._spec.hooks.get("poststop"):
            from shim.hookrun import state_of  # most containers have none

            state = state_of(self._spec, self._container_id, self._bundle, "stopped", 0)
            try:
                poststop.owe(self._journal, hooks, state)
            except OSError as error:
                raise ResourceExhausted("poststop hooks cannot be written down", str(error)) from error
            self._owed = True
        for kind in ("prestart", "createRuntime"):
            await self._run(kind)

    async def started(self) -> None:
        """poststart. Raises FailedPrecondition: the container is to be stopped then (runtime.md, 1.3)."""
        await self._run("poststart")

    async def gone(self) -> None:
        """poststop, once, if a hook may have done what they undo. Failures are told in the log."""
        try:
            if self._owed:
                self._owed = False
                poststop.begin(self._journal, self._container_id)
                self._pid = 0
                await self._run("poststop")
        except Unavailable as error:
            log.error("%s", error)
        finally:
            if self._server is not None:
                self._server[1].close()
                self._server = None

    async def _run(self, kind: str) -> None:
        hooks = self._spec.hooks.get(kind)
        if not hooks:
            return
        with self._trace.span(phases.HOOKS, detail=kind):
            outcomes = await self._ask(kind)
        for path, failure, words in outcomes:
            about = f"{kind} hook {path} of {self._container_id}"
            if failure and kind != "poststop":
                raise FailedPrecondition(f"{about}: {failure}", details=words)
            if failure:
                log.warning("%s: %s: %s", about, failure, words)
            elif words:
                log.info("%s: %s", about, words)

    async def _ask(self, kind: str) -> list[tuple[str, str, str]]:
        assert self._server is not None  # connect() has seen to it
        reader, writer = self._server
        try:
            writer.write(json.dumps({"kind": kind, "pid": self._pid}).encode() + b"\n")
            answer = await reader.readline()
        except (OSError, ValueError) as error:
            raise Unavailable(f"{kind} hooks of {self._container_id}", details=str(error)) from error
        if not answer.endswith(b"\n"):
            raise Unavailable(f"{kind} hooks of {self._container_id}: the process that runs them has ended")
        return [(path, failure, words) for path, failure, words in json.loads(answer)]
