"""Which block devices a container asks for, and what it may do with them."""

from typing import Any

import pytest

from shim import oci
from shim.blockdevices import BlockDevice, asked_for, may_use_all, without_rules

DISK = {"path": "/dev/disk", "type": "b", "major": 7, "minor": 3}


def spec(rules: list[dict[str, Any]], **more: Any) -> oci.Spec:
    return oci.parse({"linux": {"devices": [DISK | more], "resources": {"devices": rules}}})


def rule(access: str, *, allow: bool = True, **numbers: Any) -> dict[str, Any]:
    return {"allow": allow, "access": access, **numbers}


def test_a_device_has_its_path_and_rights_in_the_container() -> None:
    found = asked_for(spec([rule("rwm")], fileMode=0o100640, uid=5, gid=6))
    assert found == (BlockDevice("/dev/disk", 7, 3, 0o640, 5, 6, read_only=False),)
    assert asked_for(oci.parse({"linux": {"devices": [{"path": "/dev/x", "type": "c"}]}})) == ()


@pytest.mark.parametrize(
    ("rules", "read_only"),
    [
        ([], True),
        ([rule("rwm")], False),
        ([rule("rm", type="b", major=7, minor=3)], True),
        ([rule("rwm", type="b", major=7, minor=3)], False),
        ([rule("rwm", type="b", major=7, minor=-1)], False),
        ([rule("rwm", type="b", major=7, minor=4)], True),
        ([rule("rwm", type="c", major=7, minor=3)], True),
        ([rule("rwm"), rule("rwm", allow=False)], True),
        ([rule("rwm", allow=False), rule("rw", type="b", major=7)], False),
        ([rule("rwm"), rule("w", allow=False, type="b", major=7, minor=3)], True),
    ],
)
def test_the_last_rule_that_fits_says_whether_it_may_be_written(
    rules: list[dict[str, Any]], read_only: bool
) -> None:
    assert asked_for(spec(rules))[0].read_only is read_only


def test_rules_about_the_hosts_numbers_do_not_reach_the_guest() -> None:
    everything, char = rule("rwm", allow=False), rule("rwm", type="c", major=1, minor=3)
    given = {"memory": {"limit": 1}, "devices": [everything, char, rule("rwm", type="b", major=7, minor=3)]}
    assert without_rules(given) == {"memory": {"limit": 1}, "devices": [everything, char]}
    assert without_rules({}) == {}


EVERY = {"allow": True, "access": "rwm"}
NONE = {"allow": False, "access": "rwm"}


@pytest.mark.parametrize(
    ("rules", "all_of_them"),
    [
        ([EVERY], True),
        ([NONE, {"allow": True, "type": "a", "major": -1, "minor": -1, "access": "rwm"}], True),
        ([EVERY, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"}], True),
        ([EVERY, NONE], False),
        ([NONE], False),
        ([{"allow": True, "access": "rw"}], False),
        ([{"allow": True, "type": "c", "access": "rwm"}], False),
        ([{"allow": True, "major": 8, "access": "rwm"}], False),
        ([], False),
    ],
)
def test_whether_every_device_may_be_used(rules: list[dict[str, Any]], all_of_them: bool) -> None:
    assert may_use_all(spec(rules)) is all_of_them
