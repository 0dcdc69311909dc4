"""`casemate logs`: whole, clean, and followed without polling until the pod is over."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Casemate, Host, Shim, spawn

NewShim = Callable[[], Shim]


@pytest.fixture
def web(pods: Host, new_shim: NewShim) -> tuple[Path, Shim]:
    shim = new_shim()
    directory = pods.pod("default", "web", shim)
    (directory / "console.log").write_bytes(b"[    0.0] Linux\r\n\x1b[31magent up\x1b[0m")
    (directory / "shim.log").write_text("bound\nboot\n")
    return directory, shim


def test_both_logs_under_their_names(casemate: Casemate, web: tuple[Path, Shim]) -> None:
    assert casemate("logs", "web").stdout == (
        "==> shim.log <==\nbound\nboot\n\n==> console.log <==\n[    0.0] Linux\nagent up"
    )


def test_one_log_is_only_its_text(casemate: Casemate, web: tuple[Path, Shim]) -> None:
    assert casemate("logs", "web", "--shim").stdout == "bound\nboot\n"
    assert casemate("logs", "web", "--console").stdout == "[    0.0] Linux\nagent up"


def test_raw_is_byte_for_byte(casemate: Casemate, web: tuple[Path, Shim]) -> None:
    result = casemate("logs", "web", "--console", "--raw")
    assert result.stdout_bytes == (web[0] / "console.log").read_bytes()


def test_json_holds_the_texts(casemate: Casemate, web: tuple[Path, Shim]) -> None:
    (web[0] / "shim.log").unlink()
    assert json.loads(casemate("logs", "web", "--json").stdout) == {
        "namespace": "default",
        "id": "web",
        "shim": None,
        "console": "[    0.0] Linux\nagent up",
    }
    assert casemate("logs", "web", "--json", "-f").exit_code == 2


def test_an_ended_pods_logs_are_still_there(casemate: Casemate, pods: Host) -> None:
    directory = pods.pod("default", "gone", ended=True)
    (directory / "console.log").write_text("panic\n")
    assert casemate("logs", "gone", "--console").stdout == "panic\n"
    # and there is nothing to follow: it returns at once
    assert casemate("logs", "gone", "--console", "-f").stdout == "panic\n"


def test_a_pod_without_logs_is_exit_code_3(casemate: Casemate, pods: Host) -> None:
    pods.pod("default", "mute", ended=True)
    result = casemate("logs", "mute")
    assert result.exit_code == 3
    assert "has no shim.log and no console.log" in result.stderr


def test_a_log_that_is_there_is_enough(casemate: Casemate, pods: Host) -> None:
    directory = pods.pod("default", "half", ended=True)
    (directory / "shim.log").write_text("x\n")
    assert casemate("logs", "half").exit_code == 0


def test_bytes_that_standard_output_cannot_encode_are_escaped(web: tuple[Path, Shim]) -> None:
    (web[0] / "shim.log").write_text("grün\n")
    process = spawn(
        "logs", "web", "--shim", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert process.communicate()[0] == b"gr\\xfcn\n"


def test_a_closed_pipe_is_no_traceback(web: tuple[Path, Shim]) -> None:
    (web[0] / "shim.log").write_text("line\n" * 100_000)
    process = spawn("logs", "web", "--shim", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1


class Follower:
    """`casemate logs -f` of one log; read() waits for exactly what is expected next."""

    def __init__(self, *words: str) -> None:
        self.process = spawn(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        self.stdout = self.process.stdout

    def expect(self, text: bytes) -> None:
        seen = b""
        while len(seen) < len(text):
            more = os.read(self.stdout.fileno(), len(text) - len(seen))
            assert more, (seen, text, self.process.communicate()[1])
            seen += more
        assert seen == text

    def ends_with(self, text: bytes) -> None:
        rest, errors = self.process.communicate()
        assert (rest, self.process.returncode) == (text, 0), errors


@pytest.fixture
def follow(web: tuple[Path, Shim]) -> "Follower":
    follower = Follower("logs", "web", "--shim", "-f")
    follower.expect(b"bound\nboot\n")
    return follower


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_following_prints_what_is_added(web: tuple[Path, Shim], follow: Follower) -> None:
    append(web[0] / "shim.log", "one\n")
    follow.expect(b"one\n")
    append(web[0] / "shim.log", "part")
    follow.expect(b"part")
    append(web[0] / "shim.log", "\ntwo\n")
    follow.expect(b"\ntwo\n")
    web[1].kill()
    follow.ends_with(b"")


def test_following_ends_with_the_shims_last_words(web: tuple[Path, Shim], follow: Follower) -> None:
    append(web[0] / "shim.log", "last words\n")
    web[1].kill()
    follow.ends_with(b"last words\n")


def test_following_ends_when_the_pod_ends(web: tuple[Path, Shim], follow: Follower, host: Path) -> None:
    """As shim/cleanup.py retires a pod: records moved aside one by one, the rest removed."""
    append(web[0] / "shim.log", "bye\n")
    (host / "aside").mkdir()
    for path in web[0].iterdir():
        path.rename(host / "aside" / path.name)
    shutil.rmtree(web[0])
    follow.ends_with(b"bye\n")


def test_following_begins_anew_when_the_log_is_cut_or_replaced(
    web: tuple[Path, Shim], follow: Follower
) -> None:
    log = web[0] / "shim.log"
    log.write_text("cut\n")
    follow.expect(b"cut\n")
    (web[0] / "new").write_text("replaced\n")
    (web[0] / "new").rename(log)
    follow.expect(b"replaced\n")
    web[1].kill()
    follow.ends_with(b"")


def test_following_waits_for_a_log_that_is_not_there_yet(pods: Host, new_shim: NewShim) -> None:
    shim = new_shim()
    directory = pods.pod("default", "new", shim)
    (directory / "shim.log").write_text("first\n")
    follower = Follower("logs", "new", "-f")
    follower.expect(b"==> shim.log <==\nfirst\n")
    (directory / "console.log").write_text("hello\n")
    follower.expect(b"\n==> console.log <==\nhello\n")
    shim.kill()
    follower.ends_with(b"")


def test_following_sleeps_while_nothing_happens(web: tuple[Path, Shim], follow: Follower) -> None:
    """Event-driven: a second and more of nothing costs no processor time at all."""
    pid = follow.process.pid

    def ticks() -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    def switches() -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    append(web[0] / "shim.log", "x")
    follow.expect(b"x")
    # It has printed and is on its way back to poll(): the state S says that it has arrived.
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        os.sched_yield()
    before = ticks(), switches()
    with pytest.raises(subprocess.TimeoutExpired):
        follow.process.wait(timeout=1.2)
    assert (ticks(), switches()) == before
    web[1].kill()
    follow.ends_with(b"")


def test_an_interrupt_is_exit_code_130_and_no_traceback(web: tuple[Path, Shim], follow: Follower) -> None:
    follow.process.send_signal(signal.SIGINT)
    output, errors = follow.process.communicate()
    assert (follow.process.returncode, output, errors) == (130, b"", b"")


def test_following_a_pod_whose_shim_is_gone_says_so(casemate: Casemate, pods: Host) -> None:
    directory = pods.pod("default", "stale")
    (directory / "shim.log").write_text("x\n")
    result = casemate("logs", "stale", "--shim", "-f")
    assert (result.exit_code, result.stdout) == (0, "x\n")
    assert "is gone" in result.stderr
