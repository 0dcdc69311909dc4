"""Limits: what the guest gets of them, what is refused, and what the log says of those beyond the VM."""

from __future__ import annotations

from typing import Any

import pytest

from config.settings import Profile
from rpc.errors import InvalidArgument, Unimplemented
from shim import oci, resources

MIB = 1 << 20
PROFILE = Profile(
    name="default",
    vcpus=2,
    memory_bytes=256 * MIB,
    max_vcpus=0,
    max_memory_bytes=0,
    image="default",
    kernel_cmdline="",
    cpu_model="auto",
    template="shared",
    files="virtiofs",
    hugepages="auto",
    cpu_policy="shared",
)


def beyond(**given: Any) -> tuple[str, ...]:
    return resources.beyond(oci.limits(given), PROFILE)


def test_a_limit_beyond_the_vm_names_the_field_and_the_annotation() -> None:
    (line,) = beyond(memory={"limit": 1 << 30})
    assert line.startswith("linux.resources.memory.limit is 1024 MiB, but the whole VM has 256 MiB: ")
    assert "dev.casemate.memory" in line
    assert "dev.casemate.profile" in line
    (line,) = beyond(cpu={"quota": 250_000, "period": 100_000})
    assert line.startswith("linux.resources.cpu.quota is 2.5 CPUs, but the whole VM has 2: ")
    assert "dev.casemate.vcpus" in line


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"memory": None, "cpu": None},
        {"memory": {"limit": 256 * MIB}, "cpu": {"quota": 200_000}},
        {"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100_000}},
        {"memory": {"limit": 0}, "cpu": {"quota": 0, "period": 0}},
    ],
)
def test_what_the_vm_can_give_is_nothing_to_tell(given: dict[str, Any]) -> None:
    assert beyond(**given) == ()


def test_without_a_period_it_is_the_kernels() -> None:
    assert len(beyond(cpu={"quota": 200_001})) == 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"memory": []}, "linux.resources.memory is"),
        ({"memory": {"limit": "1GiB"}}, "linux.resources.memory.limit is"),
        ({"cpu": {"quota": True}}, "linux.resources.cpu.quota is"),
    ],
)
def test_a_limit_of_another_type_is_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        beyond(**given)


@pytest.mark.parametrize(("table", "field"), [("unified", "cpuset.cpus"), ("blockIO", "weight")])
def test_a_share_of_what_is_the_hosts_is_left_out_by_name(table: str, field: str) -> None:
    given = {table: {field: "1", "other": "2"}}
    left, lines = resources.for_guest(given)
    assert left == {table: {"other": "2"}}
    assert [line.partition(" ")[0] for line in lines] == [f"linux.resources.{table}.{field}"]
    assert given == {table: {field: "1", "other": "2"}}


@pytest.mark.parametrize("name", [name for name, _ in resources.REFUSED])
def test_a_limit_that_nothing_would_hold_is_refused_by_name(name: str) -> None:
    outer, _, inner = name.partition(".")
    asked: dict[str, Any] = {outer: {inner: [{"major": 8}]} if inner else {"x": {}}}
    with pytest.raises(Unimplemented, match=f"linux.resources.{name}: not possible in a VM"):
        resources.for_guest(asked)


def test_what_is_empty_is_no_request() -> None:
    """Docker writes every field there is."""
    block: dict[str, Any] = {"weightDevice": [], "throttleReadBpsDevice": [], "weight": 0}
    _, lines = resources.for_guest({"blockIO": block, "network": {}, "rdma": None, "cpu": {"cpus": ""}})
    assert lines == ()


def test_a_table_of_another_type_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.resources\.blockIO is not of type dict"):
        resources.for_guest({"blockIO": []})
