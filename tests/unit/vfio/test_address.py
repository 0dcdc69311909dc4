"""PCI addresses: what is taken for one, and how they are written and sorted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.errors import InvalidArgument
from vfio.address import PciAddress

ADDRESSES = st.builds(
    PciAddress,
    domain=st.integers(0, 0xFFFFFFFF),
    bus=st.integers(0, 0xFF),
    slot=st.integers(0, 0x1F),
    function=st.integers(0, 7),
)


@given(ADDRESSES)
def test_what_is_written_is_read_again(address: PciAddress) -> None:
    assert PciAddress.parse(str(address)) == address
    assert PciAddress.parse(str(address).upper()) == address


def test_it_is_the_name_of_sysfs() -> None:
    assert str(PciAddress(0, 0x3B, 0, 1)) == "0000:3b:00.1"
    # PCI_DEVICE's "%04x:%02x:%02x.%d" (include/linux/pci.h): a VMD's domain has five digits.
    assert str(PciAddress(0x10000, 0xE1, 0, 0)) == "10000:e1:00.0"
    assert PciAddress(0, 0x3B, 0x1F, 1).slot_name == "0000:3b:1f"


def test_without_a_domain_it_is_0() -> None:
    assert PciAddress.parse("3B:00.0") == PciAddress(0, 0x3B, 0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0000:3b:00",
        "0000:3b:00.8",
        "0000:3b:20.0",
        "000:3b:00.0",
        "000000000:3b:00.0",
        "0000:3b:00.0\n",
        " 0000:3b:00.0",
        "../0000:3b:00.0",
        "0000:3b:00.0/driver",
        "٣b:00.0",
    ],
)
def test_what_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        PciAddress.parse(text)
    assert repr(text) in refused.value.brief


@pytest.mark.parametrize("numbers", [(-1, 0, 0, 0), (0, 0x100, 0, 0), (0, 0, 0x20, 0), (0, 0, 0, 8)])
def test_numbers_that_no_device_has_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidArgument):
        PciAddress(*numbers)


def test_they_sort_by_number_not_by_letter() -> None:
    names = ["10000:00:00.0", "0000:ff:00.0", "0000:3b:00.1", "0000:3b:00.0", "0001:00:00.0"]
    assert [str(each) for each in sorted(map(PciAddress.parse, names))] == [
        "0000:3b:00.0",
        "0000:3b:00.1",
        "0000:ff:00.0",
        "0001:00:00.0",
        "10000:00:00.0",
    ]
