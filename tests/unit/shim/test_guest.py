"""A machine that runs: its agent answers or it is said why not; its end is noticed at once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import CasemateError, DeadlineExceeded, NotFound, Unavailable
from shim.vm import guest as module
from tests.unit.rpc.wires import run
from tests.unit.shim.guests import CALL_S, Guest, running_guest

CONTAINER = api.ContainerRequest(container_id="web")


async def ask(guest: Guest, *, patient: bool = False) -> object:
    return await guest.machine.call(api.STATS, CONTAINER, patient=patient)


async def in_flight(guest: Guest) -> asyncio.Task[object]:
    """A call that the agent works on, and does not answer."""
    await guest.machine.call(api.CREATE_CONTAINER, api.CreateContainerRequest(container_id="web"))
    guest.agent.hold(api.STATS)
    asking = asyncio.create_task(ask(guest, patient=True))
    await guest.agent.reached(api.STATS)
    return asking


def test_the_agents_own_errors_are_raised(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            with pytest.raises(NotFound, match="does not exist in the guest"):
                await ask(guest)
            guest.agent.fails["Stats"] = Unavailable("statistics: not ready yet")
            with pytest.raises(Unavailable, match="not ready yet"):
                await ask(guest)
            assert not guest.machine.lost.done()

    run(life())


def refuse() -> None:
    raise Unavailable("the machine does not take a device", "Domain not found")


@pytest.mark.parametrize("part", ["qemu", "files"])
def test_a_device_that_a_machine_does_not_take_as_it_has_ended_is_told_by_that(
    tmp_path: Path, part: str
) -> None:
    """libvirt's words are of a domain that is not found."""

    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            killed = getattr(guest.machine, part)
            name = "QEMU" if part == "qemu" else killed.name
            os.kill(killed.pid, signal.SIGKILL)
            with pytest.raises(Unavailable, match=f"^{name} ended unexpectedly"):
                await guest.machine.plug(refuse)

    run(life())


def test_a_device_that_a_machine_does_not_take_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_WORDS_S", 0.05)

    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            with pytest.raises(Unavailable, match="does not take a device"):
                await guest.machine.plug(refuse)
            done: list[bool] = []
            await guest.machine.plug(lambda: done.append(True))
            assert done

    run(life())


def test_an_agent_that_does_not_answer_is_told_with_the_consoles_last_lines(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            asking = await in_flight(guest)
            with (
                guest.hurried(api.STATS),
                pytest.raises(DeadlineExceeded, match="did not answer Stats within") as caught,
            ):
                await ask(guest)
            assert "Linux boots" in (caught.value.details or "")
            assert "casemate logs" in (caught.value.hint or "")
            assert not asking.done()

    run(life())


def test_a_call_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            await in_flight(guest)
            begun = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await guest.machine.call(api.STATS, CONTAINER, timeout_s=0.1)
            assert time.monotonic() - begun < CALL_S

    run(life())


@pytest.mark.parametrize("part", ["qemu", "files"])
def test_a_call_in_flight_says_which_part_ended(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wait_s in ("LAST_WORDS_S", "CONSOLE_END_S"):  # neither is waited for: run() would not last so long
        monkeypatch.setattr(module, wait_s, 100)

    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            asking = await in_flight(guest)
            os.kill(getattr(guest, part).pid, 9)
            with pytest.raises(Unavailable) as caught:
                await asking
            if part == "qemu":
                assert "QEMU ended unexpectedly" in str(caught.value)
                assert "Linux boots" in str(caught.value)
            else:
                assert "virtiofsd ended unexpectedly (killed by signal 9)" in str(caught.value)
                assert "virtiofsd: ready" in str(caught.value)
            await guest.qemu.exited.wait()

    run(life())


def test_a_kernel_that_panics_is_given_time_to_say_so(tmp_path: Path) -> None:
    """Its agent's connection closes first, then it writes to its console, then QEMU ends."""

    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            guest.hang_up()
            await guest.machine._agent.closed()
            await guest.write_console("Kernel panic - not syncing: Attempted to kill init!\n")
            os.kill(guest.qemu.pid, 9)
            error = await guest.machine.lost
            assert error.brief == "the guest's kernel panicked"
            assert "Attempted to kill init" in (error.details or "")

    run(life())


def test_an_agent_that_hangs_up_in_a_machine_that_goes_on_is_lost_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_WORDS_S", 0.1)

    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            guest.hang_up()
            with pytest.raises(Unavailable, match="the guest's agent closed its connection"):
                await ask(guest)
            await guest.qemu.exited.wait()

    run(life())


def test_qemus_own_words_come_before_the_consoles(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            guest.machine._qemu_words = lambda: "qemu-system-x86_64: out of memory"
            os.kill(guest.qemu.pid, 9)
            details = (await guest.machine.lost).details or ""
            assert details.startswith("qemu-system-x86_64: out of memory\n")
            assert "Linux boots" in details

    run(life())


def test_two_callers_get_an_error_each_of_their_own(tmp_path: Path) -> None:
    """One exception object raised twice would collect both tracebacks."""

    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            os.kill(guest.qemu.pid, 9)
            errors = await asyncio.gather(ask(guest), ask(guest), return_exceptions=True)
            assert errors[0] is not errors[1]
            assert str(errors[0]) == str(errors[1])

    run(life())


def test_events_are_handed_over_until_the_machine_is_lost(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            events: list[api.Event] = []
            listening = asyncio.create_task(guest.machine.events(events.append))
            for status in range(3):
                guest.agent.tell(api.EventKind.EXIT, "web", status=status)
            await guest.agent.calls_settle()
            assert [event.exit_status for event in events] == [0, 1, 2]
            os.kill(guest.qemu.pid, 9)
            await listening

    run(life())


@pytest.mark.parametrize("how", ["garbled", "ended"])
def test_a_guest_that_tells_no_events_any_more_is_ended(tmp_path: Path, how: str) -> None:
    """Its containers would run for ever, as far as anybody here can tell."""

    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            listening = asyncio.create_task(guest.machine.events(lambda event: None))
            if how == "garbled":
                guest.agent.tell(api.EventKind.EXIT, "\udcff")  # not UTF-8: its server fails at encoding it
            else:
                guest.agent.stop_telling()
            await listening
            await guest.machine.lost
            await guest.qemu.exited.wait()

    run(life())


def test_what_was_written_is_flushed_before_the_machine_is_halted(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            await guest.machine.flush()
            assert guest.agent.calls == ["Sync"]
            assert not guest.qemu.exited.is_set()
            await guest.machine.halt()
            assert guest.files.exited.is_set()
            await guest.machine.halt()  # again is no error
            await guest.machine.end()
            assert guest.qemu.exited.is_set()
            await guest.machine.flush()  # nor is this one, when there is nobody to ask
            assert guest.agent.calls == ["Sync"]

    run(life())


def test_a_guest_that_does_not_flush_is_halted_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            guest.agent.hold(api.SYNC)
            guest.machine.call_timeout_s = 0.1
            await guest.machine.flush()
            await guest.machine.end()
            assert guest.qemu.exited.is_set()

    run(life())
    assert "did not flush its file systems" in caplog.text


def test_a_call_in_flight_when_the_machine_is_halted_ends(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            asking = await in_flight(guest)
            await guest.machine.halt()
            async with asyncio.timeout(CALL_S / 2):
                with pytest.raises(CasemateError):
                    await asking
                with pytest.raises(CasemateError):
                    await ask(guest)

    run(life())
