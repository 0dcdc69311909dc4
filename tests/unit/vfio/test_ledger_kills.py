"""kill -9 at every step of a claim's way: whoever comes next finds what to do, and the next claim works.

Two ways to have every step: before each SQL statement, those of triggers included; and before each system
call that changes the ledger's files, where a commit is half written.
"""

import ctypes
import os
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.vfio.claimers import alone, check, is_alive, myself, reset, whole_way
from tests.unit.vfio.hosts import TWO_MIB, dgx
from vfio.ledger.demand import HugePages, Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Pod, State

VICTIM, NEXT = Pod("k8s.io", "victim", "red"), Pod("k8s.io", "next", "blue")
WANTED = Wanted((Request(2, kind="gpu"),), cpus=4, pages=HugePages(10, TWO_MIB))
ALL = Wanted((Request(8, kind="gpu"),), cpus=32, pages=HugePages(2000, TWO_MIB))


def forked(work: Callable[[], None]) -> int:
    """The exit status of a child that did it: 0, or negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        _child(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(work: Callable[[], None]) -> None:
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - told by the status, and to who reads the test's output
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(status)


def recovered(directory: Path, locks: Path) -> list[State]:
    """The victim's devices as it left them; put right then, and all of the host claimed once."""
    with Ledger(directory) as ledger:
        check(ledger)
        left = [device.state for device in ledger.devices()]
        reset(ledger, ledger.collect(is_alive, myself()).devices)
        check(ledger)
        assert {device.state for device in ledger.devices()} <= {State.FREE}
        assert ledger.claims() == []
        assert ledger.bindings() == []
        assert whole_way(ledger, NEXT, ALL, dgx(), locks)
        check(ledger)
    return left


def test_killed_before_every_statement(in_memory: Path) -> None:
    seen: set[State] = set()
    outcome = -signal.SIGKILL
    step = 0
    while outcome == -signal.SIGKILL:
        step += 1
        place = in_memory / str(step)
        locks = place / "locks"
        locks.mkdir(parents=True)

        def work(place: Path = place, locks: Path = locks, step: int = step) -> None:
            left = step

            def count(_: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            with Ledger(place / "ledger") as ledger:
                ledger._database._connection.set_trace_callback(count)
                whole_way(ledger, VICTIM, WANTED, dgx(), locks)

        outcome = forked(work)
        seen.update(recovered(place / "ledger", locks))
        shutil.rmtree(place)
    assert outcome == 0
    assert step > 60  # statements, at the least
    assert seen == {State.CLAIMED, State.IN_USE, State.RESETTING, State.FREE}


def test_killed_while_it_collects(in_memory: Path) -> None:
    """What a killed pod had in use, by a `casemate gc` that is killed at every statement."""
    outcome = -signal.SIGKILL
    step = 0
    while outcome == -signal.SIGKILL:
        step += 1
        place = in_memory / str(step)
        locks = place / "locks"
        locks.mkdir(parents=True)

        def victim(place: Path = place) -> None:
            with Ledger(place / "ledger") as ledger:
                claim = ledger.claim(VICTIM, myself(), WANTED, dgx())
                ledger.use(claim.id)
                os.kill(os.getpid(), signal.SIGKILL)

        assert forked(victim) == -signal.SIGKILL

        def collector(place: Path = place, step: int = step) -> None:
            left = step

            def count(_: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            with Ledger(place / "ledger") as ledger:
                ledger._database._connection.set_trace_callback(count)
                reset(ledger, ledger.collect(is_alive, myself()).devices)

        outcome = forked(collector)
        recovered(place / "ledger", locks)
        shutil.rmtree(place)
    assert outcome == 0
    assert step > 30


# --- at system calls ---

PTRACE_TRACEME, PTRACE_SYSCALL, PTRACE_SETOPTIONS, PTRACE_GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
PTRACE_O_TRACESYSGOOD, PTRACE_O_EXITKILL = 0x1, 0x100000
SYSCALL_STOP = signal.SIGTRAP | 0x80
ENTRY = 1
# pwrite64, ftruncate, fsync, fdatasync, unlink: of x86-64, and of the architectures with the common table.
CHANGES = {
    "x86_64": {18, 77, 74, 75, 87},
    "aarch64": {68, 46, 82, 83, 35},
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, address: int = 0, data: "ctypes.Array[ctypes.c_char] | int" = 0) -> int:
    value = data if isinstance(data, ctypes.Array) else ctypes.c_void_p(data)
    result = int(_libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), value))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"ptrace {request:#x}")
    return result


def killed_at(work: Callable[[], None], step: int) -> int:
    """The exit status of a child that is killed as it enters the step-th call that changes a file."""
    pid = os.fork()
    if pid == 0:
        ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        _child(work)
    os.waitpid(pid, 0)
    ptrace(PTRACE_SETOPTIONS, pid, data=PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL)
    numbers = CHANGES[os.uname().machine]
    info = ctypes.create_string_buffer(128)
    deliver = 0
    while True:
        ptrace(PTRACE_SYSCALL, pid, data=deliver)
        deliver = 0
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        if os.WSTOPSIG(status) != SYSCALL_STOP:
            deliver = os.WSTOPSIG(status)
            continue
        ptrace(PTRACE_GET_SYSCALL_INFO, pid, len(info), info)
        # struct ptrace_syscall_info: op, three bytes, arch, two addresses; then, at entry, the number.
        if info.raw[0] == ENTRY and struct.unpack_from("=Q", info.raw, 24)[0] in numbers:
            step -= 1
            if step == 0:
                os.kill(pid, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(os.uname().machine not in CHANGES, reason="its system calls are not known here")
def test_killed_before_every_write_to_the_disk(in_memory: Path) -> None:
    seen: set[State] = set()
    outcome = -signal.SIGKILL
    step = 0
    while outcome == -signal.SIGKILL:
        step += 1
        place = in_memory / str(step)
        locks = place / "locks"
        locks.mkdir(parents=True)

        def work(place: Path = place, locks: Path = locks) -> None:
            # From an empty directory on: making the ledger can be cut short, too.
            with Ledger(place / "ledger") as ledger:
                whole_way(ledger, VICTIM, WANTED, dgx(), locks)

        outcome = killed_at(work, step)
        seen.update(recovered(place / "ledger", locks))
        shutil.rmtree(place)
    assert outcome == 0
    assert step > 40
    assert seen == {State.CLAIMED, State.IN_USE, State.RESETTING, State.FREE}


def test_what_a_dead_process_held_is_known_without_the_ledger(tmp_path: Path) -> None:
    """The locks of these tests do catch two that have the same: else they would show nothing."""
    locks = tmp_path / "locks"
    locks.mkdir()
    with Ledger(tmp_path / "ledger") as ledger:
        claim = ledger.claim(VICTIM, myself(), WANTED, dgx())
        with alone(locks, claim), pytest.raises(BlockingIOError), alone(locks, claim):
            pass
