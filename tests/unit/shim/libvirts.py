"""What libvirt says of a domain that has devices of the host's, and when: without QEMU.

The XML is as libvirt documents it (formatdomain), without what no code of ours reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

from shim.vm.host import Host

DEVICE_REMOVED = 15
SUSPENDED, STOPPED = 3, 5
HOSTDEV = """\
    <hostdev mode='subsystem' type='pci' managed='no'>
      <driver name='vfio' iommufd='yes'/>
      <source>
        <address domain='0x{domain:04x}' bus='0x{bus:02x}' slot='0x{slot:02x}' function='0x{function:x}'/>
      </source>
      <alias name='{alias}'/>
      <rom bar='off'/>
      <address type='pci' domain='0x0000' bus='0x0a' slot='0x00' function='0x0'/>
    </hostdev>
"""


class LibvirtError(Exception):
    pass


class Domain:
    """And the connection that it is on. at_xml: what happens while libvirt is asked for its XML. fails: why
    it tells of no events."""

    fails: str | None = None

    def __init__(self, addresses: Iterable[str]) -> None:
        self.devices = {f"hostdev{number}": address for number, address in enumerate(addresses)}
        self.callbacks: list[tuple[int, Callable[..., None]]] = []
        self.at_xml: Callable[[], None] = lambda: None
        self.halt: Callable[[], None]

    def host(self, host: Host) -> Domain:
        """Is what this one has on its connection."""
        module = ModuleType("libvirt")
        module.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED = DEVICE_REMOVED  # type: ignore[attr-defined]
        module.VIR_DOMAIN_EVENT_SUSPENDED = SUSPENDED  # type: ignore[attr-defined]
        module.VIR_DOMAIN_EVENT_STOPPED = STOPPED  # type: ignore[attr-defined]
        module.libvirtError = LibvirtError  # type: ignore[attr-defined]
        given: Any = self
        host._libvirt, host._connection, host._domain = module, given, given
        self.halt = partial(host._on_lifecycle, given, given, SUSPENDED, 0, None)
        return self

    def name(self) -> str:
        return "vm"

    def domainEventRegisterAny(  # noqa: N802 - libvirt's name
        self, domain: Domain, event: int, callback: Callable[..., None], _: None
    ) -> int:
        if self.fails is not None:
            raise LibvirtError(self.fails)
        assert domain is self
        self.callbacks.append((event, callback))
        return len(self.callbacks)

    def XMLDesc(self, _: int) -> str:  # noqa: N802 - the same
        passed = "".join(HOSTDEV.format(alias=alias, **_numbers(at)) for alias, at in self.devices.items())
        self.at_xml()
        other = "    <interface type='user'><alias name='net0'/></interface>\n"
        return f"<domain type='kvm'>\n  <devices>\n{other}{passed}  </devices>\n</domain>\n"

    def remove(self, address: str) -> None:
        (alias,) = (alias for alias, at in self.devices.items() if at == address)
        del self.devices[alias]
        self.tell(alias)

    def tell(self, alias: str) -> None:
        for event, callback in self.callbacks:
            if event == DEVICE_REMOVED:
                callback(None, None, alias, None)


def _numbers(address: str) -> dict[str, int]:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    numbers = {"domain": domain, "bus": bus, "slot": slot, "function": function}
    return {name: int(value, 16) for name, value in numbers.items()}
