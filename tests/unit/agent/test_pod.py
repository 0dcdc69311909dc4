"""What the containers of a pod have in common, made on this machine as a guest would."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import libc
from agent.pod import Pod
from agent.reaper import Reaper
from rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from tests.unit.agent.waiting import as_subreaper, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    """What the first process' parent leaves behind becomes ours, as it becomes PID 1's in a guest."""
    with as_subreaper():
        yield


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


@contextmanager
def installed_reaper() -> Iterator[Reaper]:
    loop = asyncio.get_running_loop()
    reaper = Reaper()
    reaper.install(loop)
    try:
        yield reaper
    finally:
        reaper.close(loop)


async def end(pod: Pod) -> None:
    """Of the first process, which the pod hears of."""
    init = Path(pod.pid_namespace()).parent.parent
    os.kill(int(init.name), signal.SIGKILL)
    await until(lambda: not init.exists())
    with pytest.raises(FailedPrecondition, match="has ended"):
        pod.pid_namespace()


def test_a_pid_namespace_is_made_once_with_a_process_that_holds_nothing(tmp_path: Path) -> None:
    async def look(pod: Pod) -> None:
        path = Path(pod.pid_namespace())
        init = path.parent.parent
        assert Path(pod.pid_namespace()) == path
        assert os.readlink(path) != os.readlink("/proc/self/ns/pid")
        await until(lambda: os.listdir(init / "fd") == [])  # the last that it closes is not what we hear of
        status = dict(
            line.split(":\t", 1) for line in (init / "status").read_text().splitlines() if ":\t" in line
        )
        assert status["Name"] == "pause"
        assert status["NSpid"].split()[-1] == "1"
        assert status["Uid"].split() == ["65534"] * 4
        assert status["Groups"].split() == []
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
        assert os.listdir(init / "root") == []

    async def life() -> None:
        with installed_reaper() as reaper:
            pod = Pod("web", str(tmp_path), reaper)
            try:
                await look(pod)
            finally:
                await end(pod)

    asyncio.run(life())


def test_an_end_of_the_first_process_is_heard_of_as_soon_as_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent has nothing open any more, and is not gone yet: a dead child of its would be nobody's."""
    leave = os._exit

    def leave_late(status: int) -> None:
        os.closerange(0, 1 << 16)
        time.sleep(0.2)
        leave(status)

    async def life() -> None:
        with installed_reaper() as reaper:
            await end(Pod("web", str(tmp_path), reaper))

    monkeypatch.setattr(os, "_exit", leave_late)
    asyncio.run(life())
