"""Taking a machine of the pool: what both sides say to each other, over real sockets, files and ends.

The machine is a stub, and so is what its process then does to be the pod's (its log, what it sees of other
pods): tests/vm/test_pool.py has these with a machine.
"""

import asyncio
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from config.load import load
from config.settings import Settings
from node import spare as spare_module
from node.claim import Claimed, claim, order_of
from node.likeness import Likeness
from node.order import Order, from_words
from node.spare import Claim, Process
from rpc.errors import FailedPrecondition, Unavailable
from shim import forkserver, kubelet, seclusion, system
from shim.bootstrap import Arguments, Start
from shim.paths import CLAIM, PodPaths
from tests.unit.shim.pods import config

SOON_S = 30.0


class Machine:
    """Of a spare: whether it may be given, and whether it was ended."""

    def __init__(self) -> None:
        self.machine = self
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.refusal: Exception | None = None
        self.ended = False

    def check(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def stop(self) -> None:
        self.ended = True


class Host:
    """A run directory with one machine that waits, whose process runs in this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.directory = directory
        (directory / "etc").mkdir()
        (directory / "etc/config.toml").write_text(
            '[profiles.default]\ntemplate = "tenant"\n[node.pool]\ndefault = 1\n'
        )
        monkeypatch.setenv("CASEMATE_RUN_DIR", str(directory / "run"))
        monkeypatch.setenv("CASEMATE_CONFIG_DIR", str(directory / "etc"))
        for limit in ("node.claim.ANSWER_S", "node.spare.CLAIM_S"):  # of a machine that is not slow
            monkeypatch.setattr(limit, SOON_S)
        monkeypatch.setattr(spare_module, "set_up_logging", lambda *_: None)
        monkeypatch.setattr(seclusion, "show_other_pods", lambda _: None)
        monkeypatch.setattr(Process, "_make", lambda _: self._machine())
        monkeypatch.setattr(Process, "_be_a_pods", lambda _, __, claim: self._taken(claim))
        self.settings: Settings = load()
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.mounts = os.open("/proc/self/mountinfo", os.O_RDONLY)
        self.alike = Likeness(os.getpid(), system.start_time("self"))
        self.casemated, self.lifeline = socket.socketpair()
        self.refusal: Exception | None = None
        self.hangs = False
        self.machines: list[Machine] = []
        self.claims: list[Claim] = []

    def request(self, tenant: str = "acme") -> Start:
        arguments = Arguments(["-namespace", "k8s.io", "-address", "/a", "-id", "web", "start"])
        document = config()
        document["annotations"] = {"io.kubernetes.cri.sandbox-namespace": tenant}
        return Start(arguments, "/bundle", "web", document)

    def order(self, tenant: str = "acme") -> Order:
        order = order_of(self.request(tenant), self.settings, self.alike)
        assert order is not None
        return order

    async def _machine(self) -> Machine:
        if self.hangs:
            self.casemated.close()
            await asyncio.Event().wait()
        machine = Machine()
        machine.refusal = self.refusal
        self.machines.append(machine)
        return machine

    async def _taken(self, claim: Claim) -> None:
        self.claims.append(claim)
        for fd in (claim.listener, claim.network):
            if fd is not None:
                os.close(fd)

    def live(self, taking: Callable[[], None], tenant: str = "acme", digest: str = "") -> None:
        """The life of one machine's process, while `taking` runs in a thread once it waits."""
        paths = PodPaths.of_spare((digest or self.order(tenant).digest) + os.urandom(4).hex())
        paths.directory.mkdir(parents=True)
        nothing: Any = None
        order = from_words(self.order(tenant).words(), {})  # as it comes from casemated
        process = Process(order, paths, self.lifeline, nothing, nothing, self.proc, nothing, self.mounts)
        failed: list[BaseException] = []
        thread = threading.Thread(target=self._when_ready, args=(paths.directory / CLAIM, taking, failed))
        thread.start()
        asyncio.run(asyncio.wait_for(process.run(), SOON_S))
        thread.join()
        if failed:
            raise failed[0]
        if not self.claims:
            assert not paths.directory.exists()

    def _when_ready(self, path: Path, taking: Callable[[], None], failed: list[BaseException]) -> None:
        try:
            if not self.hangs:
                words, _ = forkserver.receive(self.casemated, time.monotonic() + SOON_S)
                assert words == {"ready": path.parent.name}
            taking()
        except BaseException as error:  # noqa: BLE001 - raised by live()
            failed.append(error)

    def claim(self, tenant: str = "acme") -> tuple[Claimed | None, str]:
        """As a child of the fork server does that has a `start` to serve."""
        hello = {
            "request": self.request(tenant).words(),
            "unreported": [],
            "environment": {"NAME": "value"},
            "argv": [],
            "started": 1,
        }
        return claim(self.order(tenant), self.request(tenant), hello, self.alike)

    def told(self) -> list[str]:
        """What casemated has heard since the machine was ready."""
        words: list[str] = []
        with suppress(OSError):
            while True:
                words += forkserver.receive(self.casemated, time.monotonic())[0]
        return words

    def close(self) -> None:
        self.alike.close()
        self.casemated.close()
        self.lifeline.close()
        for fd in (self.proc, self.mounts):
            os.close(fd)


def descriptors() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.add(f"{fd.name} {os.readlink(fd)}")
    return found


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))  # short enough for sockets
    host = Host(monkeypatch, directory)
    before = descriptors()
    yield host
    left = descriptors() - before
    host.close()
    assert not left
    shutil.rmtree(directory)


class Client:
    """A `start`: its end of the connection to the fork server's child, the child's, and what it has bound."""

    def __init__(self) -> None:
        self.own, self.childs = socket.socketpair()
        self.listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.own, self.childs, self.listener):
            each.close()

    def hand_over(self, claimed: Claimed | None) -> bool:
        assert claimed is not None
        return claimed.hand_over(self.childs, self.listener.fileno(), 2.5)

    def is_served(self) -> bool:
        """Whether somebody has said that the pod is theirs; nobody can any more, then."""
        self.childs.close()
        try:
            return "mine" in forkserver.receive(self.own, time.monotonic() + SOON_S)[0]
        except ConnectionResetError:
            return False


def test_who_takes_it_has_it_told_to_start_and_casemated(host: Host) -> None:
    def taking() -> None:
        claimed, why = host.claim()
        assert why == ""
        with Client() as start:
            assert start.hand_over(claimed)
            assert start.is_served()

    host.live(taking)
    (taken,) = host.claims
    assert (taken.request.pod_id, taken.bound_s, taken.environment) == ("web", 2.5, {"NAME": "value"})
    assert host.told() == ["taken"]
    assert [machine.ended for machine in host.machines] == [False]  # the pod's it is


def test_who_is_killed_half_way_has_taken_nothing_and_nobody_else_gets_it(host: Host) -> None:
    def taking() -> None:
        claimed, _ = host.claim()
        assert claimed is not None
        claimed.close()

    host.live(taking)
    assert host.claims == []
    assert host.told() == ["taken"]  # another one will be made
    assert [machine.ended for machine in host.machines] == [True]


def test_a_start_that_waits_no_longer_is_not_served(host: Host) -> None:
    def taking() -> None:
        claimed, _ = host.claim()
        with Client() as start:
            start.own.shutdown(socket.SHUT_RD)
            start.hand_over(claimed)
            assert not start.is_served()

    host.live(taking)
    assert host.claims == []
    assert [machine.ended for machine in host.machines] == [True]


def test_of_two_who_come_at_once_one_gets_it(host: Host) -> None:
    answers: list[tuple[Claimed | None, str]] = []

    def taking() -> None:
        threads = [threading.Thread(target=lambda: answers.append(host.claim())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with Client() as start:
            assert start.hand_over(next(claimed for claimed, _ in answers if claimed is not None))
            assert start.is_served()

    host.live(taking)
    assert len(host.claims) == 1
    assert sorted(why for _, why in answers) == ["", "the pool is empty"]


def test_casemated_that_is_killed_meanwhile_costs_no_pod(host: Host) -> None:
    def taking() -> None:
        claimed, _ = host.claim()
        host.casemated.close()
        with Client() as start:
            assert start.hand_over(claimed)
            assert start.is_served()

    host.live(taking)
    assert len(host.claims) == 1


def test_what_waits_ends_with_casemated(host: Host) -> None:
    host.live(host.casemated.close)
    assert host.claims == []
    assert [machine.ended for machine in host.machines] == [True]


def test_what_is_being_made_ends_with_casemated(host: Host) -> None:
    host.hangs = True
    host.live(lambda: None)
    assert (host.claims, host.machines) == ([], [])


def test_another_tenants_machine_is_not_to_be_had(host: Host) -> None:
    """Not even where the digests in the directories' names were the same."""

    def taking() -> None:
        claimed, why = host.claim("other")
        assert claimed is None
        assert why == "a machine of the pool was given up: it was made for another kind of pod"

    host.live(taking, digest=host.order("other").digest)
    assert host.claims == []
    assert [machine.ended for machine in host.machines] == [True]


def test_a_machine_that_no_pod_would_be_given_now_is_given_up(host: Host) -> None:
    host.refusal = FailedPrecondition("QEMU was replaced")

    def taking() -> None:
        assert host.claim() == (None, "a machine of the pool was given up: QEMU was replaced")

    host.live(taking)
    assert host.claims == []
    assert [machine.ended for machine in host.machines] == [True]


def test_a_machine_that_has_ended_is_told_of(host: Host) -> None:
    def taking() -> None:
        (machine,) = host.machines
        machine.lost.get_loop().call_soon_threadsafe(machine.lost.set_result, Unavailable("QEMU ended"))

    host.live(taking)
    assert host.told() == ["failed"]
    assert host.claim() == (None, "the pool is empty")


def test_nonsense_takes_nothing(host: Host) -> None:
    def taking() -> None:
        (path,) = host.directory.glob("run/spares/*/" + CLAIM)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"\0\0\0\4null")
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""

    host.live(taking)
    assert host.claims == []
    assert [machine.ended for machine in host.machines] == [True]


def test_a_pod_that_a_kubelet_may_have_devices_for_has_no_machine_that_was_made_without(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    document = config()
    kinds = ("container-type", "sandbox-id", "sandbox-name", "sandbox-namespace")
    words = ("sandbox", "web", "training", "acme")
    document["annotations"] = {
        f"io.kubernetes.cri.{kind}": word for kind, word in zip(kinds, words, strict=True)
    }
    arguments = Arguments(["-namespace", "k8s.io", "-address", "/a", "-id", "web", "start"])
    request = Start(arguments, "/bundle", "web", document)
    vfio, path = tmp_path / "vfio", tmp_path / "kubelet.sock"
    vfio.mkdir()
    monkeypatch.setattr(kubelet, "VFIO", str(vfio))
    settings = host.settings.replace(vfio=host.settings.vfio.replace(pod_resources=str(path)))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert order_of(request, settings, host.alike) is not None
        (vfio / "29").touch()
        assert order_of(request, settings, host.alike) is None
    assert order_of(host.request(), settings, host.alike) is not None  # of no sandbox's
