"""Lists of CPUs: the kernel's, and an operator's, which may be anything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.cpulist import checked, numbers, ranges


def test_they_are_read_and_written_as_the_kernel_does() -> None:
    assert numbers("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert numbers("\n") == []
    assert ranges((11, 0, 2, 1, 10, 8)) == "0-2,8,10-11"
    assert ranges([]) == ""


@given(st.frozensets(st.integers(0, 300)))
def test_what_was_written_is_read(cpus: frozenset[int]) -> None:
    assert numbers(ranges(cpus)) == sorted(cpus)
    assert checked(ranges(cpus)) == ranges(cpus)


def test_an_operators_list_is_put_in_order() -> None:
    assert checked(" 8, 2-4,3-5 ") == "2-5,8"
    assert checked("  ") == ""


@pytest.mark.parametrize(
    "text", ["x", "1-", "-1", "1,", "1--2", "8192", "0-99999999999", "000000001", "²", "1 -x", "0x1", "^2"]
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of CPUs"):
        checked(text)


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="'7-3' ends before it begins"):
        checked("2,7-3")
