"""Configuration space, as devices have it and as broken or hostile ones would."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.vfio.trees import DOWNSTREAM, ENDPOINT, Acs, Model, config_space
from vfio.configspace import Acs as Bits
from vfio.configspace import AcsRegisters, PortType, decode

MODEL = Model("10de:2330", 0x030200)


def made(port_type: int = ENDPOINT, **options: object) -> bytes:
    given: dict[str, object] = {
        "is_bridge": False,
        "multifunction": False,
        "acs": None,
        "ats": None,
        **options,
    }
    return config_space(MODEL, port_type, **given)  # type: ignore[arg-type]


def test_capabilities_are_found_wherever_they_are() -> None:
    port = decode(made(DOWNSTREAM, is_bridge=True, acs=Acs(0x5F, 0x1D)))
    assert port.answers
    assert port.is_bridge
    assert port.port_type is PortType.DOWNSTREAM
    assert port.acs == AcsRegisters(Bits(0x5F), Bits(0x1D))
    assert port.acs.lacking == Bits(0)
    assert port.ats_enabled is None
    assert decode(made(ats=0x8000)).ats_enabled is True
    assert decode(made(ats=0x0000)).ats_enabled is False
    assert decode(made(multifunction=True)).multifunction


def test_what_is_able_and_not_enabled_is_lacking() -> None:
    registers = AcsRegisters(Bits(0x1D), Bits(0x11))
    assert registers.lacking == Bits.REQUEST_REDIRECT | Bits.COMPLETION_REDIRECT
    # Bits that it is not able to switch are wired on.
    assert AcsRegisters(Bits(0x01), Bits(0x01)).lacking == Bits(0)


def test_only_ones_or_too_little_is_no_answer() -> None:
    assert not decode(b"\xff" * 4096).answers
    assert not decode(b"").answers
    assert not decode(made()[:63]).answers


def test_a_virtual_function_answers_although_its_ids_read_as_ones() -> None:
    assert decode(b"\xff" * 4 + made()[4:]).answers


def test_without_root_only_the_header_is_known() -> None:
    found = decode(made(DOWNSTREAM, is_bridge=True, acs=Acs())[:64])
    assert (found.answers, found.is_bridge, found.whole) == (True, True, False)
    assert (found.port_type, found.acs, found.ats_enabled) == (None, None, None)


def test_a_conventional_device_has_256_bytes() -> None:
    found = decode(made()[:256])
    assert found.whole
    assert found.port_type is PortType.ENDPOINT
    assert found.acs is None


def test_the_first_of_two_capabilities_counts() -> None:
    """As the kernel's pci_find_ext_capability() has it."""
    data = bytearray(made(DOWNSTREAM, is_bridge=True, acs=Acs()))
    struct.pack_into("<IHH", data, 0x400, 0x000D | 1 << 16, 0, 0)
    (header,) = struct.unpack_from("<I", data, 0x148)
    assert header & 0xFFFF == 0x000D  # the first, to which the other is appended
    struct.pack_into("<I", data, 0x148, header | 0x400 << 20)
    assert decode(bytes(data)).acs == AcsRegisters(Bits(0x1D), Bits(0x1D))


def test_lists_that_are_rings_end() -> None:
    data = bytearray(made())
    data[0x61] = 0x60  # power management names itself as the next
    struct.pack_into("<I", data, 0x100, 0x0001 | 1 << 16 | 0x100 << 20)
    found = decode(bytes(data))
    assert (found.port_type, found.acs) == (None, None)


@given(st.binary(min_size=64, max_size=4096))
def test_no_bytes_raise(data: bytes) -> None:
    decode(data)
