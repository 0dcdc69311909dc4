"""What a function says of itself in its configuration space: header, PCI Express, ACS, ATS.

Decodes the `config` file of sysfs, whose first 64 bytes everybody may read and the rest only root. It must
not know where the bytes come from. Registers: PCI Express Base Specification, chapter 7; names as in the
kernel's include/uapi/linux/pci_regs.h.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

HEADER_BYTES = 64
EXTENDED = 0x100
SIZE = 4096

_STATUS, _HEADER_TYPE, _CAPABILITIES = 0x06, 0x0E, 0x34
_STATUS_HAS_CAPABILITIES = 0x10
_EXPRESS, _ACS, _ATS = 0x10, 0x000D, 0x000F
# A list that a broken device closes to a ring ends here: each capability takes at least 4 or 8 bytes.
_MOST_CAPABILITIES = (EXTENDED - HEADER_BYTES) // 4
_MOST_EXTENDED = (SIZE - EXTENDED) // 8


class PortType(IntEnum):
    """Device/Port Type of the PCI Express capability."""

    ENDPOINT = 0x0
    LEGACY_ENDPOINT = 0x1
    ROOT_PORT = 0x4
    UPSTREAM = 0x5
    DOWNSTREAM = 0x6
    PCI_BRIDGE = 0x7  # to conventional PCI
    PCIE_BRIDGE = 0x8  # from conventional PCI
    INTEGRATED_ENDPOINT = 0x9
    EVENT_COLLECTOR = 0xA


_PORT_TYPES = {int(each): each for each in PortType}


class Acs(IntFlag):
    """Access Control Services: the bits of both its capability and its control register."""

    SOURCE_VALIDATION = 0x01
    TRANSLATION_BLOCKING = 0x02
    REQUEST_REDIRECT = 0x04
    COMPLETION_REDIRECT = 0x08
    UPSTREAM_FORWARDING = 0x10
    EGRESS_CONTROL = 0x20
    DIRECT_TRANSLATED = 0x40


# What the kernel asks of every port between two groups (REQ_ACS_FLAGS, drivers/iommu/iommu.c).
ISOLATING = Acs.SOURCE_VALIDATION | Acs.REQUEST_REDIRECT | Acs.COMPLETION_REDIRECT | Acs.UPSTREAM_FORWARDING


@dataclass(frozen=True, slots=True)
class AcsRegisters:
    """What a port can do, and what of it is switched on."""

    able: Acs
    enabled: Acs

    @property
    def lacking(self) -> Acs:
        """What isolation takes and is off. A bit that a port is not able to switch is wired on (6.12.1.1)."""
        return ISOLATING & self.able & ~self.enabled


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """What was decoded. acs and ats_enabled are None where the device has none of it."""

    answers: bool  # false: only ones are read, the device is gone from the bus or asleep for good
    is_bridge: bool
    multifunction: bool
    whole: bool  # false: only the header could be read, so that nothing is known of the rest
    port_type: PortType | None
    acs: AcsRegisters | None
    ats_enabled: bool | None


def decode(data: bytes) -> ConfigSpace:
    """From 64 bytes on; anything less counts as no answer. Broken or hostile lists end, and raise nothing."""
    # All of them: a VF's ids read as ones (SR-IOV 1.1, 3.4.1.1), the rest of its header does not.
    if len(data) < HEADER_BYTES or not data[:HEADER_BYTES].strip(b"\xff"):
        return ConfigSpace(False, False, False, False, None, None, None)
    header = data[_HEADER_TYPE]
    extended = _extended(data)
    acs, ats = extended.get(_ACS), extended.get(_ATS)
    return ConfigSpace(
        answers=True,
        is_bridge=header & 0x7F == 1,
        multifunction=bool(header & 0x80),
        whole=len(data) >= EXTENDED,
        port_type=_port_type(data),
        acs=AcsRegisters(Acs(_word(data, acs + 4) & 0x7F), Acs(_word(data, acs + 6) & 0x7F)) if acs else None,
        ats_enabled=bool(_word(data, ats + 6) & 0x8000) if ats else None,
    )


def _port_type(data: bytes) -> PortType | None:
    """None of a conventional PCI device, and where only the header could be read."""
    if not _word(data, _STATUS) & _STATUS_HAS_CAPABILITIES:
        return None
    at = data[_CAPABILITIES] & 0xFC
    for _ in range(_MOST_CAPABILITIES):
        if at < HEADER_BYTES or at + 4 > min(len(data), EXTENDED):
            return None
        if data[at] == _EXPRESS:
            return _PORT_TYPES.get(_word(data, at + 2) >> 4 & 0xF)
        at = data[at + 1] & 0xFC
    return None


def _extended(data: bytes) -> dict[int, int]:
    """Id -> offset of the first extended capability of that id."""
    found: dict[int, int] = {}
    at = EXTENDED
    for _ in range(_MOST_EXTENDED):
        if at < EXTENDED or at + 8 > len(data):
            break
        (header,) = struct.unpack_from("<I", data, at)
        if header in (0, 0xFFFFFFFF):
            break
        found.setdefault(header & 0xFFFF, at)
        at = header >> 20 & 0xFFC
    return found


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")
