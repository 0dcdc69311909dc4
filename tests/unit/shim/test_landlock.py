"""A thread that is kept in, and what it starts: the files that it reaches, and nothing else."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shim import landlock
from shim.landlock import ALL, READ, RUN, kept_in
from shim.vm import reach

needs = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
PROGRAMS = dict.fromkeys(("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"), RUN)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A directory that is reached, and one beside it with the file `other`."""
    mine, others = tmp_path / "mine", tmp_path / "others"
    for directory in (mine, others):
        directory.mkdir()
        (directory / "file").write_text("words")
    return mine, others


@needs
def test_only_what_is_told_is_reached(places: tuple[Path, Path]) -> None:
    mine, others = places

    def look() -> None:
        (mine / "new").write_text((mine / "file").read_text())
        (mine / "new").rename(mine / "newer")
        (mine / "newer").unlink()
        actions: tuple[Callable[[], object], ...] = (
            (others / "file").read_text,
            lambda: (others / "new").write_text(""),
            (others / "file").unlink,
            lambda: (mine / "file").rename(others / "moved"),
            lambda: list(others.iterdir()),
        )
        for action in actions:
            with pytest.raises(OSError, match=r"Permission denied|Invalid cross-device"):
                action()

    kept_in({str(mine): ALL}, look)
    assert (others / "file").read_text() == "words"
    (others / "new").write_text("whoever called is as he was")


@needs
def test_what_may_be_read_may_not_be_written(places: tuple[Path, Path]) -> None:
    mine, others = places

    def look() -> str:
        with pytest.raises(PermissionError):
            (others / "file").write_text("")
        with pytest.raises(PermissionError):
            os.mkdir(others / "directory")
        return (others / "file").read_text()

    assert kept_in({str(mine): ALL, str(others): READ}, look) == "words"


@needs
def test_programs_that_it_starts_are_kept_in_too(places: tuple[Path, Path]) -> None:
    mine, others = places

    def cat(path: Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["/bin/cat", path], capture_output=True, text=True, check=False)

    rules = {**PROGRAMS, str(mine): ALL}
    assert kept_in(rules, lambda: cat(mine / "file")).stdout == "words"
    refused = kept_in(rules, lambda: cat(others / "file"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "Permission denied" in refused.stderr
    with pytest.raises(PermissionError):
        kept_in({str(mine): ALL}, lambda: cat(mine / "file"))  # nor may it run what it is not told


@needs
@pytest.mark.skipif(landlock.version() < 4, reason="Landlock before Linux 6.7 does not know TCP")
def test_it_speaks_to_nobody_by_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(PermissionError):
            kept_in({}, lambda: socket.create_connection(server.getsockname()))
        with pytest.raises(PermissionError):
            kept_in({}, lambda: socket.create_server(("127.0.0.1", 0)))


@needs
@pytest.mark.skipif(landlock.version() < 6, reason="Landlock before Linux 6.12 does not know signals")
def test_it_sends_no_signal_out() -> None:
    sleeper = subprocess.Popen(["/bin/sleep", "1000"])
    try:
        with pytest.raises(PermissionError):
            kept_in({}, lambda: os.kill(sleeper.pid, 15))
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_an_error_is_the_callers() -> None:
    def fail() -> None:
        raise ValueError("words")

    with pytest.raises(ValueError, match="words"):
        kept_in({"/": ALL}, fail)


def test_a_path_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    assert kept_in({str(tmp_path / "none"): ALL, "/dev/null": ALL}, lambda: 7) == 7


def test_qemu_reaches_what_a_machine_is_made_of(tmp_path: Path) -> None:
    rules = reach.of("/run/casemate/pods/1", "/opt/qemu", ["/images/1"], ["/tmp/more"])
    assert rules["/run/casemate/pods/1"] == rules["/tmp/more"] == ALL
    assert rules["/images/1"] == READ
    assert rules["/opt/qemu"] == RUN
    for home in ("/", "/etc", "/home", "/root", "/run", "/tmp", "/var", "/dev", "/dev/shm"):
        assert home not in rules


@pytest.mark.parametrize("known", range(1, 8))
@needs
def test_an_older_kernel_keeps_from_it_what_it_can(
    places: tuple[Path, Path], known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This kernel is asked as an older one would be, whose interface it has, too."""
    if known > landlock.version():
        pytest.skip(f"this kernel's Landlock is of version {landlock.version()}")
    mine, others = places
    monkeypatch.setattr(landlock, "version", lambda: known)

    def refused(action: Callable[[], object]) -> bool:
        try:
            action()
        except PermissionError:
            return True
        return False

    def look() -> tuple[bool, ...]:
        with socket.socket() as tcp:
            return (
                refused((mine / "file").read_text),
                refused((others / "file").read_text),
                refused(lambda: os.truncate(others / "file", 1)),
                refused(lambda: tcp.bind(("127.0.0.1", 0))),
            )

    assert kept_in({str(mine): ALL}, look) == (False, True, known >= 3, known >= 4)
    assert [since for since, *_ in landlock.SINCE] == [3, 4, 5, 6]
