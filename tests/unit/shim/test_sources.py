"""A machine on its way up: each way in which it can fail is noticed at once and told by its name."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from config.load import load
from images.image import GuestImage
from rpc.api import agent as api
from rpc.client import Client
from rpc.errors import CasemateError, DeadlineExceeded, Disconnected, FailedPrecondition, Unavailable
from shim import system
from shim.helper import Helper, Watched, spawn
from shim.paths import PodPaths
from shim.vm import guest, setting, sources
from shim.vm.accel import Acceleration
from shim.vm.console import Console
from shim.vm.designer import Files
from shim.vm.host import Host
from shim.vm.passthrough import Function
from shim.vm.setting import MachineRequest, Setting, run_qemu
from shim.vm.users import FIRST_UID, UIDS, QemuUser
from tests.unit.rpc.wires import ends, run, until

# No process of this machine has it: what runs as it may be killed.
NOBODYS_UID = FIRST_UID + 2 * UIDS + 7
USER = QemuUser(NOBODYS_UID, f"+{NOBODYS_UID}", f"+{NOBODYS_UID}")


class Parts:
    """QEMU, virtiofsd and a console, before there is a machine of them."""

    def __init__(self, qemu: Watched, files: Helper, console: Console, written: socket.socket) -> None:
        self.qemu = qemu
        self.files = files
        self.console = console
        self.written = written

    async def unless_ended(
        self, waiting: sources.Answered, timeout_s: float = 20.0
    ) -> tuple[Client, api.HelloResponse]:
        return await sources.unless_ended(
            waiting, self.qemu, self.files, self.console, lambda: "qemu: own words", timeout_s
        )

    def say(self, text: str) -> None:
        self.written.sendall(text.encode())


@asynccontextmanager
async def parts(directory: Path) -> AsyncIterator[Parts]:
    qemu = spawn("QEMU", ["/bin/sleep", "1000"])
    files = spawn("virtiofsd", ["/bin/sleep", "1000"], log=str(directory / "virtiofsd.log"))
    console = Console(directory / "console.sock", directory / "console.log", 1 << 20, os.getuid())
    reading = asyncio.create_task(console.read())
    written = socket.socket(socket.AF_UNIX)
    written.connect(str(directory / "console.sock"))
    try:
        yield Parts(qemu, files, console, written)
    finally:
        written.close()
        await reading
        console.close()
        await qemu.end()
        await files.end()


async def never() -> tuple[Client, api.HelloResponse]:
    await asyncio.Event().wait()
    raise AssertionError


async def fails(error: CasemateError) -> tuple[Client, api.HelloResponse]:
    raise error


def test_an_answer_is_handed_on(tmp_path: Path) -> None:
    async def life() -> None:
        async with parts(tmp_path) as machine:
            here, there = await ends()
            expected = Client(*here), api.HelloResponse(version="1")

            async def answer() -> tuple[Client, api.HelloResponse]:
                return expected

            assert await machine.unless_ended(answer()) is expected
            await expected[0].close()
            there[1].close()

    run(life())


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("qemu", r"QEMU ended unexpectedly \(killed by signal 9\): qemu: own words"),
        ("files", "virtiofsd ended unexpectedly"),
    ],
)
def test_a_part_that_ends_is_named_at_once(
    tmp_path: Path, part: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wait_s in ("LAST_WORDS_S", "CONSOLE_END_S"):  # neither is waited for: run() would not last so long
        monkeypatch.setattr(guest, wait_s, 100)

    async def life() -> None:
        async with parts(tmp_path) as machine:
            waiting = asyncio.create_task(machine.unless_ended(never(), 100))
            await asyncio.sleep(0)
            if part == "qemu":
                machine.written.shutdown(socket.SHUT_RDWR)
            os.kill(getattr(machine, part).pid, 9)
            with pytest.raises(Unavailable, match=words):
                await waiting

    run(life())


def test_an_agent_that_never_answers_is_told_with_the_consoles_words(tmp_path: Path) -> None:
    async def life() -> None:
        async with parts(tmp_path) as machine:
            machine.say("agent: ImportError\n")
            await until(lambda: machine.console.words().endswith("ImportError"))
            for waiting in (never(), fails(DeadlineExceeded("no answer"))):
                with pytest.raises(DeadlineExceeded, match="did not answer within") as caught:
                    await machine.unless_ended(waiting, 0.1)
                assert "agent: ImportError" in (caught.value.details or "")
                assert "boot_s" in (caught.value.hint or "")

    run(life())


def test_a_panic_is_told_though_the_agent_hung_up_first(tmp_path: Path) -> None:
    async def life() -> None:
        async with parts(tmp_path) as machine:
            waiting = asyncio.create_task(machine.unless_ended(fails(Disconnected("closed"))))
            await asyncio.sleep(0)
            machine.say("Kernel panic - not syncing: no working init\n")
            machine.written.shutdown(socket.SHUT_RDWR)
            os.kill(machine.qemu.pid, 9)
            with pytest.raises(Unavailable, match=r"(?s)kernel panicked.*no working init"):
                await waiting

    run(life())


def test_what_the_agent_says_itself_is_told_as_it_is(tmp_path: Path) -> None:
    async def life() -> None:
        async with parts(tmp_path) as machine:
            with pytest.raises(FailedPrecondition, match="protocol 99"):
                await machine.unless_ended(fails(FailedPrecondition("speaks protocol 99")))

    run(life())


def test_an_answer_of_a_machine_that_has_ended_leaves_no_connection(tmp_path: Path) -> None:
    async def life() -> None:
        async with parts(tmp_path) as machine:
            here, there = await ends()
            client = Client(*here)
            machine.written.shutdown(socket.SHUT_RDWR)
            await machine.qemu.end()

            async def answer() -> tuple[Client, api.HelloResponse]:
                return client, api.HelloResponse()

            try:
                with pytest.raises(Unavailable, match="QEMU ended"):
                    await machine.unless_ended(answer())
                assert client.is_closed
            finally:
                await client.close()
                there[1].close()

    run(life())


class SlowHost(Host):
    """libvirt, as it can behave: it says what QEMU said."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "libvirt", directory / "ram", USER, directory / "seeds", reach={})


def setting_of(directory: Path, limit_s: float = 20.0) -> Setting:
    settings = load()
    timeouts = settings.timeouts.replace(boot_s=limit_s, tcg_factor=1.0)
    paths = PodPaths("default", "web", directory)
    request = MachineRequest(
        pod_id="web",
        hostname="web",
        profile=settings.profiles["default"],
        settings=settings.replace(timeouts=timeouts),
        paths=paths,
        cache=directory / "cache",
    )
    image = GuestImage(
        "default", "sha256:abc", directory, directory / "k", None, directory / "r", "quiet", manifest={}
    )
    return Setting(
        request,
        Acceleration("tcg", "a test"),
        image,
        "/bin/qemu",
        "/qboot.rom",
        "serial",
        Files.VIRTIOFS,
        USER,
        SlowHost(directory),
        directory / "ram",
    )


@pytest.mark.parametrize(
    ("crowd", "accel", "limit_s"), [(1.0, "kvm", 20.0), (3.0, "kvm", 60.0), (3.0, "tcg", 240.0)]
)
def test_a_boot_has_more_time_where_a_cpu_is_shared_or_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crowd: float, accel: str, limit_s: float
) -> None:
    monkeypatch.setattr(setting, "crowding", lambda: crowd)
    made = setting_of(tmp_path)
    timeouts = made.request.settings.timeouts.replace(tcg_factor=4.0)
    settings = made.request.settings.replace(timeouts=timeouts)
    request = replace(made.request, settings=settings)
    assert replace(made, accel=Acceleration(accel, "a test"), request=request).boot_s == limit_s
    device = Function("0000:3b:00.0", "10de H100", "gpu", 12, "vfio3", 0, 0)
    memory_s = request.profile.memory_bytes / (1 << 30)
    given = replace(request, functions=(device,))
    factor = limit_s / 20.0
    found = replace(made, accel=Acceleration(accel, "a test"), request=given).boot_s
    assert found == pytest.approx((20.0 + memory_s + 10.0) * factor)


async def created(machine: Parts, directory: Path, create: Callable[[], int], limit_s: float = 20.0) -> int:
    async with AsyncExitStack() as undo:
        process = await run_qemu(setting_of(directory, limit_s), create, machine.files, undo)
        undo.pop_all()
    return process.pid


def test_qemus_pid_is_handed_on(tmp_path: Path) -> None:
    async def life() -> None:
        async with parts(tmp_path) as machine:
            pid = machine.qemu.pid
            assert await created(machine, tmp_path, lambda: pid) == pid

    run(life())


def test_why_libvirt_did_not_start_qemu_is_told(tmp_path: Path) -> None:
    def refuse() -> int:
        raise Unavailable("QEMU did not start", "no such machine type")

    async def life() -> None:
        async with parts(tmp_path) as machine:
            with pytest.raises(Unavailable, match="no such machine type"):
                await created(machine, tmp_path, refuse)

    run(life())


def test_a_virtiofsd_that_ended_is_the_reason_whatever_qemu_says(tmp_path: Path) -> None:
    async def life() -> None:
        async with parts(tmp_path) as machine:
            pid = machine.files.pid

            def refuse() -> int:
                os.kill(pid, 9)
                raise Unavailable("QEMU did not start", "Failed to connect to share.sock")

            with pytest.raises(Unavailable, match=r"virtiofsd ended unexpectedly \(killed by signal 9\)"):
                await created(machine, tmp_path, refuse)

    run(life())


def test_a_virtiofsd_that_ended_in_good_order_has_lost_qemu_and_qemus_end_is_told(tmp_path: Path) -> None:
    """libvirt hears of that end a moment later."""

    async def life() -> None:
        async with parts(tmp_path) as machine:
            machine.files = spawn("virtiofsd", ["/bin/true"])
            await machine.files.exited.wait()
            go_on = threading.Event()

            def refuse() -> int:
                go_on.wait()
                raise Unavailable("QEMU did not start", "unexpectedly closed the monitor")

            creating = asyncio.create_task(created(machine, tmp_path, refuse))
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(Unavailable, match="closed the monitor"):
                await creating

    run(life())


def test_a_virtiofsd_that_ended_in_good_order_while_qemu_is_mute_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting, "STOPPED_S", 0.1)
    monkeypatch.setattr(setting, "THREAD_END_S", 0.1)
    go_on = threading.Event()

    def hang() -> int:
        go_on.wait()
        return 0

    async def life() -> None:
        async with parts(tmp_path) as machine:
            machine.files = spawn("virtiofsd", ["/bin/true"])
            await machine.files.exited.wait()
            try:
                with pytest.raises(Unavailable, match=r"virtiofsd ended unexpectedly \(exit status 0\)"):
                    await created(machine, tmp_path, hang)
            finally:
                go_on.set()

    run(life())


@pytest.mark.parametrize("goes", [True, False])
def test_of_a_virtiofsd_that_ended_in_good_order_it_is_waited_for_qemus_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: bool
) -> None:
    monkeypatch.setattr(guest, "LAST_WORDS_S", 20.0 if goes else 0.1)
    qemus = "QEMU ended unexpectedly (killed by signal 9): own words"
    words = qemus if goes else "virtiofsd ended unexpectedly (exit status 0)"

    async def life() -> None:
        async with parts(tmp_path) as machine:
            files = spawn("virtiofsd", ["/bin/true"])
            await files.exited.wait()
            ended = asyncio.create_task(
                guest.why_ended(machine.qemu, files, machine.console, lambda: "own words")
            )
            await asyncio.sleep(0)
            if goes:
                machine.written.shutdown(socket.SHUT_RDWR)
                machine.qemu.kill()
            assert str(await ended).startswith(words)

    run(life())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_qemu_that_was_started_after_all_is_ended(tmp_path: Path) -> None:
    """virtiofsd's end is known at once, and libvirt goes on to start what nobody wants any more."""

    async def life() -> None:
        async with parts(tmp_path) as machine:
            files = machine.files.pid
            started: list[subprocess.Popen[bytes]] = []

            def start() -> int:
                os.kill(files, 9)
                gone.wait(10)
                started.append(subprocess.Popen(["/bin/sleep", "1000"], user=USER.uid))
                return started[0].pid

            gone = threading.Event()
            killing = system.kill_processes_of

            def kill(uid: int) -> None:
                killing(uid)
                gone.set()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(system, "kill_processes_of", kill)
                with pytest.raises(Unavailable, match="virtiofsd ended"):
                    await created(machine, tmp_path, start)
            assert started[0].wait(10) == -signal.SIGKILL

    run(life())


def test_a_qemu_that_is_mute_is_given_up_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt waits for its monitor for ever."""
    monkeypatch.setattr(setting, "THREAD_END_S", 0.1)
    gate = threading.Event()

    def hang() -> int:
        gate.wait()
        return 0

    async def life() -> None:
        async with parts(tmp_path) as machine:
            log = tmp_path / "libvirt/log/qemu/vm.log"
            log.parent.mkdir(parents=True)
            log.write_text("qemu-system-x86_64: waiting for a miracle\n")
            with pytest.raises(DeadlineExceeded, match="QEMU did not answer libvirt within") as caught:
                await created(machine, tmp_path, hang, 0.1)
            assert "waiting for a miracle" in (caught.value.details or "")
            gate.set()

    run(life())


def test_sockets_are_in_the_pods_directory(tmp_path: Path) -> None:
    made = setting_of(tmp_path)
    sockets = {made.places.console, made.places.agent, made.places.share}
    assert {path.parent for path in sockets} == {made.request.paths.directory}
    assert len(sockets) == 3


def test_a_console_that_stays_open_does_not_hold_up_the_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guest, "CONSOLE_END_S", 0.05)

    async def life() -> None:
        async with parts(tmp_path) as machine:
            await machine.qemu.end()
            with pytest.raises(Unavailable, match="QEMU ended"):
                await machine.unless_ended(never())

    run(life())
    assert "is still open" in caplog.text
