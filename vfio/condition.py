"""What a function was like before a pod had it, and what is not as it was after its reset.

Of its configuration space the part that says what it is and where its memory lies, which the kernel restores
after a reset; of its link, that it has come back no narrower and no slower. (A driver may slow an idle link
down, so a faster one is no difference.) It must not know how a reset is done.
"""

import json
from dataclasses import dataclass

from rpc.errors import DataLoss
from vfio import sysfs
from vfio.address import PciAddress

_HEADER_BYTES = 64
# Offset, length, name: type 0 header, PCI Local Bus Specification 3.0, 6.1. What is left out (command,
# status, cache line, latency, BIST, interrupt line) is the driver's of the moment.
_FIELDS = (
    (0x00, 4, "vendor and device id"),
    (0x08, 4, "revision and class"),
    (0x0E, 1, "header type"),
    *((0x10 + 4 * index, 4, f"BAR {index}") for index in range(6)),
    (0x2C, 4, "subsystem ids"),
    (0x30, 4, "ROM BAR"),
)


@dataclass(frozen=True, slots=True)
class Condition:
    """header: the first 64 bytes. lanes and speed (GT/s) are 0 where there is no link to be known of.

    resets: the kernel's list of ways to reset it, in its order, or None before Linux 5.15. A reset
    changes that for a moment, and who is killed then leaves it changed.
    """

    header: bytes
    lanes: int
    speed: float
    resets: str | None = None

    @property
    def answers(self) -> bool:
        """Not so: what is read are only ones, as the device is not on the bus, or nothing at all."""
        # All of it: the ids alone are ones in every VF (SR-IOV 1.1, 3.4.1.1).
        return len(self.header) == _HEADER_BYTES and self.header.strip(b"\xff") != b""

    def to_text(self) -> str:
        fields = {
            "header": self.header.hex(),
            "lanes": self.lanes,
            "speed": self.speed,
            "resets": self.resets,
        }
        return json.dumps(fields)

    @classmethod
    def from_text(cls, text: str) -> "Condition":
        """Raises DataLoss."""
        try:
            fields = json.loads(text)
            resets = fields["resets"]
            return cls(
                bytes.fromhex(fields["header"]),
                int(fields["lanes"]),
                float(fields["speed"]),
                None if resets is None else str(resets),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataLoss(f"{text[:80]!r} is not the condition of a device", str(error)) from error


def read(root: str, address: PciAddress) -> Condition:
    """Of a function of the sysfs at root. One that is gone does not answer."""
    at = f"{root}/bus/pci/devices/{address}"
    header = sysfs.data(f"{at}/config", _HEADER_BYTES) or b""
    words = (sysfs.text(f"{at}/current_link_speed") or "").split()
    try:
        speed = float(words[0]) if words else 0.0
    except ValueError:
        speed = 0.0  # "Unknown"
    # A device that sleeps (D3cold, as one may that vfio-pci has and nobody uses) may be read as ones: of
    # unknown speed, with 63 lanes.
    lanes = (sysfs.number(f"{at}/current_link_width") or 0) if speed else 0
    return Condition(header, lanes, speed, sysfs.text(f"{at}/reset_method"))


def differences(before: Condition, now: Condition) -> list[str]:
    """In words, with both values. [] is what is wanted."""
    if not now.answers:
        return ["it does not answer on the bus"]
    found = [
        f"{name} {_hex(now.header, at, length)}, was {_hex(before.header, at, length)}"
        for at, length, name in _FIELDS
        if now.header[at : at + length] != before.header[at : at + length]
    ]
    if now.lanes < before.lanes:
        found.append(f"link of {now.lanes} lanes, was {before.lanes}")
    if now.speed < before.speed:
        found.append(f"link of {now.speed:g} GT/s, was {before.speed:g}")
    return found


def _hex(data: bytes, at: int, length: int) -> str:
    return f"{int.from_bytes(data[at : at + length], 'little'):#0{2 + 2 * length}x}"
