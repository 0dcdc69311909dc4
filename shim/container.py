"""A container of a pod, and its processes: their stdio, their states, their ends.

A process here is one on the host's side of the guest: what it does, the agent is asked to do. It must not
know of RPC from containerd (services/), nor of where the machine came from.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack

from rpc.api import agent as api
from rpc.errors import CasemateError, DataLoss, FailedPrecondition, NotFound
from shim.helper import Watched
from shim.hooks import HostHooks
from shim.process import Created, State, Stopped
from shim.sandbox import Siblings
from shim.stdio import Sink, Source, Stdio
from shim.vm.guest import Machine

READ_BYTES = 256 << 10
# What a program wrote before it ended is in a pipe in the guest; a grandchild may hold that open for ever.
DRAIN_S = 10.0
FLUSH_S = 5.0
OOM_EVERY_S = 1.0

log = logging.getLogger("casemate")


class Process:
    """A container's init (exec_id "") or an exec. `lock` orders its start before its exit.

    in_doubt: the guest was asked to run it and did not answer, so it may have it, or not.
    """

    def __init__(
        self, container_id: str, exec_id: str, terminal: bool, stdin: str, stdout: str, stderr: str
    ) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.terminal = terminal
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.state: State = Created()
        self.lock = asyncio.Lock()
        self.exited = asyncio.Event()
        self.in_guest = False
        self.in_doubt = False
        self.end_told = False
        self.must_end = False
        self._stdin_closed = False
        self.started_s = self.exited_s = 0.0
        self._stdio: Stdio | None = None
        self._outputs: set[asyncio.Task[None]] = set()
        self._inputs: set[asyncio.Task[None]] = set()

    @property
    def end(self) -> Stopped:
        """How it ended. Raises FailedPrecondition while it has not."""
        if not isinstance(self.state, Stopped):
            raise FailedPrecondition(f"process {self.exec_id or self.container_id} is {self.state.name}")
        return self.state

    @property
    def ended(self) -> bool:
        return isinstance(self.state, Stopped)

    def stop(self, exit_status: int, exited_at_ns: int) -> bool:
        """Records its end; False if it had ended before."""
        if isinstance(self.state, Stopped):
            return False
        self.state = self.state.exit(exit_status, exited_at_ns)
        self.exited.set()
        return True

    def attach(self, machine: Machine, stdio: Stdio) -> None:
        """Starts carrying its stdio between the host's ends and the guest."""
        self._stdio = stdio
        self._outputs.add(asyncio.create_task(self._output(machine, api.STDOUT, stdio.stdout)))
        if not self.terminal:
            self._outputs.add(asyncio.create_task(self._output(machine, api.STDERR, stdio.stderr)))
        if stdio.source is not None:
            if self._stdin_closed:
                stdio.source.close_soon()
            self._inputs.add(asyncio.create_task(self._input(machine, stdio.source)))

    def close_stdin(self) -> None:
        """What its client wrote until now is all; a client may say so before the start is answered."""
        self._stdin_closed = True
        if self._stdio is not None and self._stdio.source is not None:
            self._stdio.source.close_soon()

    async def flush(self) -> None:
        """Until the output is where it goes, within FLUSH_S, if whoever reads it stops at the exit of the
        process: nerdctl's logger does, and who waits for that finds a log file complete."""
        if self._outputs and self._stdio is not None and self._stdio.ends_with_exit:
            await asyncio.wait(self._outputs, timeout=FLUSH_S)

    async def drain(self) -> None:
        """Until the last byte of output is with its reader, within DRAIN_S; then carries nothing."""
        if self._stdio is None:
            return
        if self._outputs:
            _, late = await asyncio.wait(self._outputs, timeout=DRAIN_S)
            if late:
                log.warning("%s/%s: output was not read to its end", self.container_id, self.exec_id)
        await self.close()

    async def close(self) -> None:
        stdio, self._stdio = self._stdio, None
        tasks = self._outputs | self._inputs
        self._outputs, self._inputs = set(), set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if stdio is not None:
            await stdio.close()

    async def _output(self, machine: Machine, stream: int, sink: Sink | None) -> None:
        """One chunk is on its way from the guest while the one before is being written."""
        request = api.ReadOutputRequest(
            container_id=self.container_id, exec_id=self.exec_id, stream=stream, max_bytes=READ_BYTES
        )
        coming: asyncio.Task[api.ReadOutputResponse] | None = None
        try:
            while True:
                answer = await (coming or machine.call(api.READ_OUTPUT, request, patient=True))
                coming = None
                if len(answer.data) > READ_BYTES or not (answer.data or answer.eof):
                    raise DataLoss("the guest answered more output than was asked for, or none")
                if not answer.eof:
                    coming = asyncio.create_task(machine.call(api.READ_OUTPUT, request, patient=True))
                if answer.data and sink is not None:
                    await sink.write(answer.data)
                if answer.eof:
                    return
        except CasemateError as error:
            # The machine's end is told elsewhere.
            log.info("%s/%s: stream %d ended: %s", self.container_id, self.exec_id, stream, error)
        finally:
            if coming is not None:
                coming.cancel()
            if sink is not None:
                await sink.close()  # the reader's end of file

    async def _input(self, machine: Machine, source: Source) -> None:
        ids = {"container_id": self.container_id, "exec_id": self.exec_id}
        try:
            while data := await source.read():
                await machine.call(api.WRITE_STDIN, api.WriteStdinRequest(**ids, data=data), patient=True)
            await machine.call(api.CLOSE_STDIN, api.CloseStdinRequest(**ids))
        except CasemateError as error:
            # A process may close its stdin, or end, while there is more: that is no failure.
            log.debug("%s/%s: stdin ended: %s", self.container_id, self.exec_id, error)


class Container:
    """Owns the host's side of a container: mounts, anchor, processes. undo takes it all away again.

    pid is the anchor's, as the host counts it: what the host's tools may look at. is_sandbox: it is the one
    that stands for a pod of CRI's, and nothing of it runs in the guest. shm, gives, asked: sandbox.Siblings.
    """

    def __init__(
        self,
        container_id: str,
        bundle: str,
        init: Process,
        anchor: Watched,
        pid: int,
        hooks: HostHooks,
        undo: AsyncExitStack,
    ) -> None:
        self.id = container_id
        self.bundle = bundle
        self.init = init
        self.anchor = anchor
        self.pid = pid
        self.is_sandbox = False
        self.shm = ""
        self.asked: Mapping[str, str] = {}
        self.gives: Mapping[str, str] | None = None
        self.hooks = hooks
        self.execs: dict[str, Process] = {}
        self._oom_told_s = -OOM_EVERY_S
        self.undo = undo
        self.deleting = asyncio.Lock()
        self.watch: asyncio.Task[None] | None = None

    @property
    def is_task(self) -> bool:
        """Whether its client knows it as one: not a sandbox that was made by the Sandbox API."""
        return self.gives is None

    def may_tell_oom(self) -> bool:
        """At most one a second: a guest that claims more would have containerd do the work."""
        now = time.monotonic()
        if now - self._oom_told_s < OOM_EVERY_S:
            return False
        self._oom_told_s = now
        return True

    def inside(self, verb: str) -> "Container":
        """Itself, if something of it runs in the guest. Raises FailedPrecondition."""
        if self.is_sandbox:
            raise FailedPrecondition(
                f"{verb}: container {self.id} is its pod's sandbox: nothing of it runs in the virtual machine"
            )
        return self

    def process(self, exec_id: str) -> Process:
        """Raises NotFound."""
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"exec {exec_id} of container {self.id} does not exist") from None

    def processes(self) -> list[Process]:
        """Execs first: they end before the init does."""
        return [*self.execs.values(), self.init]

    def let_go(self) -> None:
        """Ends the anchor, whose end is nobody's wish any more. release() waits for it."""
        if self.watch is not None:
            self.watch.cancel()
        self.anchor.kill()

    async def release(self, machine: Machine | None) -> None:
        """Everything of it on the host, and in the guest if that goes on."""
        self.let_go()
        try:
            if machine is not None:
                ended = isinstance(self.init.state, Stopped)
                await machine.call(api.DELETE, api.DeleteRequest(container_id=self.id, kill=not ended))
        except CasemateError as error:
            log.error("container %s: the guest did not delete it: %s", self.id, error)
        finally:
            await self.undo.aclose()


def siblings(containers: Iterable[Container]) -> Siblings:
    """What another container of their pod may share with them."""
    pids: dict[int, str] = {}
    sandbox = shm = ""
    gives = None
    asked: Mapping[str, str] = {}
    for each in containers:
        asked = asked if pids else each.asked
        pids[each.pid] = each.id
        if each.is_sandbox:
            sandbox, shm, gives = each.id, each.shm, each.gives
    return Siblings(pids, sandbox, shm, gives, asked)
