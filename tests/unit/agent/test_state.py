"""What crun start and crun delete would do, done on the directory and the FIFO that crun create leaves."""

import errno
import os
import select
from pathlib import Path

import pytest

from agent.cgroups import Cgroup
from agent.state import NobodyWaitsError, let_go, take_away


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a container that waits: crun opens the FIFO to read before the container's init exists."""
    state = tmp_path / "state"
    state.mkdir()
    os.mkfifo(state / "exec.fifo")
    return state


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """As the kernel has them: directories that can be removed whatever is shown in them."""
    path = tmp_path / "cgroup"
    (path / "below" / "further").mkdir(parents=True)
    return path


def test_who_waits_is_let_go_and_the_fifo_is_gone_before(directory: Path) -> None:
    waiting = os.open(directory / "exec.fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert let_go(str(directory))
    assert select.select([waiting], [], [], 0)[0]
    assert os.read(waiting, 16) == b"\0"
    assert os.listdir(directory) == []
    os.close(waiting)


def test_nobody_is_waited_for_at_a_fifo_without_a_reader(directory: Path) -> None:
    with pytest.raises(NobodyWaitsError):
        let_go(str(directory))
    assert os.listdir(directory) == ["exec.fifo"]


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_what_is_no_fifo_is_left_to_crun(directory: Path, kind: str) -> None:
    (directory / "exec.fifo").unlink()
    if kind == "file":
        (directory / "exec.fifo").write_text("as it was")
    assert not let_go(str(directory))
    if kind == "file":
        assert (directory / "exec.fifo").read_text() == "as it was"


def test_what_is_left_is_taken_away(directory: Path, cgroup: Path) -> None:
    (directory / "status").write_text("{}")
    assert take_away(str(directory), Cgroup(str(cgroup)))
    assert not directory.exists()
    assert not cgroup.exists()
    assert take_away(str(directory), Cgroup(str(cgroup)))


def test_a_cgroup_that_is_in_use_is_left_to_crun_with_the_state(
    directory: Path, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: str) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    monkeypatch.setattr(os, "rmdir", busy)
    assert not take_away(str(directory), Cgroup(str(cgroup)))
    assert (directory / "exec.fifo").exists()


def test_a_state_directory_of_another_shape_is_left_to_crun(directory: Path, cgroup: Path) -> None:
    (directory / "unheard-of").mkdir()
    assert not take_away(str(directory), Cgroup(str(cgroup)))
    assert directory.exists()
