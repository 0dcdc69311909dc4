"""The kernel's files become the message that containerd's clients read."""

import asyncio
from pathlib import Path

import pytest

from agent.cgroups import NO_LIMIT, Cgroup, OomWatch
from rpc.api.cgroups import IOEntry, Metrics

FILES = {
    "cgroup.procs": "12\n13\n",
    "pids.current": "2\n",
    "pids.max": "max\n",
    "cpu.stat": "usage_usec 500\nuser_usec 300\nsystem_usec 200\nnr_periods 7\nunheard.of 1\n",
    "memory.stat": "anon 4096\nfile 8192\nnews 1\nworkingset_refault_anon 3\nworkingset_refault_file 4\n",
    "memory.current": "12288\n",
    "memory.max": "1048576\n",
    "memory.peak": "16384\n",
    "memory.swap.current": "0\n",
    "memory.swap.max": "max\n",
    "memory.events": "low 0\nhigh 0\nmax 5\noom 2\noom_kill 1\noom_group_kill 0\n",
    "io.stat": "254:16 rbytes=1024 wbytes=0 rios=2 wios=0 dbytes=0 dios=0\n8:0 \n",
    "hugetlb.2MB.current": "2097152\n",
    "hugetlb.2MB.max": "max\n",
    "hugetlb.2MB.events": "max 9\n",
    "hugetlb.2MB.rsvd.current": "0\n",
}


@pytest.fixture
def cgroup(tmp_path: Path) -> Cgroup:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return Cgroup(str(tmp_path))


def test_metrics_survive_the_wire(cgroup: Cgroup) -> None:
    metrics = Metrics.decode(cgroup.metrics().encode())
    assert metrics.pids is not None
    assert (metrics.pids.current, metrics.pids.limit) == (2, NO_LIMIT)
    assert metrics.cpu is not None
    assert (metrics.cpu.usage_usec, metrics.cpu.user_usec, metrics.cpu.nr_periods) == (500, 300, 7)
    memory = metrics.memory
    assert memory is not None
    assert (memory.usage, memory.usage_limit, memory.max_usage) == (12288, 1048576, 16384)
    assert (memory.anon, memory.file, memory.workingset_refault) == (4096, 8192, 7)
    assert (memory.swap_usage, memory.swap_limit) == (0, NO_LIMIT)
    assert metrics.memory_events is not None
    assert (metrics.memory_events.oom, metrics.memory_events.oom_kill) == (2, 1)
    assert metrics.io is not None
    assert metrics.io.usage[0] == IOEntry(major=254, minor=16, rbytes=1024, rios=2)
    assert metrics.io.usage[1] == IOEntry(major=8)
    assert [(one.pagesize, one.current, one.max, one.failcnt) for one in metrics.hugetlb] == [
        ("2MB", 2097152, NO_LIMIT, 9)
    ]


def test_controllers_that_are_off_are_left_out(tmp_path: Path) -> None:
    assert Cgroup(str(tmp_path)).metrics() == Metrics()
    assert Cgroup(str(tmp_path / "gone")).metrics() == Metrics()
    assert Cgroup(str(tmp_path / "gone")).oom_kills() == 0


def test_pids_include_those_below(cgroup: Cgroup) -> None:
    below = Path(cgroup.directory, "below")
    below.mkdir()
    (below / "cgroup.procs").write_text("14\n")
    assert cgroup.pids() == [12, 13, 14]
    assert Cgroup(cgroup.directory + "/gone").pids() == []


def test_kill_writes_to_the_kernels_file(cgroup: Cgroup) -> None:
    cgroup.kill()
    assert Path(cgroup.directory, "cgroup.kill").read_text() == "1"
    Cgroup(cgroup.directory + "/gone").kill()


def test_no_memory_controller_no_watch(tmp_path: Path) -> None:
    async def scenario() -> None:
        watch = OomWatch(asyncio.get_running_loop())
        assert watch.add(Cgroup(str(tmp_path)), lambda: None) == -1
        watch.remove(-1)
        watch.close()

    asyncio.run(scenario())
