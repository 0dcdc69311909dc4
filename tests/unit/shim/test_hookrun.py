"""Real programs as hooks: what they are told, what becomes of those that fail, and of what they leave."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from shim import hookrun, oci
from shim.oci import Hook

STATE = {"ociVersion": "1.1.0", "id": "c", "status": "creating", "pid": 7, "bundle": "/", "annotations": {}}


def shell(script: str, timeout_s: int = 0, env: dict[str, str] | None = None) -> Hook:
    return Hook("/bin/sh", ("sh", "-c", script), env or {}, timeout_s)


def run(*hooks: Hook, go_on: bool = False, bundle: str = "/", hangup: int = -1) -> list[hookrun.Outcome]:
    return hookrun.run_all(hooks, STATE | {"bundle": bundle}, go_on=go_on, hangup=hangup)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hook_has_its_state_its_arguments_its_directory_and_its_own_environment(tmp_path: Path) -> None:
    script = 'cat; echo; echo "$0 $1"; pwd; /usr/bin/env -u PWD -u SHLVL -u OLDPWD -u _'
    hook = Hook("/bin/sh", ("called", "-c", script, "zero", "one"), {"A": "x y"})
    (outcome,) = run(hook, bundle=str(tmp_path))
    told, *lines = outcome.words.splitlines()
    assert not outcome.failure
    assert json.loads(told) == STATE | {"bundle": str(tmp_path)}
    assert lines == ["zero one", str(tmp_path), "A=x y"]


def test_a_bundle_that_is_gone_is_no_obstacle(tmp_path: Path) -> None:
    (outcome,) = run(shell("pwd"), bundle=str(tmp_path / "gone"))
    assert outcome == hookrun.Outcome("/bin/sh", "", "/")


def test_a_state_that_nobody_reads_may_be_large() -> None:
    big = STATE | {"annotations": {"a": "x" * (1 << 20)}}
    (outcome,) = hookrun.run_all([shell("wc -c")], big, go_on=False)
    assert int(outcome.words) == len(json.dumps(big))
    (outcome,) = hookrun.run_all([shell("exit 0")], big, go_on=False)
    assert not outcome.failure


@pytest.mark.parametrize(
    ("hook", "failure", "words"),
    [
        (shell("echo out; echo why >&2; exit 3"), "exit status 3", "out\nwhy"),
        (shell("kill -9 $$"), "killed by signal 9", ""),
        (Hook("/no/such/hook", ("x",), {}), "cannot be executed: No such file or directory", ""),
        (Hook("/etc/passwd", ("x",), {}), "cannot be executed: Permission denied", ""),
        (shell("printf '\\033[2Jred'; exit 1"), "exit status 1", "?[2Jred"),
    ],
)
def test_a_failure_is_told_with_its_words(hook: Hook, failure: str, words: str) -> None:
    assert run(hook) == [hookrun.Outcome(hook.path, failure, words)]


def test_of_much_output_the_end_is_kept() -> None:
    (outcome,) = run(shell("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exit 1"))
    assert outcome.words.endswith("line 19999")
    assert len(outcome.words) <= hookrun.MOST_WORDS_BYTES


def test_a_failure_ends_the_row_unless_all_are_wanted(tmp_path: Path) -> None:
    hooks = [shell("exit 1"), shell(f"echo 2 >{tmp_path}/ran")]
    assert [outcome.failure for outcome in run(*hooks)] == ["exit status 1"]
    assert not (tmp_path / "ran").exists()
    assert [outcome.failure for outcome in run(*hooks, go_on=True)] == ["exit status 1", ""]
    assert (tmp_path / "ran").read_text() == "2\n"


def test_the_timeout_takes_the_children_too_whatever_session_they_are_in(tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = f"setsid sh -c 'echo $$ >{child}; exec sleep 1000' & sleep 1000"
    for timeout_s in (1, 5, 25):  # the first, unless this machine takes longer for two shells
        began = time.monotonic()
        (outcome,) = run(shell(script, timeout_s=timeout_s))
        assert outcome.failure == f"killed: it did not end within {timeout_s} s, its timeout"
        assert timeout_s <= time.monotonic() - began < 100
        if child.exists() and child.read_text():
            break
    assert not runs(int(child.read_text()))


def test_what_a_failed_hook_left_goes_and_what_a_good_one_left_stays(tmp_path: Path) -> None:
    leave = f"setsid sh -c 'echo $$ >{tmp_path}/child; exec sleep 1000'"
    script = f"{leave} & while [ ! -s {tmp_path}/child ]; do :; done"
    (outcome,) = run(shell(script))
    assert not outcome.failure
    left = int((tmp_path / "child").read_text())
    try:
        assert runs(left)
    finally:
        os.kill(left, signal.SIGKILL)
        os.waitpid(left, 0)  # conftest.py has orphans become ours
    (tmp_path / "child").unlink()
    (outcome,) = run(shell(script + "; exit 1"))
    assert outcome.failure == "exit status 1"
    assert not runs(int((tmp_path / "child").read_text()))


def test_a_hook_ends_with_the_one_who_asked_for_it(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    until_then = ["sh", "-c", f"while [ ! -e {tmp_path}/began ]; do sleep 0.01; done"]
    with theirs, subprocess.Popen(until_then, pass_fds=[theirs.fileno()]):
        theirs.close()
        (outcome,) = run(shell(f"touch {tmp_path}/began; sleep 1000"), hangup=ours.fileno())
    ours.close()
    assert outcome.failure == "given up: the pod's shim has ended"
    assert (tmp_path / "began").exists()


def test_a_state_without_a_process_has_no_pid() -> None:
    spec = oci.parse({"ociVersion": "1.2.0", "annotations": {"a": "b"}})
    assert hookrun.state_of(spec, "c", "/b", "stopped", 0) == {
        "ociVersion": "1.2.0",
        "id": "c",
        "status": "stopped",
        "bundle": "/b",
        "annotations": {"a": "b"},
    }
