"""A process of the pool: a shim without a pod, with a machine that waits for one.

It is forked by the fork server for casemated, which holds the other end of its lifeline: when that ends, so
does the process. Ready, it listens at RUN/spares/ID/claim.sock for one child of the fork server that has a
`start` to serve (node/claim.py), and then is that pod's shim for ever after. Until it has told `start` so
(`mine`) nothing is done that the process's end does not undo.

It must not know how many there are, nor why.
"""

import asyncio
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NoReturn

from config import load, places
from config.settings import from_mapping
from node import likeness
from node.order import Order, from_words
from rpc.errors import CasemateError, FailedPrecondition, PermissionDenied
from shim import cgroup, daemon, forkserver, network, phases, seclusion, system
from shim.anchor import Anchors
from shim.apprentice import nobody_stands_by
from shim.bootstrap import Start, listen
from shim.cleanup import remove_tree
from shim.helper import in_thread, reap_orphans
from shim.journal import Entry, Journal, Kind
from shim.logs import set_up_logging
from shim.main import Daemon, serve_in_loop
from shim.namespaces import HostNamespaces
from shim.paths import CLAIM, PodPaths, run_dir
from shim.trace import Trace, write_json
from shim.vm import sources
from shim.vm.spare import Reserve, Spare

NAME = "casemate-spare"
# The kernel ends what waits before what works.
OOM_SCORE = daemon.MOST_OOM_SCORE
LOWEST_PRIORITY = 19
CLAIM_S = 2.0
# As Python has it; the others are as they should be for what is executed.
IGNORED = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
HANDLED = frozenset((signal.SIGCHLD, signal.SIGTERM, signal.SIGINT))


def live(lifeline: socket.socket, words: dict[str, Any]) -> NoReturn:
    """In a child of the fork server that has one thread. words: an Order's."""
    status = 1
    try:
        system.set_process_name(NAME)
        order = from_words(words, likeness.own_nature())
        likeness.become(order.nature)
        likeness.ignore(IGNORED)
        spare_id = order.digest + os.urandom(4).hex()
        _be_plain(spare_id)
        paths = PodPaths.of_spare(spare_id)
        paths.directory.mkdir(mode=0o711)
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
        log = os.open(paths.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for fd in (1, 2):
            os.dup2(log, fd)
        os.close(log)
        daemon.detach()
        daemon.set_oom_score(OOM_SCORE, ("self",))
        gc.enable()
        host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        host_mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        host = HostNamespaces.current()
        system.unshare(system.CLONE_NEWNS | system.CLONE_NEWPID)
        if os.fork():
            os._exit(0)
        daemon.enter_namespaces(paths)
        system.set_process_name(NAME)
        journal = Journal(paths.journal)
        journal.add_process(system.host_pid(host_proc), host_proc)
        network.make_network()
        anchors = Anchors(host_proc, run_dir() / "users", paths.homes[0])
        process = Process(order, paths, lifeline, journal, anchors, host_proc, host, host_mounts)
        asyncio.run(process.run())
        status = 0
    except BaseException:  # noqa: BLE001 - the log is the only place left to say it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _be_plain(spare_id: str) -> None:
    """Nothing of casemated's is seen by what is executed from here on, but where its files are."""
    kept = {
        name: value for name, value in os.environ.items() if name.startswith("CASEMATE_") or name == "PATH"
    }
    os.environ.clear()
    os.environ.update(kept)
    system.set_command_line([NAME.encode(), spare_id.encode()])


class Process:
    """One spare, in its namespaces, from the making of its machine to the end of the pod that it became."""

    def __init__(
        self,
        order: Order,
        paths: PodPaths,
        lifeline: socket.socket,
        journal: Journal,
        anchors: Anchors,
        host_proc: int,
        host: HostNamespaces,
        host_mounts: int,
    ) -> None:
        self._order = order
        self._paths = paths
        self._lifeline = lifeline
        self._journal = journal
        self._anchors = anchors
        self._host_proc = host_proc
        self._host = host
        self._host_mounts = host_mounts
        self._is_a_pods = False

    async def run(self) -> None:
        """Until its lifeline ends, or its pod does."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, reap_orphans)
        self._lifeline.setblocking(False)
        set_up_logging(self._order.settings.log_level, "")
        self._ended = asyncio.ensure_future(_until_told_to_end(self._lifeline))
        serving = asyncio.create_task(self._serve())
        try:
            await asyncio.wait([self._ended, serving], return_when=asyncio.FIRST_COMPLETED)
            if not self._is_a_pods:
                serving.cancel()
            await serving
        except asyncio.CancelledError:
            pass  # it was to end
        except BaseException:
            self._tell({"failed": traceback.format_exc()})
            raise
        finally:
            self._ended.cancel()
            if not self._is_a_pods:
                seclusion.show_other_pods(self._paths)
                remove_tree(self._paths.directory)

    async def _serve(self) -> None:
        """Makes the machine, waits to be claimed, is the pod."""
        try:
            spare = await self._make()
        except (CasemateError, OSError) as error:
            self._tell({"failed": str(error)})
            return
        try:
            claim = await self._be_claimed(spare)
        except BaseException:
            await spare.stop()
            raise
        if claim is None:
            await spare.stop()
            return
        await self._be_a_pods(spare, claim)

    async def _make(self) -> Spare:
        order = self._order
        request = order.wants.request("", order.settings, self._paths)
        trace = Trace("", self._paths.key, time.time())
        spare = await sources.make_spare(request, trace)
        try:
            system.return_memory()
            for pid in _pids():
                _set_priority(pid, order.nature["nice"])
            profile, facts = order.wants.profile, spare.machine.facts
            pid = system.host_pid(self._host_proc)
            about = {
                "id": self._paths.key,
                "pid": pid,
                "start_time": system.start_time(pid, self._host_proc),
                "profile": profile.name,
                "vcpus": profile.vcpus,
                "memory_bytes": profile.memory_bytes,
                "files": facts.files,
                "accel": facts.accel.kind,
                "tenant": order.wants.tenant,
                "created_at": trace.created_at,
            }
            write_json(self._paths.state, about)
        except BaseException:
            await spare.stop()
            raise
        return spare

    async def _be_claimed(self, spare: Spare) -> "Claim | None":
        """None: its machine has ended, or the one who came was not served."""
        path = self._paths.directory / CLAIM
        listener = listen(str(path))
        listener.setblocking(False)
        accepting = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
        self._tell({"ready": self._paths.key})
        try:
            waits: list[asyncio.Future[Any]] = [accepting, asyncio.shield(spare.machine.lost)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                self._tell({"failed": str(spare.machine.lost.result())})
                return None
        finally:
            accepting.cancel()
            listener.close()
            path.unlink()
        connection, _ = accepting.result()
        self._tell({"taken": self._paths.key})
        with connection:
            try:
                return self._answer(connection, spare)
            except (OSError, ValueError, KeyError, TypeError) as error:
                sys.stderr.write(f"casemate: the one who came has left: {type(error).__name__}: {error}\n")
                return None

    def _answer(self, connection: socket.socket, spare: Spare) -> "Claim | None":
        """Raises what goes wrong with the other side."""
        words, fds = forkserver.receive(connection, time.monotonic() + CLAIM_S)
        for fd in fds:
            os.close(fd)
        try:
            if forkserver.peer(connection)[1] != os.geteuid():
                raise PermissionDenied("another user's")
            if from_words(words["order"], {}) != self._order:
                raise FailedPrecondition("it was made for another kind of pod")
            self._check_mounts()
            spare.check()
        except (CasemateError, OSError) as error:
            forkserver.send(connection, {"declined": str(error)}, time.monotonic() + CLAIM_S)
            return None
        forkserver.send(connection, {"granted": True}, time.monotonic() + CLAIM_S)
        go, fds = forkserver.receive(connection, time.monotonic() + CLAIM_S)
        with ExitStack() as undo:
            for fd in fds:
                undo.callback(os.close, fd)
            claim = Claim(words, go, fds)
            forkserver.send(connection, {"has": True}, time.monotonic() + CLAIM_S)
            with socket.socket(fileno=os.dup(claim.start)) as start:
                forkserver.send(start, {"mine": system.host_pid(self._host_proc)}, time.monotonic() + CLAIM_S)
            undo.pop_all()
        os.close(claim.start)
        self._is_a_pods = True
        return claim

    def _check_mounts(self) -> None:
        """What the host has mounted since has come here too, unless its mounts are private.

        Raises FailedPrecondition.
        """
        os.lseek(self._host_mounts, 0, os.SEEK_SET)
        with open(self._host_mounts, "rb", closefd=False) as file:
            theirs = _mounts(file)
        with open("/proc/self/mountinfo", "rb") as file:
            ours = _mounts(file)
        if missing := theirs - ours:
            _, _, point = min(missing)
            raise FailedPrecondition(f"{point.decode(errors='replace')} was mounted on the host since")

    async def _be_a_pods(self, spare: Spare, claim: "Claim") -> None:
        """What goes wrong from here on ends the process, as it ends any shim."""
        request = claim.request
        claim.wear()
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)
        self._lifeline.close()
        trace = daemon.trace_of_start(request, claim.started_ticks, claim.bound_s)
        self._journal.add(Entry(Kind.SOCKET, request.socket_path))
        if claim.network is not None:
            network.enter(claim.network)
            os.close(claim.network)
        pids = _pids()
        daemon.set_oom_score(min(claim.oom_score_adj + 1, daemon.MOST_OOM_SCORE), pids)
        place = cgroup.Place(request.paths.key)

        def settle_in() -> None:
            self._host.run(partial(_take_place, self._paths.key, request.paths))
            with trace.span(phases.POD_CGROUP, phases.POD_READY):
                others = [pid for pid in pids if pid != os.getpid()]
                cgroup.follow(claim.cgroups, others)
                place.enter(request.spec, self._journal, pids)

        placed = in_thread(settle_in)
        trace.add(phases.DETACH, claim.bound_s, time.monotonic(), detail="pool")
        served = Daemon(
            request=request,
            paths=self._paths,
            settings=claim.settings,
            listener=socket.socket(fileno=claim.listener),
            trace=trace,
            journal=self._journal,
            host_proc=self._host_proc,
            host=self._host,
            anchors=self._anchors,
            place=place,
            standby=nobody_stands_by(claim.settings, request.namespace, request.spec),
            refusal=None,
        )
        await serve_in_loop(served, Reserve(spare, placed))

    def _tell(self, words: dict[str, Any]) -> None:
        """casemated, which may be gone."""
        with suppress(OSError):
            forkserver.send(self._lifeline, words, time.monotonic() + CLAIM_S)
            self._lifeline.setblocking(False)


class Claim:
    """What the child of the fork server has handed over: who asked, and for what."""

    def __init__(self, words: dict[str, Any], go: dict[str, Any], fds: list[int]) -> None:
        """fds: the connection to `start`, its listener, and the pod's network where there is one.

        Raises KeyError, TypeError or ValueError for what is not of this version.
        """
        self.start, self.listener, *more = fds
        self.network: int | None = more[0] if more else None
        self.request = Start.from_words(words["request"])
        self.settings = from_mapping(words["order"]["settings"])
        self.unreported = list(words["unreported"])
        self.environment = dict(words["environment"])
        self.argv = [bytes.fromhex(word) for word in words["argv"]]
        self.started_ticks = int(words["started"])
        self.cgroups = str(words["cgroups"])
        self.oom_score_adj = int(words["oom_score_adj"])
        self.ignored = int(words["ignored"])
        self.bound_s = float(go["bound_s"])

    def wear(self) -> None:
        """containerd's environment of that `start`, and its command line, by which a shim is found."""
        os.environ.clear()
        os.environ.update(self.environment)
        for name in daemon.NOT_FOR_CHILDREN:
            os.environ.pop(name, None)
        os.environ["CASEMATE_POD"] = daemon.pod_name(self.request)
        time.tzset()
        system.set_command_line(self.argv)
        system.set_process_name("casemate-shim")
        likeness.ignore(self.ignored, HANDLED)
        load.unreported[:] = self.unreported


async def _until_told_to_end(lifeline: socket.socket) -> None:
    """casemated says nothing: whatever comes is its end, or its wish."""
    with suppress(OSError):
        await asyncio.get_running_loop().sock_recv(lifeline, 1)


def _take_place(spare_id: str, pod: PodPaths) -> None:
    """On the host, our directory becomes the pod's, and the one that `start` has made goes away.

    Our journal has the socket too, so that whichever of the two is found after a crash is complete.
    """
    spare = PodPaths.of_spare(spare_id)
    os.truncate(pod.journal, 0)
    system.exchange(str(spare.directory), str(pod.directory))
    remove_tree(spare.directory)


def _pids() -> list[int]:
    """Every process of our PID namespace."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _set_priority(pid: int, nice: int) -> None:
    """Of all its threads. One that has ended meanwhile is no matter."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def _mounts(mountinfo: Iterable[bytes]) -> set[tuple[bytes, bytes, bytes]]:
    """(device, root, mount point) of each, as of proc(5)."""
    hidden = os.fsencode(places.run_dir()) + b"/"
    rows = (line.split(maxsplit=5)[2:5] for line in mountinfo)
    return {(device, root, point) for device, root, point in rows if not point.startswith(hidden)}
