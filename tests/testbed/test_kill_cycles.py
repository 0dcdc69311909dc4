"""Pods with devices whose QEMU, shim or both are killed at any moment: the ledger and sysfs agree after each.

CASEMATE_TEST_KILLS: how many cycles, 9 unless it says otherwise; each takes some 30 s.
"""

import os
from typing import Any

import pytest

from tests.testbed.conftest import Look

CYCLES = int(os.environ.get("CASEMATE_TEST_KILLS", "9"))


@pytest.fixture(scope="module")
def cycles(look_inside: Look) -> Any:
    return look_inside("kill_cycles", "gpu-host", "--cycles", str(CYCLES))["cycles"]


def test_the_ledger_and_sysfs_agree_and_nothing_is_left(cycles: Any) -> None:
    assert len(cycles) == CYCLES
    assert [each for each in cycles if each["wrong"]] == []


def test_no_device_is_quarantined(cycles: Any) -> None:
    """All of them come back from their reset as they were: there is no cause."""
    assert [each for each in cycles if each["quarantined"]] == []


def test_something_was_killed_of_a_pod_that_had_devices(cycles: Any) -> None:
    struck = [each for each in cycles if each["killed"] and set(each["states"]) - {"free"}]
    assert struck, [(each["of"], each["after_s"], each["states"]) for each in cycles]
