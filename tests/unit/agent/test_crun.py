"""How crun is called, what becomes of its words, and that it is not waited for beyond its time."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.crun import Crun, CrunFailed, translate, words
from agent.reaper import Exit, Reaper
from rpc.errors import (
    CasemateError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
)
from tests.unit.agent.waiting import reaped


@pytest.mark.parametrize(
    ("said", "error", "brief"),
    [
        (
            "executable file `nosuch` not found in $PATH: No such file or directory",
            NotFound,
            'exec: "nosuch": executable file not found in $PATH',
        ),
        (
            "executable file `/bin/x` not found: No such file or directory",
            NotFound,
            'exec: "/bin/x": stat /bin/x: no such file or directory',
        ),
        (
            "the path `/etc/x` exists but it is not executable: Operation not permitted",
            PermissionDenied,
            'exec: "/etc/x": permission denied',
        ),
        (
            "the path `/bin` is not a regular file: Operation not permitted",
            PermissionDenied,
            'exec: "/bin": is a directory',
        ),
        ("chdir to `/no`: No such file or directory", NotFound, 'cwd "/no": no such file or directory'),
        ("chdir to `/file`: Not a directory", FailedPrecondition, 'cwd "/file": not a directory'),
        ("chdir to `/root`: Permission denied", PermissionDenied, 'cwd "/root": permission denied'),
    ],
)
def test_known_words_become_ours(said: str, error: type[CasemateError], brief: str) -> None:
    translated = translate(said, "create", 1)
    assert type(translated) is error
    assert str(translated) == brief


def test_unknown_words_are_passed_on() -> None:
    assert str(translate("mount `proc`: no", "create", 1)) == "crun create failed: mount `proc`: no"
    assert str(translate("", "start", 3)) == "crun start failed: it ended with status 3 and said nothing"


def test_a_silent_death_is_known_as_such() -> None:
    silent = translate("read from sync socket: Connection reset by peer", "create", 1)
    assert isinstance(silent, CrunFailed)
    assert silent.silent
    other = translate("mount: no", "create", 1)
    assert isinstance(other, CrunFailed)
    assert not other.silent


def test_words_are_the_errors_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        '{"msg":"a warning","level":"warning"}\n'
        "the error\n"  # crun writes it to stderr, too
        '{"msg":"the error","level":"error","time":"now"}\n\n'
    )
    assert words(str(log)) == "the error"


def test_words_of_something_that_keeps_no_log_are_all_it_wrote(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"crun: error while loading shared libraries: libyajl.so.2\n[1]\n\xff\n")
    assert words(str(log)).startswith("crun: error while loading shared libraries: libyajl.so.2\n[1]")


def test_words_are_bounded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x" * 1_000_000)
    assert len(words(str(log))) < 5000


# with a real child: a shell script in crun's place

INTERNAL_SIGNALS = 0b11 << 31  # 32 and 33 are the C library's own: its posix_spawn ignores them

Scenario = Callable[[Crun], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str, Scenario], None]:
    """Runs a scenario with a program in crun's place, and a reaper to collect it."""

    def run(script: str, scenario: Scenario) -> None:
        program = tmp_path / "crun"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

        async def main() -> None:
            reaper = Reaper()
            loop = asyncio.get_running_loop()
            reaper.install(loop)
            try:
                await scenario(Crun(reaper, "/state", str(program)))
            finally:
                reaper.close(loop)

        asyncio.run(main())

    return run


def test_crun_is_told_state_log_and_manager(tmp_path: Path, run: Callable[[str, Scenario], None]) -> None:
    log = str(tmp_path / "log")

    async def scenario(crun: Crun) -> None:
        await crun.run(log, "start", "name")

    run(f'echo "$@" > {tmp_path}/arguments', scenario)
    assert (tmp_path / "arguments").read_text().split() == [
        *("--root", "/state", "--cgroup-manager=cgroupfs", "--log-format=json", f"--log={log}"),
        *("start", "name"),
    ]


def test_failure_is_what_it_said(tmp_path: Path, run: Callable[[str, Scenario], None]) -> None:
    async def scenario(crun: Crun) -> None:
        with pytest.raises(Internal, match="crun start failed: out of luck"):
            await crun.run(str(tmp_path / "log"), "start", "name")

    run("echo out of luck >&2; exit 1", scenario)


def test_streams_are_inherited_and_nothing_else_is(
    tmp_path: Path, run: Callable[[str, Scenario], None]
) -> None:
    async def scenario(crun: Crun) -> None:
        theirs, ours = os.pipe()
        kept = os.open(os.devnull, os.O_RDONLY)
        await crun.run(str(tmp_path / "log"), "create", stdio=(theirs, ours, ours))
        os.close(ours)
        assert os.read(theirs, 100) == b"0 1 2 "
        os.close(theirs)
        os.close(kept)

    run(
        "for fd in 0 1 2 3 4 5 6 7 8 9; do [ -e /proc/$$/fd/$fd ] && printf '%s ' $fd; done; exit 0", scenario
    )


def test_ignored_signals_are_not_inherited(tmp_path: Path, run: Callable[[str, Scenario], None]) -> None:
    """Python ignores SIGPIPE; a container must not."""
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN

    async def scenario(crun: Crun) -> None:
        await crun.run(str(tmp_path / "log"), "create")

    run(f"grep SigIgn /proc/self/status > {tmp_path}/ignored", scenario)
    ignored = int((tmp_path / "ignored").read_text().split()[1], 16)
    assert ignored & ~INTERNAL_SIGNALS == 0


def test_crun_that_does_not_end_is_killed(
    tmp_path: Path, run: Callable[[str, Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    watch = Reaper.watch

    def watched(reaper: Reaper, pid: int) -> "asyncio.Future[Exit]":
        pids.append(pid)
        return watch(reaper, pid)

    monkeypatch.setattr(Reaper, "watch", watched)

    async def scenario(crun: Crun) -> None:
        with pytest.raises(DeadlineExceeded, match="crun start did not end within"):
            await crun.run(str(tmp_path / "log"), "start", timeout_s=0.2)
        (pid,) = pids
        await reaped(pid)

    run("exec sleep 100", scenario)


def test_missing_crun_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        crun = Crun(Reaper(), "/state", str(tmp_path / "nosuch"))
        with pytest.raises(Internal, match="cannot be run: No such file"):
            await crun.run(str(tmp_path / "log"), "start")

    asyncio.run(scenario())
