"""The size of a pod's machine: its profile's, or what its limits ask for, within what may be."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import Profile
from config.sources import read_defaults
from shim.oci import Limits
from shim.sizing import GUEST_BYTES, GUEST_SHARE, HOST_BYTES, cpus, grown
from shim.wants import wants_of

MIB, GIB = 1 << 20, 1 << 30
HUGE = Limits(memory_bytes=1 << 59, cpu_quota_us=1 << 40)


def profile(**changes: Any) -> Profile:
    settings = read_defaults().settings
    limited = {"max_vcpus": 64, "max_memory_bytes": 1 << 50} | changes
    return settings.profiles["default"].replace(**limited)


@pytest.fixture
def large_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 CPUs and 1 TiB, whatever this one has."""
    facts = {"SC_NPROCESSORS_ONLN": 64, "SC_PHYS_PAGES": 1 << 28, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", facts.__getitem__)


@pytest.mark.parametrize(
    ("limit", "memory"),
    [
        (0, 256),
        (-1, 256),
        (64 * MIB, 256),
        (128 * MIB, 256),
        (192 * MIB, 384),
        (300 * MIB, 512),
        (512 * MIB, 768),
        (GIB, 1536),
        (2 * GIB, 3072),
        (100 * GIB, 128 << 10),
        (9223372036854771712, 256),
    ],
)
@pytest.mark.usefixtures("large_host")
def test_memory_is_the_limits_with_what_the_guest_needs_in_steps(limit: int, memory: int) -> None:
    assert grown(profile(), Limits(memory_bytes=limit)).memory_bytes == memory * MIB


@pytest.mark.parametrize(
    ("quota_us", "period_us", "count"),
    [
        (0, 0, 1),
        (-1, 100_000, 1),
        (50_000, 100_000, 1),
        (100_000, 0, 1),
        (100_001, 100_000, 2),
        (250_000, 100_000, 3),
        (2_000_000, 1_000_000, 2),
        (1 << 62, 1, 64),
    ],
)
@pytest.mark.usefixtures("large_host")
def test_cpus_are_the_quotas_rounded_up(quota_us: int, period_us: int, count: int) -> None:
    assert grown(profile(), Limits(0, quota_us, period_us)).vcpus == count


def test_without_a_period_it_is_the_kernels() -> None:
    assert cpus(Limits(0, 150_000)) == cpus(Limits(0, 150_000, -5)) == 1.5


def test_at_most_what_the_host_has_where_the_profile_says_nothing() -> None:
    found = grown(profile(max_vcpus=0, max_memory_bytes=0), HUGE)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.vcpus == os.sysconf("SC_NPROCESSORS_ONLN")
    assert total / 2 < found.memory_bytes <= total


@pytest.mark.usefixtures("large_host")
def test_at_most_what_the_profile_lets_it_and_never_less_than_it_says() -> None:
    small = profile(max_vcpus=2, max_memory_bytes=700 * MIB)
    assert (grown(small, HUGE).vcpus, grown(small, HUGE).memory_bytes) == (2, 512 * MIB)
    assert grown(small.replace(max_vcpus=1, max_memory_bytes=48 * MIB), HUGE).memory_bytes == 256 * MIB
    fixed = small.replace(vcpus=4, memory_bytes=700 * MIB)
    assert grown(fixed, HUGE) == fixed


@pytest.mark.usefixtures("large_host")
def test_what_fits_into_the_pods_cgroup_beside_what_the_host_needs_for_it() -> None:
    asked = Limits(memory_bytes=GIB)
    assert grown(profile(), asked, room=lambda: 1536 * MIB + HOST_BYTES).memory_bytes == 1536 * MIB
    assert grown(profile(), asked, room=lambda: 1536 * MIB + HOST_BYTES - 1).memory_bytes == GIB
    assert grown(profile(), asked, room=lambda: 1).memory_bytes == 256 * MIB


@given(st.integers(0, 1 << 45), st.integers(64 * MIB, 1 << 46))
def test_it_is_enough_or_all_that_there_may_be(limit: int, most: int) -> None:
    base = profile(max_memory_bytes=most)
    found = grown(base, Limits(memory_bytes=limit), room=lambda: 1 << 60).memory_bytes
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = max(min(most, total), base.memory_bytes)
    needed = limit + limit // GUEST_SHARE + GUEST_BYTES
    assert base.memory_bytes <= found <= most
    assert not limit or found >= needed or found > most * 2 // 3 - 1
    assert not limit or found == base.memory_bytes or found < 2 * needed


def document(**changes: Any) -> dict[str, Any]:
    resources = {"memory": {"limit": 2 * GIB}, "cpu": {"quota": 200_000, "period": 100_000}}
    linux = {
        "resources": resources,
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "network")],
    }
    return {"linux": linux} | changes


@pytest.mark.usefixtures("large_host")
def test_a_pod_wants_what_its_container_may_use() -> None:
    wanted = wants_of(document(), read_defaults().settings, "default", "web").profile
    assert (wanted.vcpus, wanted.memory_bytes) == (2, 3 * GIB)


@pytest.mark.usefixtures("large_host")
def test_a_pod_of_cri_wants_what_the_kubelet_says_of_all_its_containers() -> None:
    """The sandbox container's own resources are the pause program's."""
    cri = "io.kubernetes.cri."
    said = {
        f"{cri}container-type": "sandbox",
        f"{cri}sandbox-memory": str(GIB),
        f"{cri}sandbox-cpu-quota": "300000",
        f"{cri}sandbox-cpu-period": "100000",
    }
    wanted = wants_of(document(annotations=said), read_defaults().settings, "default", "web").profile
    assert (wanted.vcpus, wanted.memory_bytes) == (3, 1536 * MIB)


@pytest.mark.usefixtures("large_host")
@pytest.mark.parametrize(
    ("name", "value", "size"),
    [("dev.casemate.vcpus", "1", (1, 3 * GIB)), ("dev.casemate.memory", "512MiB", (2, 512 * MIB))],
)
def test_what_an_annotation_says_is_what_it_has(name: str, value: str, size: tuple[int, int]) -> None:
    settings = read_defaults().settings.replace(allowed_annotations=(name,))
    wanted = wants_of(document(annotations={name: value}), settings, "default", "web").profile
    assert (wanted.vcpus, wanted.memory_bytes) == size
