"""The process that makes a template: in namespaces of its own as a pod's shim is, and at the lowest priority.

A pod's shim cannot start it when it finds no template: what it starts dies with the pod. So `stand_by` forks
it before the shim goes into its namespaces, where it waits for a word that mostly never comes. It must not
know how a template is made.
"""

import json
import logging
import os
import signal
import sys
from contextlib import closing, suppress
from pathlib import Path

from rpc.errors import CasemateError
from shim import seclusion, system
from shim.journal import Journal
from shim.paths import PodPaths, run_dir, sha256_hex
from shim.trace import Trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

    from config.settings import Profile, Settings
    from shim.vm.backing import Backing
    from shim.vm.guest import Facts
    from shim.vm.passthrough import Function

    Devices = tuple[tuple[Function, ...], Backing | None]

NAMESPACE = "casemate.templates"
LOWEST_PRIORITY = 19
MOST_WORDS_BYTES = 1 << 16
NOTHING_TO_DO = b"\n"
TENANT_ANNOTATION = "io.kubernetes.cri.sandbox-namespace"
log = logging.getLogger("casemate")


def tenant_of(profile: "Profile", namespace: str, annotations: "Mapping[str, Any]") -> str:
    """Whose templates a pod may come from: everybody's (""), or its Kubernetes or containerd namespace's."""
    if profile.template != "tenant":
        return ""
    return str(annotations.get(TENANT_ANNOTATION) or namespace)


class Standby:
    """A waiting apprentice, or the knowledge that none is needed: a pod like this one was restored before."""

    def __init__(self, hint: Path, words: int) -> None:
        self.hint = hint
        self._words = words

    def settle(self, profile: "Profile", tenant: str, facts: "Facts", *, wished: bool) -> None:
        """Once the pod's own machine runs: its start must not be slower for the sake of the next one's."""
        if wished:
            self.make(profile, tenant, facts)
        elif facts.restored:
            self.not_needed()
        else:
            self.dismiss()

    def make(self, profile: "Profile", tenant: str, facts: "Facts") -> None:
        """Has the template of this shape made. The next pod like this one has an apprentice in any case."""
        system.unlink_if_there(self.hint)
        if self._words < 0:
            return
        order: dict[str, Any] = {"profile": vars(profile), "tenant": tenant}
        if facts.devices:
            from shim.vm import plugging

            order |= plugging.as_json(facts.devices, facts.backing)
        try:
            os.write(self._words, json.dumps(order).encode())
        except BrokenPipeError:
            log.warning("no template is made: the process that was to make it is gone")
        self.dismiss()

    def not_needed(self) -> None:
        """This pod was restored: those that are like it need no apprentice."""
        self.dismiss()
        try:
            self.hint.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.hint.touch(mode=0o600)
        except OSError as error:
            log.warning("%s: %s", self.hint, error)

    def dismiss(self) -> None:
        """Said, not only by closing: other children of the shim's hold the same end of the pipe."""
        if self._words < 0:
            return
        with suppress(BrokenPipeError):  # it has its order and is at work, or gone
            os.write(self._words, NOTHING_TO_DO)
        os.close(self._words)
        self._words = -1


def nobody_stands_by(settings: "Settings", namespace: str, spec: "dict[str, Any] | None") -> Standby:
    """For a pod whose machine was restored before it asked."""
    return Standby(run_dir() / "cache" / "restorable" / _likeness(settings, namespace, spec), -1)


def stand_by(settings: "Settings", namespace: str, spec: "dict[str, Any] | None", keep: int) -> Standby:
    """Before the caller enters namespaces. keep: a descriptor that the apprentice must not hold open."""
    nobody = nobody_stands_by(settings, namespace, spec)
    if not settings.make_templates or nobody.hint.exists():
        return nobody
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.close(keep)
        _wait(settings, reading)
    os.close(reading)
    return Standby(nobody.hint, writing)


def _likeness(settings: "Settings", namespace: str, spec: "dict[str, Any] | None") -> str:
    """The same for pods that come from the same template. Two names for one template do no harm."""
    annotations = (spec or {}).get("annotations")
    known = annotations if isinstance(annotations, dict) else {}
    ours = {key: known[key] for key in known if str(key).startswith("dev.casemate")}
    mounts = (spec or {}).get("mounts")
    binds = isinstance(mounts, list) and any("bind" in str(mount) for mount in mounts)
    told = [
        *(settings.default_profile, sorted(ours.items()), namespace, str(known.get(TENANT_ANNOTATION))),
        binds,  # which may decide how files come
    ]
    return sha256_hex(json.dumps(told, default=str))[:16]


def _wait(settings: "Settings", words: int) -> "NoReturn":
    status = 1
    try:
        order = os.read(words, MOST_WORDS_BYTES)
        os.close(words)
        if order.strip():
            from config.settings import Profile

            wanted = json.loads(order)
            profile = Profile(**wanted["profile"])
            devices: Devices = ((), None)
            if "functions" in wanted:
                from shim.vm import plugging

                devices = plugging.from_json(wanted)
            status, _ = make(settings, profile, wanted["tenant"], settings.templates_kept, devices)
        else:
            status = 0
    except BaseException:  # noqa: BLE001 - the pod's log is the only place left to say it
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def make(
    settings: "Settings",
    profile: "Profile",
    tenant: str,
    most: int | None = None,
    devices: "Devices" = ((), None),
) -> tuple[int, PodPaths]:
    """Makes a template in a child that takes everything with it when it ends.

    most: as make_template() has it. devices: which the machines are to have, and what their RAM is of.
    Returns its exit status, and where its log is, in `ended`.
    """
    paths = PodPaths(NAMESPACE, f"{profile.name}-{os.urandom(4).hex()}")
    paths.directory.mkdir(mode=0o711, parents=True)
    log_file = os.open(paths.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    child = os.fork()
    if child == 0:
        _seclude(settings, profile, tenant, most, devices, paths, log_file)
    os.close(log_file)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), paths


def _seclude(
    settings: "Settings",
    profile: "Profile",
    tenant: str,
    most: int | None,
    devices: "Devices",
    paths: PodPaths,
    log_file: int,
) -> "NoReturn":
    status = 1
    try:
        os.setsid()
        os.nice(LOWEST_PRIORITY)
        for fd in (1, 2):
            os.dup2(log_file, fd)
        host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        system.unshare(system.CLONE_NEWNS | system.CLONE_NEWPID | system.CLONE_NEWNET)
        child = os.fork()
        if child:
            status = abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            with closing(Journal(paths.journal)) as journal:
                journal.add_process(system.host_pid(host_proc), host_proc)
                _run(settings, profile, tenant, most, devices, paths)
            status = 0
    except CasemateError as error:
        sys.stderr.write(f"casemate: no template: {error}\n")
    except BaseException:  # noqa: BLE001 - the log is the only place left to say it
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _run(
    settings: "Settings",
    profile: "Profile",
    tenant: str,
    most: int | None,
    devices: "Devices",
    paths: PodPaths,
) -> None:
    """The event loop of the one that makes it, as first process of its PID namespace."""
    import asyncio
    import time

    from shim.cleanup import retire
    from shim.helper import reap_orphans
    from shim.logs import set_up_logging
    from shim.vm.maker import make_template
    from shim.vm.setting import MachineRequest

    seclusion.enter(paths)
    system.set_process_name("casemate-maker")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    set_up_logging(settings.log_level, "")
    request = MachineRequest.of_nobody(profile, settings, paths, tenant, *devices)

    async def main() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, reap_orphans)
        await make_template(request, Trace(NAMESPACE, paths.key, time.time()), most)

    try:
        asyncio.run(main())
    finally:
        seclusion.show_other_pods(paths)
        retire(paths, settings.traces_kept)
