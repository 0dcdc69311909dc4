"""What the containers of a pod have in common, made on this machine as a guest would."""

import asyncio
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import libc
from agent.pod import Pod
from agent.reaper import Reaper
from rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from tests.unit.agent.waiting import until

PR_SET_CHILD_SUBREAPER = 36
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    """What the first process' parent leaves behind becomes ours, as it becomes PID 1's in a guest."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0)


@pytest.fixture
def sysctls(tmp_path: Path) -> Path:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/msgmax").write_text("8192\n")
    return tmp_path / "sys"


def test_shared_memory_has_the_size_that_was_asked_for(tmp_path: Path, sysctls: Path) -> None:
    shm = tmp_path / "shm"
    pod = Pod("web", str(tmp_path), Reaper())
    pod.make(str(shm), 1 << 20, {"kernel.msgmax": "9000"}, str(sysctls))
    try:
        about = os.statvfs(shm)
        assert about.f_blocks * about.f_frsize == 1 << 20
        assert shm.stat().st_mode & 0o7777 == 0o1777
        assert (sysctls / "kernel/msgmax").read_text() == "9000"
        with pytest.raises(AlreadyExists, match="is mounted already"):
            pod.make(str(shm), 1 << 20, {}, str(sysctls))
    finally:
        libc.umount(str(shm))


def test_a_parameter_that_the_kernel_lacks_leaves_nothing_made(tmp_path: Path, sysctls: Path) -> None:
    pod = Pod("web", str(tmp_path), Reaper())
    with pytest.raises(InvalidArgument, match=r"kernel\.nosuch"):
        pod.make(
            str(tmp_path / "shm"), 1 << 20, {"kernel.msgmax": "9000", "kernel.nosuch": "1"}, str(sysctls)
        )
    assert (sysctls / "kernel/msgmax").read_text() == "8192\n"
    assert not (tmp_path / "shm").exists()


def test_a_pid_namespace_is_made_once_with_a_process_that_holds_nothing(tmp_path: Path) -> None:
    async def life() -> None:
        loop = asyncio.get_running_loop()
        reaper = Reaper()
        reaper.install(loop)
        pod = Pod("web", str(tmp_path), reaper)
        path = Path(pod.pid_namespace())
        init = path.parent.parent
        pid = int(init.name)
        try:
            assert Path(pod.pid_namespace()) == path
            assert os.readlink(path) != os.readlink("/proc/self/ns/pid")
            assert os.listdir(init / "fd") == []
            status = dict(
                line.split(":\t", 1) for line in (init / "status").read_text().splitlines() if ":\t" in line
            )
            assert status["Name"] == "pause"
            assert status["NSpid"].split()[-1] == "1"
            assert status["Uid"].split() == ["65534"] * 4
            assert status["Groups"].split() == []
            assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
            assert os.listdir(init / "root") == []
        finally:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not init.exists())
        with pytest.raises(FailedPrecondition, match="has ended"):
            pod.pid_namespace()
        reaper.close(loop)

    asyncio.run(life())
