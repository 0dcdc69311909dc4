"""What a pod uses of the host, from the files of either version of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpc.api.cgroups import CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat
from rpc.errors import FailedPrecondition
from shim.usage import UNLIMITED, metrics_of


def written(directory: Path, **files: str) -> Path:
    directory.mkdir()
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_of_version_2(tmp_path: Path) -> None:
    one = written(
        tmp_path / "unified",
        cpu__stat="usage_usec 900\nuser_usec 600\nsystem_usec 300\nnice_usec 1\nnr_throttled 2\n",
        memory__current="4096\n",
        memory__max="max\n",
        memory__stat="anon 1000\nfile 2000\nshmem 3\ninactive_file 500\nactive_file 400\nslab 9\n",
        memory__events="low 0\nhigh 0\nmax 0\noom 1\noom_kill 1\n",
        pids__current="7\n",
        pids__max="100\n",
    )
    assert metrics_of([one]) == Metrics(
        pids=PidsStat(current=7, limit=100),
        cpu=CPUStat(usage_usec=900, user_usec=600, system_usec=300, nr_throttled=2),
        memory=MemoryStat(
            usage=4096,
            usage_limit=UNLIMITED,
            anon=1000,
            file=2000,
            shmem=3,
            inactive_file=500,
            active_file=400,
        ),
        memory_events=MemoryEvents(oom_kill=1),
    )


def test_of_version_1_in_every_hierarchy(tmp_path: Path) -> None:
    directories = [
        written(tmp_path / "cpuacct", cpuacct__usage="9000000\n"),
        written(tmp_path / "cpu", cpu__stat="nr_periods 5\nnr_throttled 2\nthrottled_time 7000\n"),
        written(
            tmp_path / "memory",
            memory__usage_in_bytes="4096\n",
            memory__limit_in_bytes="8192\n",
            memory__stat="cache 1\ntotal_cache 2000\ntotal_rss 1000\ntotal_inactive_file 500\n",
            memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        ),
        written(tmp_path / "pids", pids__current="7\n", pids__max="max\n"),
        written(tmp_path / "devices"),
    ]
    assert metrics_of(directories) == Metrics(
        pids=PidsStat(current=7, limit=UNLIMITED),
        cpu=CPUStat(usage_usec=9000, nr_periods=5, nr_throttled=2, throttled_usec=7),
        memory=MemoryStat(usage=4096, usage_limit=8192, anon=1000, file=2000, inactive_file=500),
        memory_events=MemoryEvents(oom_kill=3),
    )


def test_what_the_host_does_not_count_is_not_said(tmp_path: Path) -> None:
    assert metrics_of([written(tmp_path / "bare", cpu__stat="nr_periods 0\n")]) == Metrics()


def test_a_pod_without_a_cgroup_is_told_why() -> None:
    with pytest.raises(FailedPrecondition, match="named no cgroup"):
        metrics_of([])
