"""The address of a PCI function, as Linux writes it: 0000:3b:00.0.

The one name that inventory, isolation, ledger and shim have in common for a device. It must not know what is
there, or whether anything is.
"""

from dataclasses import dataclass

from config.pci import FORM
from rpc.errors import InvalidArgument

_LAST_SLOT = 0x1F


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """Domain, bus, slot (which PCI calls device) and function. Sorts as lspci lists."""

    domain: int
    bus: int
    slot: int
    function: int

    def __post_init__(self) -> None:
        most = {"domain": 0xFFFFFFFF, "bus": 0xFF, "slot": _LAST_SLOT, "function": 7}
        for name, limit in most.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise InvalidArgument(f"PCI address: {name} {value:#x} is not within 0 and {limit:#x}")

    @classmethod
    def parse(cls, text: str) -> "PciAddress":
        """From `0000:3b:00.0`, or `3b:00.0` for domain 0, in either case. Raises InvalidArgument."""
        found = FORM.fullmatch(text)
        if found is None:
            raise InvalidArgument(
                f"{text!r} is not a PCI address",
                hint="as lspci -D writes it: 0000:3b:00.0",
            )
        domain, bus, slot, function = found["domain"] or "0", found["bus"], found["slot"], found["function"]
        return cls(int(domain, 16), int(bus, 16), int(slot, 16), int(function))

    def __str__(self) -> str:
        """The name of the device's directory in /sys/bus/pci/devices."""
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}.{self.function}"

    @property
    def slot_name(self) -> str:
        """What all functions of one device have in common: 0000:3b:00."""
        return str(self).rpartition(".")[0]
