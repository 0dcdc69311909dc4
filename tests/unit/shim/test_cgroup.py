"""Where a pod's processes belong: both forms of a client's path, and every way to mount cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.errors import InvalidArgument
from shim.cgroup import Hierarchy, Place, hierarchies, parent_of
from shim.journal import Journal, read_journal
from tests.unit.shim.pods import config

V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:12 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/nowhere rw - cgroup2 cgroup2 rw
99 31 0:32 / /var/lib/machines/a/sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
"""


@pytest.mark.parametrize(
    ("path", "parent"),
    [
        ("/default/web", "/default"),  # ctr
        ("/kubepods/burstable/pod1/0123", "/kubepods/burstable/pod1"),  # kubelet, cgroupfs
        (
            "kubepods-burstable-pod1_2.slice:cri-containerd:0123",  # kubelet, systemd
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
        ),
        ("system.slice:nerdctl:0123", "/system.slice"),
        (":cri-containerd:0123", "/system.slice"),
        ("-.slice:x:y", "/"),
        ("web", "/"),
        ("/web", "/"),
        ("//a//b/./c/", "/a/b"),
        ("/a:b:c/d", "/a:b:c"),
    ],
)
def test_the_pods_parent_is_that_of_the_containers_cgroup(path: str, parent: str) -> None:
    assert parent_of(path) == parent


@pytest.mark.parametrize("name", ["kubepods", "a--b.slice", "-a.slice", "a-.slice", ".slice", "a.service"])
def test_what_is_no_slice_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a systemd slice"):
        parent_of(f"{name}:x:y")


@given(st.lists(st.sampled_from(["..", ".", "a", "", "b"])).map("/".join))
def test_no_path_leads_out_of_the_hierarchy(path: str) -> None:
    parent = parent_of(path)
    assert parent.startswith("/")
    assert ".." not in parent.split("/")


def test_v2_is_one_hierarchy() -> None:
    expected = Path("/sys/fs/cgroup/system.slice/containerd.service")
    assert hierarchies(V2, "0::/system.slice/containerd.service\n") == [
        Hierarchy(Path("/sys/fs/cgroup"), expected)
    ]


def test_v1_is_every_hierarchy_once_and_v2_only_with_a_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = "9:memory:/a:b\n3:cpu,cpuacct:/c\n1:name=systemd:/d\n0::/e\n"
    asked: list[Path] = []

    def none(path: Path) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr("shim.cgroup._has_controllers", none)
    top = Path("/sys/fs/cgroup")
    assert hierarchies(V1, own) == [
        Hierarchy(top / "cpu,cpuacct", top / "cpu,cpuacct/c"),
        Hierarchy(top / "memory", top / "memory/a:b"),
        Hierarchy(top / "systemd", top / "systemd/d"),
    ]
    assert asked == [top / "nowhere"]
    monkeypatch.setattr("shim.cgroup._has_controllers", lambda path: True)
    assert hierarchies(V1, own)[-1] == Hierarchy(top / "nowhere", top / "nowhere/e")


def test_a_mount_that_shows_a_part_of_the_tree() -> None:
    """As docker's without a cgroup namespace."""
    mounted = "5 4 0:32 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    top = Path("/sys/fs/cgroup/memory")
    assert hierarchies(mounted, "9:memory:/docker/1/x\n") == [Hierarchy(top, top / "x")]
    assert hierarchies(mounted, "9:memory:/docker/1\n") == [Hierarchy(top, top)]
    assert hierarchies(mounted, "9:memory:/other\n") == [Hierarchy(top, top)]


def test_no_path_is_no_place(tmp_path: Path) -> None:
    place = Place("0123456789abcdef")
    journal = Journal(tmp_path / "journal")
    for document in (None, config(), config(linux={"cgroupsPath": ""})):
        place.enter(document, journal, [])
    assert place.directories == []
    place.leave()
    assert read_journal(tmp_path / "journal") == []
    journal.close()


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(InvalidArgument, match=r"linux\.cgroupsPath is not of type str"):
        Place("0123456789abcdef").enter({"linux": {"cgroupsPath": 7}}, journal, [])
    journal.close()
