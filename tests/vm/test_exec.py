"""`ctr task exec`: more processes in a running container."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.vm.faults import AT_ONCE_S
from tests.vm.pods import TERMINAL_PROGRAM, Pods, every_version


@pytest.mark.client("ctr task exec", "works", "")
@every_version
def test_exec_returns_the_exit_code(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        for code in (0, 3, 127):
            result = pods.exec(name, "sh", "-c", f"echo out; echo err >&2; exit {code}")
            assert (result.code, result.stdout, result.stderr) == (code, b"out\n", b"err\n")


def test_exec_reads_stdin(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        data = (
            b"through and through\n" * 50_000
        )  # more than pipes hold: ctr forgets an end that comes too early
        assert pods.exec(name, "cat", stdin=data).ok().stdout == data


def test_exec_has_the_containers_view_and_its_own_directory(pods: Pods) -> None:
    with pods.detached(
        "sh", "-c", "echo here > /tmp/mark; exec sleep 1000", options=("--env", "FROM=spec")
    ) as name:
        result = pods.exec(
            name, "sh", "-c", "pwd; cat /tmp/mark; echo $FROM; id -u", options=("--cwd", "/usr")
        )
        assert result.ok().out == "/usr\nhere\nspec\n0\n"
        result = pods.exec(name, "id", "-u", options=("--user", "65534"))
        assert result.ok().out == "65534\n"


@pytest.mark.client("ctr task exec --tty", "works", "")
def test_exec_with_a_terminal(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        argv = ("task", "exec", "--tty", "--exec-id", "t1", name, "python3", "-c", TERMINAL_PROGRAM)
        with pods.ctr.terminal(*argv, columns=90, rows=30) as terminal:
            terminal.expect(rb"isatty True True True", 30)
            terminal.expect(rb"size=90x30", 30)
            terminal.resize_until(60, 20, rb"size=60x20", 30)
            terminal.write(b"quit\r")
            assert terminal.finish(20)[0] == 7


def test_many_execs_at_once(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name, ThreadPoolExecutor(12) as pool:
        results = list(pool.map(lambda n: pods.exec(name, "sh", "-c", f"echo {n}; exit {n}"), range(36)))
    assert [result.code for result in results] == list(range(36))
    assert [result.out for result in results] == [f"{n}\n" for n in range(36)]


def test_exec_of_a_missing_command_says_so(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        result = pods.exec(name, "no-such-program")
        assert result.code != 0
        assert "no-such-program" in result.err
        assert "not found" in result.err
        assert pods.exec(name, "echo", "fine").ok().out == "fine\n"


def test_exec_in_a_missing_directory_says_so(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        result = pods.exec(name, "true", options=("--cwd", "/no/such/place"))
        assert result.code != 0
        assert "/no/such/place" in result.err


def test_a_second_exec_with_the_same_id_already_exists(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        pods.ctr("task", "exec", "--detach", "--exec-id", "twin", name, "sleep", "1000").ok()
        result = pods.ctr("task", "exec", "--exec-id", "twin", name, "true")
        assert result.code != 0
        assert "twin" in result.err
        assert "exists" in result.err


def test_exec_after_the_end_is_refused(pods: Pods) -> None:
    with pods.detached("true") as name:
        pods.wait_status(name, "STOPPED")
        result = pods.exec(name, "true")
        assert result.code != 0
        assert result.seconds < AT_ONCE_S


def test_the_end_of_the_container_ends_its_execs(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        argv = ("task", "exec", "--exec-id", "e", name, "sh", "-c", "echo up; exec sleep 1000")
        with pods.ctr.start(*argv) as running:
            running.read_until(b"up\n", 30)
            pods.kill(name).ok()
            assert running.finish(30).code == 137
