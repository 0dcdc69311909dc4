"""A pod: one machine, its containers, and what is told about them.

Everything that containerd may ask is a method here, in the terms of the domain; services/ translates. It
must not know messages of containerd's, nor how a machine is made.
"""

import asyncio
import logging
import time
from contextlib import AsyncExitStack

from config.settings import Profile, Settings
from rpc.api import agent as api
from rpc.errors import (
    AlreadyExists,
    CasemateError,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
)
from shim import clock, inside, oci, phases, sandbox, shortage, spec
from shim.apprentice import Standby
from shim.container import Container, Process, siblings
from shim.creation import Means, NewContainer, make_container
from shim.execution import forget_exec, start_exec
from shim.occupancy import Occupancy
from shim.podnetwork import PodNetwork
from shim.process import KILLED, SIGKILL, Created, Stopped
from shim.record import describe
from shim.tasks import Tasks
from shim.trace import CONTAINERD, write_json
from shim.vm import sources
from shim.vm.guest import Machine
from shim.vm.spare import Reserve
from shim.wants import Wants, wants_of

log = logging.getLogger("casemate")


class Pod:
    """Tells `listener` what happens, in order, before the caller of a method learns of it."""

    def __init__(
        self,
        means: Means,
        settings: Settings,
        standby: Standby,
        listener: "Listener",
        network_of: "Callable[[Machine, Profile], PodNetwork]" = PodNetwork,
    ) -> None:
        self.identity = means.identity
        self.settings = settings
        self.means = means
        self.paths = means.paths
        self.trace = means.trace
        self.containers: dict[str, Container] = {}
        self.occupancy = Occupancy()
        self._standby = standby
        self._listener = listener
        self._network_of = network_of
        self._machine: asyncio.Task[Machine] | None = None
        self._profile: Profile | None = None
        self._tasks = Tasks("a task of the pod failed")
        self._creating: set[str] = set()
        self._early: dict[str, api.Event] = {}
        self._exec_documents: dict[tuple[str, str], bytes] = {}
        self._error: str | None = None
        self._network: PodNetwork | None = None
        self._flushing: asyncio.Task[None] | None = None
        means.devices.changed = lambda: self.write_state("running")
        self.begun = asyncio.Event()
        """Set when its machine is being made, or there is a reason that it will not be."""
        self.ending = asyncio.Event()
        """Set when the pod's own container has ended or goes: so will the machine, and with it the pod."""

    # --- the machine ---

    def begin(self, document: object, ready_from_s: float, reserve: Reserve | None = None) -> None:
        """Starts making the machine. What goes wrong is told to whoever needs the machine first."""
        making = self._bring_up(document, ready_from_s, reserve)
        self._machine = asyncio.create_task(making, name="bring-up")
        self._machine.add_done_callback(self._on_machine)
        self.begun.set()
        self.write_state("starting")

    def refuse(self, error: CasemateError) -> None:
        """There will be no machine, and this is why."""
        self._machine = asyncio.create_task(_raise(error), name="refused")
        self._machine.add_done_callback(self._on_machine)
        self.begun.set()

    async def _bring_up(self, document: object, from_s: float, reserve: Reserve | None) -> Machine:
        with self.trace.span(phases.SETTINGS, phases.POD_READY):
            identity = self.identity
            wants = wants_of(
                document, self.settings, identity.namespace, identity.pod_id, shortage.room_bytes
            )
            self._profile = wants.profile
        wishes: list[str] = []
        try:
            machine = await self._obtain(wants, reserve, wishes.append)
        except CasemateError as error:
            raise shortage.explained(error) from error
        self.trace.add(phases.POD_READY, from_s, time.monotonic())
        alike = wants.profile.replace(files=machine.facts.files)
        self._standby.settle(alike, wants.tenant, machine.facts, wished=bool(wishes))
        self._network = self._network_of(machine, wants.profile)
        self._network.follow()
        for work in (machine.events(self._on_event), self._on_lost(machine), clock.follow(machine)):
            self._tasks.start(work)
        return machine

    async def _obtain(self, wants: Wants, reserve: Reserve | None, wish: "Callable[[str], None]") -> Machine:
        pod_id = self.identity.pod_id
        if reserve is None:
            about = (pod_id, self.settings, self.paths)
            return await self.means.devices.in_a_machine(
                wants, lambda given: sources.obtain(wants.request(*about, given), self.trace, wish)
            )
        return await sources.take_reserved(reserve, pod_id, wants.hostname, self.trace, wish)

    def _on_machine(self, task: "asyncio.Task[Machine]") -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._error = str(error)
            unknown = None if isinstance(error, CasemateError) else error
            log.error("the pod's machine did not start: %s", error, exc_info=unknown)
        self.write_state("starting" if error else "running")

    async def machine(self) -> Machine:
        """The machine once it answers. Raises why there is none, as often as it is asked."""
        if self._machine is None:
            raise FailedPrecondition("the pod's machine was not started")
        try:
            return await asyncio.shield(self._machine)
        except CasemateError as error:
            # One exception object must not be raised in two tasks: each adds its traceback to it.
            raise type(error)(error.brief, error.details, error.hint) from error

    async def _machine_and_profile(self) -> tuple[Machine, Profile]:
        machine = await self.machine()
        assert self._profile is not None  # no machine is made without
        return machine, self._profile

    async def _on_lost(self, machine: Machine) -> None:
        """QEMU, virtiofsd or the agent is gone: every process of every container has ended with it."""
        error = await asyncio.shield(machine.lost)
        if not machine.stopped:
            self._error = str(shortage.explained(error))
            log.error("the pod's machine is lost: %s", self._error)
            await self._end_processes()

    async def _end_processes(self) -> None:
        now = time.time_ns()
        for container in list(self.containers.values()):
            for process in container.processes():
                await self._exited(container, process, KILLED, now)

    def _on_event(self, event: api.Event) -> None:
        container = self.containers.get(event.container_id)
        if container is None:
            is_end = event.kind == api.EventKind.EXIT and not event.exec_id
            if event.container_id in self._creating and is_end:
                self._early[event.container_id] = event  # it ended before the answer that it exists
            return
        if event.kind == api.EventKind.OOM:
            if container.may_tell_oom():
                self._listener.oom(container)
        elif event.kind == api.EventKind.EXIT:
            process = container.init if not event.exec_id else container.execs.get(event.exec_id)
            if process is not None and process.in_guest and not process.end_told:
                process.end_told = True  # one end each, however many a guest tells
                at_ns = min(max(event.exited_at_ns, int(self.trace.created_at * 1e9)), time.time_ns())
                self._tasks.start(self._exited(container, process, event.exit_status, at_ns))

    async def _exited(self, container: Container, process: Process, status: int, at_ns: int) -> None:
        await process.flush()
        if process is container.init:
            for each in list(container.execs.values()):
                async with each.lock:  # an exec's start and exit are told before the init's exit
                    pass
        async with process.lock:  # a start that is under way is told first
            if process.in_guest and process.stop(status & 0xFF, at_ns):
                process.exited_s = time.monotonic()
                if process.started_s:
                    self.trace.add(phases.RUN, process.started_s, process.exited_s, detail=process.exec_id)
                self._listener.exited(container, process)
                self._flush_early()
                self.write_state("running")

    def _flush_early(self) -> None:
        """While the client learns that the pod's own container has ended: it will want it deleted."""
        container, machine = self.containers.get(self.identity.pod_id), self._alive()
        if container is None or machine is None or not isinstance(container.init.state, Stopped):
            return
        if all(process.ended for each in self.containers.values() for process in each.processes()):
            self.ending.set()
            self._flushing = self._tasks.start(self._flush(machine))

    async def _flush(self, machine: Machine) -> None:
        with self.trace.span(phases.SYNC):
            await machine.flush()

    # --- containers ---

    def container(self, container_id: str) -> Container:
        """Raises NotFound."""
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"container {container_id} does not exist") from None

    async def create(self, new: NewContainer) -> Container:
        """Makes a container up to the point where only its program is missing.

        Raises what is wrong with the spec, the mounts, the machine or the program; nothing is left then.
        """
        if new.container_id in self.containers or new.container_id in self._creating:
            raise AlreadyExists(f"container {new.container_id} exists already")
        self._creating.add(new.container_id)
        self.occupancy.now(len(self.containers) + len(self._creating))
        try:
            with self.trace.span(phases.CREATE):
                async with AsyncExitStack() as undo:
                    others = siblings(self.containers.values())
                    ready = (self._machine_and_profile, self._settle_network)
                    container = await make_container(new, self.means, others, *ready, undo)
                    self.containers[new.container_id] = container
                    container.watch = asyncio.create_task(self._on_anchor_killed(container))
                    container.undo = undo.pop_all()
        finally:
            self._creating.discard(new.container_id)
            self.occupancy.now(len(self.containers) + len(self._creating))
            early = self._early.pop(new.container_id, None)
        self._listener.created(container, new.bundle, new.mounts)
        if early is not None:
            self._on_event(early)
        if (machine := self._result()) is not None and machine.lost.done():
            await self._end_processes()  # it was lost, or stopped, when this container was not known yet
        self.write_state("running")
        return container

    async def _settle_network(self, resolv_conf: "Path | None" = None) -> None:
        """The guest has the network that the pod has now. resolv_conf: of a container that is new."""
        if self._network is not None:
            if resolv_conf is not None:
                self._network.heed(resolv_conf)
            with self.trace.span(phases.GUEST_NETWORK):
                await self._network.settle()

    async def _on_anchor_killed(self, container: Container) -> None:
        """Somebody on the host killed the pid that stands for the container: they mean the container."""
        await container.anchor.exited.wait()
        try:
            await self.kill(container.id, "", SIGKILL, everything=True)
        except CasemateError as error:
            log.info("container %s: its anchor was killed: %s", container.id, error)

    async def start(self, container_id: str, exec_id: str = "") -> Container:
        """Runs a created process. Raises the program's own error: not found, wrong machine."""
        container = self.container(container_id)
        process = container.process(exec_id)
        async with process.lock:
            running = await inside.startable(process, self._result())
            self._flushing = None  # there will be more to flush
            machine = await self.machine()
            with self.trace.span(phases.START_TASK, detail=exec_id):
                if exec_id:
                    container.init.state.exec()
                    document = self._exec_documents[container_id, exec_id]
                    await start_exec(machine, process, document, self.identity)
                else:
                    await self._settle_network()  # the client may have changed it since
                    await inside.start(machine, container)
            process.state = running
            process.started_s = time.monotonic()
            if not exec_id:
                await self._poststart(container)
            self._listener.started(container, process)
        self.write_state("running")
        return container

    async def _poststart(self, container: Container) -> None:
        """A hook that fails ends the container, as with runc, and by the specification since 1.3."""
        try:
            await container.hooks.started()
        except CasemateError:
            self._tasks.start(self.kill(container.id, "", SIGKILL, everything=True))
            raise

    def add_exec(self, container_id: str, process: Process, document: bytes) -> Container:
        """An exec that is created, not yet run. document: an OCI Process as JSON."""
        container = self.container(container_id).inside("exec")
        container.init.state.exec()
        if process.exec_id in container.execs:
            raise AlreadyExists(f"exec {process.exec_id} of container {container_id} exists already")
        wanted, lines = spec.process_for_guest(oci.decode(document, "process"))
        for line in lines:
            log.info("exec %s: %s", process.exec_id, line)
        container.execs[process.exec_id] = process
        self._exec_documents[container_id, process.exec_id] = oci.encode(wanted)
        self._listener.exec_added(container, process)
        return container

    async def kill(self, container_id: str, exec_id: str, signal: int, *, everything: bool = False) -> None:
        """Raises NotFound for a process that has ended, FailedPrecondition for an exec that has not begun."""
        container = self.container(container_id)
        process = container.process(exec_id)
        if isinstance(process.state, Stopped):
            raise NotFound(f"process {exec_id or container_id} has ended already")
        if exec_id and isinstance(process.state, Created):
            raise FailedPrecondition(f"exec {exec_id} has not been started")
        if container.is_sandbox:
            if (status := sandbox.status_after(signal)) is not None:
                await self._exited(container, process, status, time.time_ns())
            return
        machine = await self.machine()
        request = api.SignalRequest(container_id=container_id, exec_id=exec_id, signal=signal, all=everything)
        if signal != SIGKILL or exec_id:
            await machine.call(api.SIGNAL, request)
            return
        # SIGKILL is not to be refused, not even by an agent that says yes and does nothing.
        if not process.must_end:
            process.must_end = True
            self._tasks.start(self._end_or_kill(machine, process))
        try:
            await machine.call(api.SIGNAL, request, machine.call_timeout_s)
        except DeadlineExceeded as error:
            log.error("killing the machine, as its agent does not kill %s: %s", container_id, error)
            machine.qemu.kill()

    async def _end_or_kill(self, machine: Machine, process: Process) -> None:
        try:
            async with asyncio.timeout(machine.call_timeout_s):
                await process.exited.wait()
        except TimeoutError:
            log.error("killing the machine, as its agent does not kill %s", process.container_id)
            machine.qemu.kill()

    async def pause(self, container_id: str) -> None:
        await self._freeze(container_id, pause=True)

    async def resume(self, container_id: str) -> None:
        await self._freeze(container_id, pause=False)

    async def _freeze(self, container_id: str, *, pause: bool) -> None:
        container = self.container(container_id).inside("pause" if pause else "resume")
        init = container.init
        async with init.lock:
            after = init.state.pause() if pause else init.state.resume()
            machine = await self.machine()
            await machine.call(
                api.PAUSE if pause else api.RESUME, api.ContainerRequest(container_id=container_id)
            )
            init.state = after
            self._listener.paused(container) if pause else self._listener.resumed(container)
        self.write_state("running")

    async def resize(self, container_id: str, exec_id: str, width: int, height: int) -> None:
        """Of a process without a terminal: nothing, and no error, as every shim does."""
        process = self.container(container_id).process(exec_id)
        if process.terminal and process.in_guest and not isinstance(process.state, Stopped):
            machine = await self.machine()
            asked = api.ResizeRequest(container_id=container_id, exec_id=exec_id, width=width, height=height)
            await machine.call(api.RESIZE, asked)

    async def update(self, container_id: str, document: bytes) -> None:
        """document: OCI LinuxResources as JSON, applied in the guest as far as it can (resources.py)."""
        container = self.container(container_id).inside("update")
        machine, profile = await self._machine_and_profile()
        await inside.update(machine, profile, container, document)

    async def stats(self, container_id: str) -> bytes:
        """The container's cgroup in the guest: an encoded io.containerd.cgroups.v2.Metrics."""
        return await inside.stats(await self.machine(), self.container(container_id))

    async def delete(self, container_id: str, exec_id: str = "") -> tuple[int, Stopped]:
        """Takes an ended process away, its output read to the end. Returns its pid and how it ended.

        With the container that the pod is named after goes the machine: nothing of the pod is left to run.
        """
        container = self.container(container_id)
        async with container.deleting:
            self.container(container_id)  # another Delete may have been faster
            return await self._delete(container, container.process(exec_id))

    async def _delete(self, container: Container, process: Process) -> tuple[int, Stopped]:
        exec_id = process.exec_id
        process.state.delete()
        end = process.state if isinstance(process.state, Stopped) else Stopped(KILLED, time.time_ns())
        if process.exited_s:
            self.trace.add(phases.CLIENT, process.exited_s, time.monotonic(), CONTAINERD, detail=exec_id)
        with self.trace.span(phases.DELETE, detail=exec_id):
            if isinstance(process.state, Stopped):
                with self.trace.span(phases.DRAIN, phases.DELETE):
                    await process.drain()
            if exec_id:
                await self._delete_exec(container, process)
            else:
                await self._delete_container(container)
        if not exec_id:
            # Before the answer: containerd may kill this process as soon as it has it.
            self.write_state("stopping" if container.id == self.identity.pod_id else "running")
        self._listener.deleted(container, process, end)
        return container.pid, end

    async def _delete_exec(self, container: Container, process: Process) -> None:
        await process.close()
        if (machine := self._alive()) is not None:
            try:
                await forget_exec(machine, process)
            except CasemateError as error:
                log.error("exec %s: the guest did not delete it: %s", process.exec_id, error)
        del container.execs[process.exec_id]
        del self._exec_documents[container.id, process.exec_id]

    async def _delete_container(self, container: Container) -> None:
        machine = self._alive()
        last = container.id == self.identity.pod_id
        if last:
            self.ending.set()
            container.let_go()
        if last and machine is not None:
            await (self._flushing or self._flush(machine))
            with self.trace.span(phases.MACHINE_STOP, phases.DELETE):
                await machine.halt()
                await self._end_processes()  # those of the pod's other containers
        for process in container.processes():
            await process.close()
        with self.trace.span(phases.UNMOUNT, phases.DELETE):
            await container.release(None if last else machine)
        if last:
            await self.means.devices.give_back()  # before the answer: who has it may want them for another
        self.containers.pop(container.id, None)  # stop() may have been faster
        self.occupancy.now(len(self.containers) + len(self._creating))

    def _result(self) -> Machine | None:
        """The machine, if it was made, whatever became of it."""
        task = self._machine
        ended = task is not None and task.done() and not task.cancelled()
        return task.result() if task is not None and ended and task.exception() is None else None

    def _alive(self) -> Machine | None:
        """The machine, if there is one that still answers."""
        machine = self._result()
        return None if machine is None or machine.lost.done() else machine

    async def end_machine(self) -> None:
        """Where the process outlives the pod's own container: nothing of the machine goes on."""
        if self._network is not None:
            await self._network.close()
            self._network = None
        if (machine := self._result()) is not None:
            await machine.end()

    async def stop(self) -> None:
        """Everything of the pod gone, in whatever state it is."""
        self.ending.set()
        if self._machine is not None:
            self._machine.cancel()
            await asyncio.gather(self._machine, return_exceptions=True)
        if (machine := self._result()) is not None:
            if self.containers:
                await machine.flush()
            await machine.halt()
        for container in list(self.containers.values()):
            for process in container.processes():
                await process.close()
            await container.release(None)
            del self.containers[container.id]
        await self.end_machine()
        await self.means.devices.give_back()
        await self._tasks.cancel()

    def write_state(self, state: str) -> None:
        """For `casemate ps` and `trace`. A full disk must not fail a pod that runs."""
        try:
            write_json(self.paths.state, self.described(state))
            self.trace.write(self.paths.trace)
        except OSError as error:
            log.warning("state not written: %s", error)

    def described(self, state: str) -> "dict[str, object]":
        """What state.json says of it. state: as describe() has it."""
        about = (self._result(), self._profile, self.containers.values(), self._error)
        return {**describe(self.identity, state, *about), "created_at": self.trace.created_at}


async def _raise(error: CasemateError) -> Machine:
    raise error


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shim.services.events import Listener
