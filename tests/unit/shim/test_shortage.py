"""What a pod's cgroup may have is found in both versions' files, and a kill is told from other ends."""

from pathlib import Path

import pytest

from rpc.errors import ResourceExhausted, Unavailable
from shim import shortage
from shim.cgroup import Hierarchy

MIB = 1 << 20
NONE_V1 = str((1 << 63) - 4096)


def tree(
    top: Path, version: int, *limits: str, kills: int = 0, name: str = "casemate-0123"
) -> list[Hierarchy]:
    """Cgroups inside each other, the last of them the pod's; the first is the hierarchy's root."""
    names = (
        ("memory.limit_in_bytes", "memory.oom_control") if version == 1 else ("memory.max", "memory.events")
    )
    directory = top / "memory"
    for depth, limit in enumerate(limits):
        directory = (
            directory / (name if depth == len(limits) - 1 else f"level{depth}") if depth else directory
        )
        directory.mkdir(exist_ok=True)
        if version == 1 or depth:  # v2's root has neither
            (directory / names[0]).write_text(f"{limit}\n")
            words = "oom_kill_disable 0\nunder_oom 0" if version == 1 else "low 0\nmax 7\noom 2"
            (directory / names[1]).write_text(f"{words}\noom_kill {kills}\n")
    other = top / "cpu"
    other.mkdir(exist_ok=True)
    return [Hierarchy(other, other), Hierarchy(top / "memory", directory)]


@pytest.mark.parametrize(("version", "none"), [(1, NONE_V1), (2, "max")])
def test_the_least_of_all_limits_above_counts(tmp_path: Path, version: int, none: str) -> None:
    found = tree(tmp_path, version, none, str(300 * MIB), str(100 * MIB), none)
    assert shortage.limit_of(found) == shortage.Limit(100 * MIB, tmp_path / "memory" / "level1" / "level2")


@pytest.mark.parametrize(("version", "none"), [(1, NONE_V1), (2, "max")])
def test_without_a_limit_there_is_room(tmp_path: Path, version: int, none: str) -> None:
    found = tree(tmp_path, version, none, none)
    assert shortage.limit_of(found) is None
    shortage.check_room(1 << 40, found)


def test_a_host_that_counts_no_memory_has_room(tmp_path: Path) -> None:
    (cpu, _) = tree(tmp_path, 1, NONE_V1, NONE_V1)
    shortage.check_room(1 << 40, [cpu])
    assert not shortage.has_killed([cpu])


def test_what_does_not_fit_is_refused_with_both_sizes(tmp_path: Path) -> None:
    found = tree(tmp_path, 1, NONE_V1, str(130 * MIB), NONE_V1)
    shortage.check_room(66 * MIB, found)
    with pytest.raises(ResourceExhausted, match=r"level1 may have 130 MiB: a machine takes 131 MiB"):
        shortage.check_room(67 * MIB, found)


@pytest.mark.parametrize("version", [1, 2])
def test_an_end_is_explained_only_where_the_kernel_killed_in_the_pods_own_cgroup(
    tmp_path: Path, version: int
) -> None:
    error = Unavailable("QEMU ended unexpectedly")
    assert shortage.explained(error, tree(tmp_path, version, "max", str(90 * MIB), "max")) is error
    killed = shortage.explained(error, tree(tmp_path, version, "max", str(90 * MIB), "max", kills=1))
    assert isinstance(killed, ResourceExhausted)
    assert "level1 may have 90 MiB" in killed.brief
    assert killed.details == "QEMU ended unexpectedly"
    # containerd's own, where a client names none: others are killed there, too
    shared = tree(tmp_path, version, "max", str(90 * MIB), "max", kills=1, name="containerd.service")
    assert shortage.explained(error, shared) is error


def test_a_kill_without_a_limit_is_the_hosts(tmp_path: Path) -> None:
    found = tree(tmp_path, 2, "max", "max", "max", kills=3)
    assert "the host has no more" in shortage.explained(Unavailable("gone"), found).brief
