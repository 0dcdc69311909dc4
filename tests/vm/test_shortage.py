"""Pods that are given too little memory: each fails in words that say so, and costs nobody else anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim import cgroup
from tests.vm import faults
from tests.vm.pods import Pods
from tests.vm.test_restore import Templates, nothing, one

__all__ = ("nothing", "one")

MIB = 1 << 20
BEFORE = "before it runs anything"
KILLED = "the kernel killed a process of the pod for lack of memory"


@contextmanager
def limited(pods: Pods, size_bytes: int) -> Iterator[tuple[str, ...]]:
    """Options for a pod whose parent may have so much: kubelet's limit of a pod is one of those."""
    memory, limit = Path(cgroup.CGROUPS, "memory"), "memory.limit_in_bytes"
    if not (memory / limit).exists():
        memory, limit = Path(cgroup.CGROUPS), "memory.max"
        if "memory" not in (memory / "cgroup.subtree_control").read_text().split():
            pytest.skip("the memory controller is not enabled below the root")
    parent = memory / f"{pods.ctr.namespace}-limited"
    parent.mkdir()
    try:
        (parent / limit).write_text(str(size_bytes))
        yield ("--cgroup", f"/{parent.name}/x")
    finally:
        for each in cgroup.hierarchies():
            path = each.mounted / parent.name
            if path.is_dir():
                path.rmdir()


def refused_with(pods: Pods, size_mib: int, *words: str) -> None:
    with limited(pods, size_mib * MIB) as options:
        result = pods.run("true", options=options)
    faults.refused(result, f"may have {size_mib} MiB", *words, within_s=40)


@pytest.mark.parametrize(
    ("size_mib", "words"), [(16, BEFORE), (48, BEFORE), (80, f"133 MiB {BEFORE}"), (110, f"133 MiB {BEFORE}")]
)
def test_a_limit_that_no_machine_fits_in_is_refused_before_the_kernel_kills(
    one: Templates, size_mib: int, words: str
) -> None:
    """The last two: where RAM is copied, as much as the template has is needed at once."""
    pods = one.pods
    if "133" in words:
        with pods.detached("sleep", "1000") as name:
            if pods.state(name)["files"] != "virtiofs":
                pytest.skip("RAM is not copied here")
        used = one.store.list()[0].about["ram_bytes"]
        words = f"{(used + (64 << 20)) / MIB:.0f} MiB {BEFORE}"
    refused_with(pods, size_mib, words)
    assert one.source() == "restore"


@pytest.mark.parametrize("size_mib", [66, 100])
def test_a_boot_that_the_kernel_kills_says_so(nothing: Templates, size_mib: int) -> None:
    nothing.configure('[profiles.default]\ntemplate = "off"\n')
    refused_with(nothing.pods, size_mib, KILLED)


def test_a_machine_that_is_killed_while_it_is_restored_is_no_fault_of_its_template(one: Templates) -> None:
    """QEMU needs more than its RAM and what was kept for it."""
    pods, (key,) = one.pods, one.store.keys()
    used_mib = one.store.list()[0].about["ram_bytes"] // MIB + 65
    with limited(pods, used_mib * MIB) as options:
        result = pods.run("sleep", "1000", options=options, timeout_s=40)
    assert result.code != 0, result
    assert one.store.keys() == (key,)
    assert not one.store.failed_lately(key)
    assert one.source() == "restore"
