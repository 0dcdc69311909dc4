"""A container of the guest and its processes: create, start, exec, signal, pause, update, delete.

Knows crun and the container's cgroup; must not know of RPC types or of how events travel.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from contextlib import ExitStack, nullcontext

from agent import executables, filesystems, hooks, ids, submounts, sysctls
from agent.cgroups import Cgroup
from agent.crun import CrunFailed
from agent.files import remove, remove_directory, write
from agent.launch import launch, make_stdio
from agent.process import Process
from agent.state import NobodyWaitsError, let_go, take_away
from agent.submounts import Submounts
from rpc.errors import AlreadyExists, CasemateError, FailedPrecondition, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any

    from agent.containers import Guest
    from agent.reaper import Exit
    from agent.stdio import Stdio

    Json = dict[str, Any]

CGROUP_PARENT = "/containers"
_SIGKILL = 9
_log = logging.getLogger("casemate.agent")


class Container:
    def __init__(self, guest: Guest, container_id: str) -> None:
        self.id = container_id
        self.bundle = f"{guest.directory}/{container_id}"
        self._hooks_log = f"{self.bundle}/hooks.log"
        self.cgroup = Cgroup(f"{guest.cgroup_root}{CGROUP_PARENT}/{container_id}")
        self.execs: dict[str, Process] = {}
        self.paused = False
        self._guest = guest
        self._init: Process | None = None
        self._made = asyncio.Event()
        self._changing = asyncio.Lock()
        self._oom_watch = -1
        self._oom_kills = 0
        self._launched = 0
        self._submounts: Submounts | None = None
        self._simple = False
        self._ids = ids.Ids()

    @property
    def init(self) -> Process:
        if self._init is None:
            raise FailedPrecondition(f"container {self.id} is being created")
        return self._init

    def running(self, kind: str) -> Process:
        """init, whose namespace of this kind is to be joined. Raises FailedPrecondition if it has ended."""
        if self.init.gone:
            raise FailedPrecondition(f"{self.init.who} is stopped, its {kind} namespace cannot be joined")
        return self.init

    def process(self, exec_id: str) -> Process:
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"exec {exec_id} of container {self.id} does not exist") from None

    # its life

    async def create(self, spec: Json, *, terminal: bool, stdin: bool) -> int:
        """Returns init's pid. Nothing is left behind if it raises."""
        process_spec = spec["process"]
        executables.check_arguments(process_spec)
        filesystems.check(spec)
        network = sysctls.take_network(spec)
        self._ids = ids.of_spec(spec)
        self._guest.resolve_namespaces(spec)
        self._guest.name_host(spec)
        hooks.check(spec, "createContainer", "/")
        hooks.keep_words(spec, self._hooks_log)
        process_spec["terminal"] = terminal
        self._simple = _is_simple(spec)
        spec.setdefault("linux", {})["cgroupsPath"] = f"{CGROUP_PARENT}/{self.id}"
        process = Process(self.id, "", self._stdio(process_spec, terminal=terminal, stdin=stdin))
        made = ExitStack()
        try:
            os.makedirs(self.bundle)
            submounts.take_volumes_from(spec, self._guest.share, self._guest.volumes)
            self._submounts = Submounts(spec, self._guest.share)
            made.enter_context(self._nodes(spec))
            write(f"{self.bundle}/config.json", json.dumps(spec).encode())
            with sysctls.all_set(network, self._guest.sysctl_root, shared=self._guest.has_others(self)):
                ended = await self._launch(
                    process, "init", terminal, "create", "--bundle", self.bundle, self.id
                )
                self._check_command(f"/proc/{process.pid}/root", process_spec)
                hooks.check(spec, "startContainer", f"/proc/{process.pid}/root")
        except BaseException as error:
            process.stdio.close()
            said = hooks.words(self._hooks_log)
            await self._abandon()
            if isinstance(error, CrunFailed) and error.silent:
                self._check_command(spec["root"]["path"], process_spec)
            if said and isinstance(error, CrunFailed):
                raise CrunFailed(error.brief, f"{error.details}: {said}") from error
            raise
        finally:
            made.close()
            self._made.set()
        self._init = process
        self._oom_watch = self._guest.oom_watch.add(self.cgroup, self.look_for_oom)
        self._guest.follow(self._follow_init(process, ended))
        return process.pid

    async def start(self) -> None:
        async with self._changing:
            init = self.init
            if init.gone:
                raise FailedPrecondition(f"{init.who} is stopped, it cannot be started")
            init.state.started(init.who)  # refuses before crun does
            try:
                if not (self._simple and let_go(self._guest.crun.state(self.id))):
                    await self._crun("start", self.id)
            except NobodyWaitsError:
                raise FailedPrecondition(f"{init.who} is stopped, it cannot be started") from None
            if not init.gone:
                init.started()

    async def exec(self, exec_id: str, spec: Json, *, terminal: bool, stdin: bool) -> int:
        """Creates and starts one more process; returns its pid."""
        if exec_id in self.execs:
            raise AlreadyExists(f"exec {exec_id} of container {self.id} exists already")
        if self.paused:
            raise FailedPrecondition(f"container {self.id} is paused, nothing can be executed in it")
        executables.check_arguments(spec)
        self._check_alive()
        spec["terminal"] = terminal
        process = Process(self.id, exec_id, self._stdio(spec, terminal=terminal, stdin=stdin))
        self.execs[exec_id] = process
        self._launched += 1
        name = f"exec-{self._launched}"
        path = f"{self.bundle}/{name}.json"
        try:
            self._check_command(f"/proc/{self.init.pid}/root", spec)
            write(path, json.dumps(spec).encode())
            ended = await self._launch(
                process, name, terminal, "exec", "--detach", "--process", path, self.id
            )
        except BaseException as error:
            del self.execs[exec_id]
            process.stdio.close()
            process.settled.set()
            if isinstance(error, CasemateError | OSError):
                self._check_alive()  # the likeliest reason, if it is not
            raise
        finally:
            remove(path)
            remove(f"{self.bundle}/{name}.log")
        process.started()
        if self.init.gone:
            self.cgroup.kill()
        if process.unwanted and not process.gone:
            process.signal(_SIGKILL)
        self._guest.follow(self._follow_exec(process, ended))
        return process.pid

    def _check_alive(self) -> None:
        if self.init.gone:
            raise FailedPrecondition(f"container {self.id} is stopped, nothing can be executed in it")

    def signal(self, exec_id: str, number: int, *, everyone: bool) -> None:
        if not everyone or exec_id:
            self.process(exec_id).signal(number)
            return
        self.init.check_signal(number)
        if number == _SIGKILL:
            self.cgroup.kill()
            return
        for pid in self.cgroup.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # ended between the list and the signal

    async def pause(self) -> None:
        await self._freeze("pause", True)

    async def resume(self) -> None:
        await self._freeze("resume", False)

    async def update(self, resources: Json) -> None:
        async with self._changing:
            path = f"{self.bundle}/resources.json"
            write(path, json.dumps(resources).encode())
            try:
                await self._crun("update", "--resources", path, self.id)
            finally:
                remove(path)

    async def delete_exec(self, exec_id: str, *, kill: bool) -> None:
        process = self.process(exec_id)
        if kill:
            await process.end()
            if self.execs.get(exec_id) is not process:
                return  # it never came to be
        process.state.deleted(process.who)
        process.stdio.close()
        del self.execs[exec_id]

    async def delete(self, *, kill: bool) -> bool:
        """Removes what is left of a stopped container; with kill, of any. False if it never came to be."""
        if kill:
            await self._made.wait()
            if self._init is None:
                return False
        async with self._changing:
            if kill:
                self.cgroup.kill()
                await self.init.end()
            self.init.state.deleted(self.init.who)
            await self._discard()
        return True

    # inside

    def look_for_oom(self) -> None:
        kills = self.cgroup.oom_kills()
        if kills > self._oom_kills:
            self._oom_kills = kills
            self._guest.announce_oom(self.id)

    async def _follow_init(self, init: Process, ended: asyncio.Future[Exit]) -> None:
        """Announces init's end, after those of everything else in the container."""
        how = await ended
        if said := hooks.words(self._hooks_log):
            _log.info("container %s: its hooks: %s", self.id, said)
        try:
            self.cgroup.kill()  # the kernel has, unless the pid namespace is shared
            for process in list(self.execs.values()):
                await process.settled.wait()
            self.look_for_oom()
        finally:
            init.exited(how)
            self._guest.announce_exit(init, how)

    async def _follow_exec(self, process: Process, ended: asyncio.Future[Exit]) -> None:
        how = await ended
        try:
            self.look_for_oom()
        finally:
            process.exited(how)
            self._guest.announce_exit(process, how)

    async def _freeze(self, command: str, paused: bool) -> None:
        async with self._changing:
            if self.init.gone:
                raise FailedPrecondition(f"container {self.id} is stopped")
            if self.paused is paused:
                raise FailedPrecondition(f"container {self.id} is {'' if paused else 'not '}paused")
            await self._crun(command, self.id)
            self.paused = paused

    def _nodes(self, spec: Json) -> AbstractContextManager[None]:
        if self._ids.is_same() or not spec["linux"].get("devices"):
            return nullcontext()
        from agent import devices

        return devices.nodes_of(spec, f"{devices.NODES}/{self.id}")

    def _stdio(self, process_spec: Json, *, terminal: bool, stdin: bool) -> Stdio:
        stdio = make_stdio(terminal=terminal, stdin=stdin)
        if not self._ids.is_same():
            user = process_spec.get("user") or {}
            uid, gid = self._ids.uid_outside(user.get("uid", 0)), self._ids.gid_outside(user.get("gid", 0))
            if uid is not None and gid is not None:  # else crun has a word to say
                stdio.give_to(uid, gid)
        return stdio

    def _check_command(self, root: str, process_spec: Json) -> None:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            executables.check(root_fd, executables.Command.of(process_spec, self._ids))
        finally:
            os.close(root_fd)

    async def _launch(
        self, process: Process, name: str, terminal: bool, *command: str
    ) -> asyncio.Future[Exit]:
        return await launch(
            self._guest.crun, self._guest.reaper, process, f"{self.bundle}/{name}", terminal, *command
        )

    async def _crun(self, command: str, *arguments: str) -> None:
        await self._guest.crun.run(f"{self.bundle}/{command}.log", command, *arguments)

    async def _discard(self) -> None:
        """Whatever exists of it goes."""
        for process in self.execs.values():
            process.stdio.close()
        if self._init is not None:
            self._init.stdio.close()
        self._guest.oom_watch.remove(self._oom_watch)
        self.cgroup.kill()
        made = self._init is not None
        if not (made and self._simple and take_away(self._guest.crun.state(self.id), self.cgroup)):
            await self._crun("delete", "--force", self.id)
        if self._submounts is not None:
            self._submounts.release()
        remove_directory(self.bundle)

    async def _abandon(self) -> None:
        """_discard() on the way out of another error, which is the one to be told."""
        try:
            await self._discard()
        except CasemateError as error:
            _log.warning("container %s was not cleaned up: %s", self.id, error)
            remove_directory(self.bundle)


def _is_simple(spec: Json) -> bool:
    """Whether crun has nothing to do for it when it starts and when it is deleted but what state.py does."""
    return not spec.get("hooks") and "intelRdt" not in spec.get("linux", {})
