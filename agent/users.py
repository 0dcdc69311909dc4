"""The user namespace of a pod, and the network, IPC and UTS namespaces that belong to it.

Who has a capability in a user namespace has it over what belongs to that: so a pod's root may change the
pod's network and host name, as under runc. The agent itself goes into those, and all containers are where it
is; only the user namespace is the containers' to join. Must not know of containers.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager

from agent import boot, ids, libc, uevents
from agent.files import read
from rpc.errors import Internal, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from agent.ids import Ids

_SHARED = {"net": libc.CLONE_NEWNET, "ipc": libc.CLONE_NEWIPC, "uts": libc.CLONE_NEWUTS}
_WORDS_BYTES = 256


class Users:
    """fd: of the user namespace. path: by which it can be joined."""

    def __init__(self, wanted: Ids) -> None:
        """Raises InvalidArgument for mappings that the kernel does not take. The agent is where it was."""
        self.ids = wanted
        self._first_net = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with ExitStack() as undo:
            undo.callback(os.close, self._first_net)
            self.fd, self._shared = _make(wanted)
            undo.pop_all()
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def net(self) -> int:
        """A descriptor of the pod's network namespace."""
        return self._shared["net"]

    def enter(self) -> None:
        """The agent, and whatever it starts from here on."""
        for kind, fd in self._shared.items():
            libc.setns(fd, _SHARED[kind])
        uevents.told_in(self.where_devices_come)
        boot.loopback_up()

    @contextmanager
    def where_devices_come(self) -> Iterator[None]:
        """In the machine's first network namespace: there a new device's interface appears."""
        libc.setns(self._first_net, libc.CLONE_NEWNET)
        try:
            yield
        finally:
            libc.setns(self.net, libc.CLONE_NEWNET)


def of_process(pid: int) -> Ids:
    """Those of the user namespace that a process is in. Raises FileNotFoundError."""
    uids, gids = (ids.read_lines(read(f"/proc/{pid}/{kind}_map").decode()) for kind in ("uid", "gid"))
    return ids.Ids(uids, gids)


def _make(wanted: Ids) -> tuple[int, dict[str, int]]:
    """Descriptors of a new user namespace and of those that belong to it, by their names in /proc/PID/ns.

    Nothing is in them: a process of ours makes them, and ends.
    """
    with ExitStack() as undo:
        heard, says = os.pipe2(os.O_CLOEXEC)
        told, tells = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.close(tells)
            _be_maker(says, told)
        undo.callback(os.waitpid, pid, 0)
        undo.callback(os.close, tells)  # whoever waits for a word ends
        os.close(told)
        os.close(says)
        undo.callback(os.close, heard)
        _expect(heard)
        for kind, mapping in (("uid", wanted.uids), ("gid", wanted.gids)):
            try:
                with open(f"/proc/{pid}/{kind}_map", "wb", buffering=0) as file:
                    file.write(ids.lines(mapping or ()).encode())
            except OSError as error:
                raise InvalidArgument(
                    f"user namespace: the kernel does not take linux.{kind}Mappings",
                    os.strerror(error.errno or 0),
                ) from error
        os.write(tells, b".")
        _expect(heard)
        flags = os.O_RDONLY | os.O_CLOEXEC
        shared: dict[str, int] = {}
        with ExitStack() as opened:
            for kind in ("user", *_SHARED):
                shared[kind] = os.open(f"/proc/{pid}/ns/{kind}", flags)
                opened.callback(os.close, shared[kind])
            opened.pop_all()
        return shared.pop("user"), shared


def _expect(heard: int) -> None:
    if (said := os.read(heard, _WORDS_BYTES)) != b".":
        raise Internal("the pod's user namespace could not be made", said.decode(errors="replace"))


def _be_maker(says: int, told: int) -> NoReturn:
    try:
        libc.unshare(libc.CLONE_NEWUSER)
        os.write(says, b".")
        if os.read(told, 1):
            flags = 0
            for flag in _SHARED.values():
                flags |= flag
            libc.unshare(flags)
            os.write(says, b".")
            os.read(told, 1)
    except BaseException as error:  # noqa: BLE001 - whoever forked us raises what is written here
        os.write(says, f"{type(error).__name__}: {error}".encode()[:_WORDS_BYTES])
    finally:
        os._exit(0)
