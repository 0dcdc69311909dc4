"""A virtual machine that runs: its agent, its end, and why it ended.

Where it came from is sources.py's. It must not know of containers.
"""

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rpc.api import agent as api
from rpc.api.types import Empty
from rpc.client import Client
from rpc.codec import Message
from rpc.errors import CasemateError, DeadlineExceeded, Disconnected, Unavailable
from rpc.method import Method
from shim.helper import Helper, Watched, in_thread
from shim.vm.accel import Acceleration
from shim.vm.console import Console
from shim.vm.crowding import crowding
from shim.vm.host import Host
from shim.vm.ports import Ports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from shim.vm.backing import Backing
    from shim.vm.passthrough import Access, Function
    from shim.vm.pinning import Pinning

    Q = TypeVar("Q", bound=Message)
    R = TypeVar("R", bound=Message)

# From the agent's connection ending to QEMU's end: a panicking kernel writes to its console first.
LAST_WORDS_S = 3.0
CONSOLE_END_S = 0.5
log = logging.getLogger("casemate")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a machine, for `casemate ps` and the log."""

    source: str
    accel: Acceleration
    transport: str
    image_digest: str
    kernel_release: str
    memory_used_bytes: int
    files: str
    devices: "tuple[Function, ...]" = ()
    access: "Access | None" = None
    backing: "Backing | None" = None
    pinning: "Pinning | None" = None

    @property
    def restored(self) -> bool:
        """By itself, or for the pool."""
        return self.source != "boot"


class Machine:
    """Owns QEMU, its file server and the agent's connection; stop() ends them all, and undo what they needed.

    `lost` is why it is no more, once it is; `stopped` says that this was wanted.
    """

    def __init__(
        self,
        facts: Facts,
        agent: Client,
        qemu: Watched,
        files: Helper,
        console: Console,
        share: Path,
        qemu_words: "QemuWords",
        call_timeout_s: float,
        host: Host,
        undo: AsyncExitStack,
    ) -> None:
        self.facts = facts
        self.share = share
        self.qemu = qemu
        self.files = files
        self._agent = agent
        self._console = console
        self._qemu_words = qemu_words
        self.call_timeout_s = call_timeout_s
        self.host = host
        self.ports = Ports()
        self.gone: set[str] = set()
        """Of the host's devices that it was given, those that it has no more, by the host's addresses."""
        self._undo = undo
        self._halted: CasemateError | None = None
        self.stopped = False
        self.lost: asyncio.Future[CasemateError] = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._until_lost(), name="machine-watch")

    async def call(
        self, method: "Method[Q, R]", request: "Q", timeout_s: float | None = None, *, patient: bool = False
    ) -> "R":
        """Asks the agent. patient: the answer may take for ever (a program has to do something first).

        Raises what the agent answered, DeadlineExceeded if it does not, and why the machine is lost if it is.
        """
        limit = None if patient else timeout_s or self.call_timeout_s * crowding()
        try:
            return await self._agent.call(method, request, timeout_s=limit)
        except Disconnected:
            raise await self.why_lost() from None
        except DeadlineExceeded as error:
            raise unanswered(method.name, limit, self._console) from error

    async def plug(self, attach: "Callable[[], None]") -> None:
        """attach: how libvirt gives it a device, which takes its time. Raises as attach does, and why the
        machine is lost if it is: libvirt says of such a one that it does not know it."""
        try:
            await in_thread(attach)
        except CasemateError as error:
            try:
                async with asyncio.timeout(LAST_WORDS_S):
                    reason = await self.why_lost()
            except TimeoutError:
                raise error from None  # it lives, and does not take it
            raise reason from error

    async def events(self, on_event: "OnEvent") -> None:
        """Hands every event of the guest to on_event, until the machine is lost."""
        reason = "the agent ended them"
        try:
            async with self._agent.stream(api.EVENTS, api.EventsRequest()) as stream:
                async for event in stream:
                    on_event(event)
        except Disconnected:
            return  # the machine's end is told by `lost`
        except CasemateError as error:
            reason = str(error)
        # A guest that garbles its events, or tells no more, would have its containers run for ever.
        log.error("the guest's events cannot be read, so the machine is ended: %s", reason)
        self.qemu.kill()

    async def follow_devices(self, on_gone: "OnGone") -> None:
        """From now on on_gone is told, once, of each of the host's devices that the machine loses while it
        runs. A machine that QEMU stops, as where a device reports an error that nobody can mend, is lost: it
        would stand still for ever. Raises Unavailable."""
        loop = asyncio.get_running_loop()
        given = {each.address: each for each in self.facts.devices}

        def tell(address: str) -> None:
            if address in given and address not in self.gone and not self.lost.done():
                self.gone.add(address)
                on_gone(given[address])

        def gone(address: str) -> None:
            loop.call_soon_threadsafe(tell, address)

        def halted() -> None:
            loop.call_soon_threadsafe(self._end_halted)

        await in_thread(partial(self.host.follow_devices, given, gone, halted))

    def _end_halted(self) -> None:
        if not self.lost.done():
            # Its words are there before it stops.
            self._halted = Unavailable(
                "QEMU has stopped the pod's machine", details=self._qemu_words() or None
            )
            self.qemu.kill()

    async def why_lost(self) -> CasemateError:
        error = await asyncio.shield(self.lost)
        return type(error)(error.brief, error.details, error.hint)

    async def flush(self) -> None:
        """What the guest wrote is with the host."""
        if self.lost.done():
            return
        try:
            await self._agent.call(api.SYNC, Empty(), timeout_s=self.call_timeout_s)
        except CasemateError as error:
            log.warning(f"the guest did not flush its file systems: {error}")

    async def halt(self) -> None:
        """Nothing of the guest's reaches the share any more, where files are still mounted.

        QEMU is killed, and may take until end() to give its memory back.
        """
        self._watch.cancel()
        if not self.lost.done():
            self.stopped = True
            self.lost.set_result(Unavailable("the pod's machine was stopped"))
        for process in (self.qemu, self.files):
            process.kill()
        await self.files.exited.wait()

    async def end(self) -> None:
        """No process of it is left. What else it had is its shim's, and ends with that process."""
        await self.halt()
        await self.qemu.exited.wait()

    def adopt(self, surroundings: AsyncExitStack) -> None:
        """Owns from now on what that stack would undo, after all that is undone with the machine."""
        everything = surroundings.pop_all()
        everything.push_async_exit(self._undo.pop_all())
        self._undo = everything

    async def stop(self) -> None:
        """Everything of it gone. What is mounted below the share must be unmounted before."""
        await self.end()
        await self._undo.aclose()

    async def _until_lost(self) -> None:
        """Sets `lost` the moment QEMU, virtiofsd or the agent is gone, with what each had to say."""
        waits = [
            asyncio.create_task(self.qemu.exited.wait()),
            asyncio.create_task(self.files.exited.wait()),
            asyncio.create_task(self._agent.closed()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            why = await why_ended(self.qemu, self.files, self._console, self._qemu_words)
            self.lost.set_result(self._halted or why)
            self.qemu.kill()
        finally:
            for task in waits:
                task.cancel()


def unanswered(method: str, limit_s: float | None, console: Console) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the guest's agent did not answer {method} within {limit_s:.0f} s",
        details=console.words(),
        hint="casemate logs shows the guest's console",
    )


def files_failure(files: Helper) -> CasemateError:
    return Unavailable(f"{files.name} ended unexpectedly ({files.how()})", details=files.words() or None)


async def why_ended(
    qemu: Watched, files: Helper | None, console: Console, qemu_words: "QemuWords"
) -> CasemateError:
    """Which of a machine's parts ended first, and in whose words. One of them has, or has hung up.

    A panicking kernel closes the agent's connection, and writes to its console, before QEMU ends. A file
    server whose client has hung up ends in good order, and may be seen to have ended before QEMU is.
    """
    files_failed = files is not None and files.exited.is_set() and files.status != 0
    if not files_failed and not qemu.exited.is_set():
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await qemu.exited.wait()
        except TimeoutError:
            if files is not None and files.exited.is_set():
                return files_failure(files)
            return Unavailable("the guest's agent closed its connection", details=console.words())
    if qemu.exited.is_set():
        # Its last bytes are in the socket yet, and the end of them too.
        try:
            async with asyncio.timeout(CONSOLE_END_S):
                await console.ended.wait()
        except TimeoutError:
            log.warning("the console of a QEMU that ended is still open")
    if console.panicked:
        return Unavailable("the guest's kernel panicked", details=console.words())
    if files is not None and files.exited.is_set() and not qemu.exited.is_set():
        return files_failure(files)
    own, how = qemu_words(), qemu.how()
    return Unavailable(
        f"QEMU ended unexpectedly ({how})" if how else "QEMU ended unexpectedly",
        details=f"{own}\n{console.words()}" if own else console.words(),
        hint="casemate logs shows the guest's console",
    )


if TYPE_CHECKING:
    OnEvent = Callable[[api.Event], None]
    OnGone = Callable[[Function], None]
    QemuWords = Callable[[], str]
