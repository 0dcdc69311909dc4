"""A real casemated: what its children have of who asked, when it declines, and what its end leaves."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.forkserver import SOCKET
from tests.unit.node.servers import SERVER, WAIT_S, Server, environment, kill, serving, start

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def run() -> Iterator[Path]:
    """A run directory whose path is short enough for sockets."""
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    (base / "run").mkdir()
    yield base / "run"
    shutil.rmtree(base)


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with serving(run) as server:
        yield server


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- what a child becomes ---


def test_the_child_is_told_all_that_run_is_told(run: Path, server: Server) -> None:
    said, facts = start(run, more={"TTRPC_ADDRESS": "/t"})
    assert said["remark"] == ""
    assert facts is not None
    assert facts["request"]["namespace"] == "ns"
    assert facts["request"]["ttrpc_address"] == "/t"
    assert facts["request"]["spec"] == {"hostname": "web"}
    assert (facts["profile"], facts["forked_by"]) == ("default", "casemated")
    assert facts["started"] == said["ticks"]


def test_the_child_has_the_environment_of_start_and_nothing_of_casemateds(run: Path) -> None:
    with serving(run, more={"OF_CASEMATED": "secret"}):
        said, facts = start(run, more={"OF_CONTAINERD": "x", "LD_LIBRARY_PATH": "/opt/containerd/lib"})
    assert facts is not None
    assert facts["environment"] == said["environment"]
    assert facts["environment"]["OF_CONTAINERD"] == "x"
    assert "secret" not in facts["environ"]
    assert facts["cmdline"].replace("\0", " ").startswith(f"{sys.executable} -c import json")


def test_the_child_has_the_limits_umask_and_priority_of_start(run: Path) -> None:
    odd = ("prlimit", "--nofile=512:2048", "--stack=4194304:8388608", "nice", "-n", "3")
    with serving(run, wrapper=("prlimit", "--nofile=700:4096")):
        said, facts = start(run, wrapper=odd, umask=0o27)
    assert facts is not None, said
    assert facts["limits"] == said["limits"]
    assert facts["limits"][7] == [512, 2048]  # RLIMIT_NOFILE
    assert facts["umask"] == 0o27
    assert facts["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 3


def test_the_child_may_run_where_start_may(run: Path, server: Server) -> None:
    (first, *_) = sorted(os.sched_getaffinity(0))
    _, facts = start(run, wrapper=("taskset", "-c", str(first)))
    assert facts is not None
    assert facts["affinity"] == [first]


def test_the_child_has_the_oom_score_of_start(run: Path, server: Server) -> None:
    script = 'echo 321 > /proc/self/oom_score_adj; exec "$@"'
    _, facts = start(run, wrapper=("sh", "-c", script, "sh"))
    assert facts is not None
    assert facts["oom"] == "321"


@needs_root
def test_the_child_is_in_the_cgroups_of_start(run: Path, server: Server) -> None:
    from shim.cgroup import hierarchies

    made = []
    try:
        for hierarchy in hierarchies():
            directory = hierarchy.origin / f"casemate-test-{os.getpid()}"
            directory.mkdir()
            made.append(directory)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (directory / name).exists() and not (directory / "cgroup.controllers").exists():
                    (directory / name).write_text((directory.parent / name).read_text())
        script = f'for each in {" ".join(map(str, made))}; do echo $$ > $each/cgroup.procs; done; exec "$@"'
        said, facts = start(run, wrapper=("sh", "-c", script, "sh"))
    finally:
        for directory in made:
            directory.rmdir()
    assert facts is not None, said
    assert facts["cgroup"] == said["cgroup"]
    assert facts["cgroup"].count(f"casemate-test-{os.getpid()}") == len(made) > 0


def test_the_child_keeps_no_descriptor_and_no_handler_of_the_servers(run: Path, server: Server) -> None:
    _, facts = start(run)
    assert facts is not None
    assert [name for name in facts["fds"] if name.startswith("/") and not name.startswith("/proc")] == [
        "/dev/null",  # 0 is casemated's, until run() detaches
        "/dev/null",
        "/dev/null",
    ]
    assert [name for name in facts["fds"] if not name.startswith("/")] == ["socket:"], "the listener"
    blocked, ignored = (
        int(line.split()[1], 16) for line in facts["signals"] if line.startswith(("SigBlk", "SigIgn"))
    )
    assert blocked == 0
    # glibc's own signals, which no program has a say over, are ignored in what its posix_spawn starts.
    ours = sum(1 << number - 1 for number in signal.valid_signals())
    assert ignored & ours == sum(1 << number - 1 for number in (signal.SIGPIPE, signal.SIGXFSZ))


# --- when it declines ---


def declined(run: Path, **given: object) -> str:
    said, facts = start(run, **given)  # type: ignore[arg-type]
    assert facts is None
    return str(said["remark"])


def test_what_is_read_when_a_program_begins_has_to_be_the_same(run: Path, server: Server) -> None:
    assert "another MALLOC_ARENA_MAX" in declined(run, more={"MALLOC_ARENA_MAX": "1"})


def test_another_installation_is_not_used(run: Path, server: Server) -> None:
    other = run.parent / "other"
    packages = ("shim", "config", "rpc", "images", "node")
    for name in packages:
        shutil.copytree(Path(__file__).parents[3] / name, other / name)
    assert "another installation: package" in declined(run, more={"PYTHONPATH": str(other)})


@needs_root
@pytest.mark.parametrize("kind", ["net", "uts", "ipc", "mount", "cgroup"])
def test_other_namespaces_are_not_entered(run: Path, server: Server, kind: str) -> None:
    remark = declined(run, wrapper=("unshare", f"--{kind}"))
    assert f"casemated is in another {kind.replace('mount', 'mnt')} namespace" in remark


@needs_root
def test_fewer_privileges_are_not_made_more(run: Path, server: Server) -> None:
    assert "casemated's Cap" in declined(run, wrapper=("setpriv", "--bounding-set", "-sys_module"))
    assert "NoNewPrivs" in declined(run, wrapper=("setpriv", "--no-new-privs"))


@needs_root
def test_another_user_is_not_served(run: Path, server: Server) -> None:
    with pytest.raises(AssertionError):  # it may not even connect, nor make its own socket
        start(run, wrapper=("setpriv", "--reuid=65534", "--clear-groups"))
    assert (run / SOCKET).stat().st_mode & 0o777 == 0o600


def test_code_that_was_changed_is_not_forked_and_replaced(run: Path) -> None:
    """A package of the server's that is updated: one start does without, the next has the new one."""
    package = run.parent / "packages"
    package.mkdir()
    for name in ("shim", "config", "rpc", "images", "node"):
        shutil.copytree(Path(__file__).parents[3] / name, package / name)
    old_s = time.time() - 3600
    more = {"PYTHONPATH": str(package)}
    wait_settled(package)
    with serving(run, more=more) as server:
        assert start(run, more=more)[0]["taken"]
        os.utime(package / "shim/pod.py", (old_s, old_s))
        assert f"before an update ({package}/shim/pod.py)" in declined(run, more=more)
        pid, zygote = server.process.pid, server.wait_serving(2)
        assert start(run, more=more)[0]["taken"]
        assert (server.process.pid, children(pid)) == (pid, [zygote])


def wait_settled(package: Path) -> None:
    """Until what was copied is older than what a loading process calls fresh."""
    from node.loaded import RACY_S

    newest_s = max(path.stat().st_ctime for path in package.rglob("*"))
    while time.time() < newest_s + 2 * RACY_S:
        time.sleep(0.01)


# --- its end ---


def test_the_fork_server_dies_with_casemated(run: Path, server: Server) -> None:
    pidfd = os.pidfd_open(server.zygote)
    server.process.kill()
    server.process.wait()
    import select

    assert select.select([pidfd], [], [], WAIT_S)[0]
    os.close(pidfd)
    assert declined(run) == ""
    with serving(run):  # what is left of the one before is no obstacle
        assert start(run)[0]["taken"]


def test_a_fork_server_that_is_killed_is_replaced(run: Path, server: Server) -> None:
    kill(server.zygote)
    again = server.wait_serving(2)
    assert again != server.zygote
    assert start(run)[0]["taken"]


def test_a_start_that_waits_in_the_queue_of_a_killed_server_goes_alone(run: Path, server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    os.kill(server.zygote, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(declined, run)
        wait_queued(run / SOCKET)
        kill(server.zygote)
        # Whether it was reading or writing when the server went is luck.
        assert any(word in waiting.result().lower() for word in ("reset", "left", "broken pipe"))


def test_a_server_that_is_stopped_is_not_waited_for_long(run: Path, server: Server) -> None:
    os.kill(server.zygote, signal.SIGSTOP)
    assert declined(run, patience_s=None) == "timed out"
    os.kill(server.zygote, signal.SIGCONT)
    assert start(run)[0]["taken"]  # whoever left in between is nobody's daemon
    assert "Traceback" not in server.log.read_text()


def wait_queued(path: Path) -> None:
    """Until somebody has connected and was not accepted (proc(5), /proc/net/unix: St 02, connecting)."""
    deadline = time.monotonic() + WAIT_S
    while not any(
        str(path) in line and line.split()[5] == "02"  # of the listener's path when it was bound
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_zombie_is_left(run: Path, server: Server) -> None:
    for _ in range(5):
        assert start(run)[0]["taken"]
    declined(run, more={"MALLOC_ARENA_MAX": "1"})
    deadline = time.monotonic() + WAIT_S
    while children(server.zygote) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children(server.zygote) == []
    assert children(server.process.pid) == [server.zygote]


def test_sigterm_ends_it_and_takes_its_socket_away(run: Path, server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT_S) == 0
    assert list(run.glob(f"{SOCKET}*")) == []


def test_sighup_has_it_begin_anew_as_the_same_process(run: Path, server: Server) -> None:
    server.process.send_signal(signal.SIGHUP)
    again = server.wait_serving(2)
    assert children(server.process.pid) == [again]
    assert start(run)[0]["taken"]


def command(run: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SERVER, *argv],
        env=environment(run),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def test_there_is_one_for_a_run_directory(run: Path, server: Server) -> None:
    second = command(run)
    assert (second.returncode, second.stdout) == (1, "")
    assert f"{run}: another casemated runs" in second.stderr
    assert start(run)[0]["taken"]


def test_the_command_line_is_checked(run: Path) -> None:
    assert (command(run, "--help").returncode, command(run, "--nosuch").returncode) == (0, 2)
    assert "usage: casemated" in command(run, "--help").stdout


def test_readiness_is_told_to_systemd(run: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(run / "notify"))
        notify.settimeout(WAIT_S)
        with serving(run, more={"NOTIFY_SOCKET": str(run / "notify")}):
            assert notify.recv(100) == b"READY=1"
        assert notify.recv(100) == b"STOPPING=1"


# --- the ledger ---


def test_it_says_in_the_ledger_what_is_still_held_also_without_a_fork_server(run: Path) -> None:
    from tests.unit.vfio.hosts import BOOT, OWNER, POD, plain
    from vfio.ledger.demand import Request, Wanted
    from vfio.ledger.ledger import Ledger
    from vfio.ledger.records import Cause, Instant

    was = Instant(1000.0, 100.0, BOOT)
    now = was
    with Ledger(run.parent / "ledger", clock=lambda: now) as ledger:
        ledger.claim(POD, OWNER, Wanted((Request(),)), plain(1))
        now = Instant(1040.0, 140.0, BOOT)
        assert ledger.still_held()
    config = run.parent / "config"
    config.mkdir()
    (config / "config.toml").write_text("[node]\nfork_server = false\n")
    done = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment(run, {"CASEMATE_CONFIG_DIR": str(config)})
    )
    try:
        with Ledger(run.parent / "ledger") as ledger:
            deadline = time.monotonic() + WAIT_S
            # Its first word in this boot keeps what was heard last of the one before.
            while not (lines := [each for each in ledger.log() if each.cause is Cause.BOOT]):
                assert done.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert [(each.at_s, each.address) for each in lines] == [(1040.0, None)]
            assert [use.seconds for use in ledger.usage()] == [40.0]
    finally:
        done.terminate()
        done.wait(WAIT_S)
