"""What a guest keeps of the files it read, and for how long it does not hear of what the host changes."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from config import programs
from config.load import load
from shim.vm import virtiofsd
from tests.vm.pods import RUN_S, Pods

PROGRAM_BYTES = (
    1 << 20
)  # of any program there is nothing to run without reading more than this: its libraries
SEEN_S = 60.0  # the guest asks after a second; a look takes half of one, on a quiet machine


def until(seen: Callable[[], bool], what: str) -> None:
    """Nothing tells a client on the host what a guest believes: it is asked until it knows."""
    deadline = time.monotonic() + SEEN_S
    while not seen():
        assert time.monotonic() < deadline, f"{what} is not seen after {SEEN_S} s"


def bytes_read(pid: int) -> int:
    """All that a process and its children asked the kernel for: proc(5), io, rchar."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = int(dict(line.split(": ") for line in lines)["rchar"])
    return own + sum(bytes_read(int(child)) for child in children)


def test_a_program_is_read_once(pods: Pods, tmp_path: Path) -> None:
    if not virtiofsd.is_c(programs.virtiofsd(load()), tmp_path / "cache.json"):
        pytest.skip("this virtiofsd has files be read at every open, or not for a day")
    with pods.detached("sleep", "1000") as name:
        server = pods.state(name)["virtiofsd_pid"]
        pods.exec(name, "python3", "-c", "pass").ok()
        first = bytes_read(server)
        assert first > PROGRAM_BYTES
        pods.exec(name, "python3", "-c", "pass").ok()
        assert bytes_read(server) - first < PROGRAM_BYTES // 4


def test_what_the_host_changes_in_the_root_file_system_is_seen_soon(pods: Pods) -> None:
    """As `nerdctl cp` does, through the root of the pid that containerd is told."""
    with pods.detached("sleep", "1000") as name:
        pid = next(line.split()[1] for line in pods.tasks() if line.split()[0] == name)
        etc = Path(f"/proc/{pid}/root/etc")
        (etc / "told").write_text("first")
        until(lambda: pods.exec(name, "cat", "/etc/told").out == "first", "a new file")
        (etc / "told").write_text("other")
        until(lambda: pods.exec(name, "cat", "/etc/told").out == "other", "another content of the same size")
        (etc / "replaced").write_text("renamed")
        (etc / "replaced").rename(etc / "told")
        until(lambda: pods.exec(name, "cat", "/etc/told").out == "renamed", "another file of the same name")
        (etc / "listed").mkdir()
        assert pods.exec(name, "ls", "/etc/listed").ok().out == ""
        (etc / "listed" / "later").touch()
        until(lambda: pods.exec(name, "ls", "/etc/listed").out == "later\n", "a new name in a directory")
        (etc / "told").unlink()
        until(lambda: pods.exec(name, "cat", "/etc/told").code != 0, "a file's end")


MAPPED = """\
import mmap, signal
with open('/volume/mapped', 'r+b') as file:
    memory = mmap.mmap(file.fileno(), 0)
memory[:] = b'y' * len(memory)
print('written', flush=True)
signal.pause()
"""


def test_what_was_written_to_mapped_memory_is_on_the_host_when_the_pod_is_gone(pods: Pods) -> None:
    """Nobody asks the guest's kernel for it: no msync, no close, an end by SIGKILL."""
    volume = pods.ctr.instance.work / "mapped"
    volume.mkdir()
    (volume / "mapped").write_bytes(bytes(PROGRAM_BYTES))
    mount = ("--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw")
    name = pods.ctr.new_id()
    with pods.start("python3", "-c", MAPPED, options=mount, name=name) as running:
        running.read_until(b"written", RUN_S)
        pods.kill(name).ok()
        running.finish(RUN_S)
    assert (volume / "mapped").read_bytes() == b"y" * PROGRAM_BYTES


def test_what_the_host_writes_to_a_volume_is_seen_at_the_next_open(pods: Pods) -> None:
    """Whatever size and time say: others than the container write there."""
    volume = pods.ctr.instance.work / "written"
    volume.mkdir()
    (volume / "file").write_text("0")
    mount = ("--mount", f"type=bind,src={volume},dst=/volume,options=rbind:ro")
    with pods.detached("sleep", "1000", options=mount) as name:
        for number in range(1, 6):
            with (volume / "file").open("r+") as file:
                file.write(str(number))
            assert pods.exec(name, "cat", "/volume/file").ok().out == str(number)
