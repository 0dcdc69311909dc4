"""Giving functions of devices to vfio-pci, and back to the driver that had them.

Writes sysfs only, below a root that is the caller's, and opens nothing of VFIO's: each open and close of a
device resets it, 100 ms and more. It must not know which functions a pod gets, nor why.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rpc.errors import CasemateError, FailedPrecondition, NotFound
from vfio import condition, sysfs, writing
from vfio.address import PciAddress
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Binding

_log = logging.getLogger("casemate")

VFIO = "vfio-pci"
# A driver that is told to let go may have to end what its hardware does; nvidia's takes a second or two.
BIND_S = 30.0

Write = Callable[[str, str, float], None]


@dataclass(frozen=True, slots=True)
class Node:
    """By what QEMU opens a function: its group of the legacy API, its character device (or None)."""

    address: PciAddress
    group: int
    cdev: str | None

    @property
    def group_path(self) -> str:
        return f"/dev/vfio/{self.group}"

    @property
    def cdev_path(self) -> str | None:
        """Since Linux 6.6, with CONFIG_VFIO_DEVICE_CDEV."""
        return f"/dev/vfio/devices/{self.cdev}" if self.cdev else None


class Bus:
    """The PCI bus of the sysfs at root. write: how a value gets there (tests have a kernel of their own)."""

    def __init__(
        self, root: str = "/sys", *, write: Write = writing.write, timeout_s: float = BIND_S
    ) -> None:
        self.root = root
        self._write = write
        self._timeout_s = timeout_s

    def bind(self, ledger: Ledger, claim: int, functions: Sequence[PciAddress]) -> tuple[Node, ...]:
        """All of them to vfio-pci, or none. What is bound to it already is left as it is.

        How each was is in the ledger before anything is written. Raises NotFound for a function that is not
        there, FailedPrecondition (with the reason, and everything back as it was) if it does not answer, the
        kernel refuses it, or has no vfio-pci; DeadlineExceeded if a driver does not let go.
        """
        if not os.path.isdir(f"{self.root}/bus/pci/drivers/{VFIO}"):
            raise FailedPrecondition(f"the host's kernel has no driver {VFIO}", hint=f"modprobe {VFIO}")
        ledger.bind(claim, [self.snapshot(address, claim) for address in functions])
        before = {binding.address: binding for binding in ledger.bindings(claim)}
        with ExitStack() as undo:
            for address in functions:
                # Also those that are not reached: for them, it is the ledger that is to forget.
                undo.callback(self._undo, ledger, before[address])
            for address in functions:
                self._change(address, VFIO, VFIO)
            nodes = tuple(self.node(address) for address in functions)
            undo.pop_all()
        return nodes

    def restore(self, binding: Binding) -> None:
        """Back to the driver that it had, if the kernel still has that. The ledger is told by the caller.

        A function that is gone, and one that is as it was, count as restored. Raises FailedPrecondition and
        DeadlineExceeded.
        """
        address = binding.address
        if self.is_there(address):
            driver = binding.driver
            if driver and not os.path.isdir(f"{self.root}/bus/pci/drivers/{driver}"):
                driver = ""  # its module was removed meanwhile, and takes the device when it is loaded
            self._change(address, driver, binding.override)

    def hand_over(self, address: PciAddress) -> str:
        """From vfio-pci, or from nobody, to whichever driver of the host's takes it; its name, "" for none.

        Raises FailedPrecondition, also if vfio-pci itself takes it again, and DeadlineExceeded.
        """
        self._change(address, "", "")
        probe = f"{self.root}/bus/pci/drivers_probe"
        try:
            self._write(probe, str(address), self._timeout_s)
        except OSError as error:
            raise FailedPrecondition(
                f"device {address} is taken by no driver", f"{error.filename}: {error.strerror}"
            ) from error
        driver = self.driver(address)
        if driver == VFIO:
            raise FailedPrecondition(
                f"device {address}: {VFIO} takes it again",
                hint=f"{VFIO} was told its id, by its parameter ids or by new_id: remove_id takes it back",
            )
        return driver

    def snapshot(self, address: PciAddress, claim: int) -> Binding:
        """How a function is now. Raises NotFound and FailedPrecondition."""
        if not self.is_there(address):
            raise NotFound(f"device {address} is not there", hint="it was removed, or has fallen off the bus")
        found = condition.read(self.root, address)
        if not found.answers:
            raise FailedPrecondition(f"device {address} does not answer on the bus")
        return Binding(address, claim, self.driver(address), self._override(address), found.to_text())

    def is_there(self, address: PciAddress) -> bool:
        return self.has(address, "vendor")

    def driver(self, address: PciAddress) -> str:
        """Its name, or ""."""
        return sysfs.link(f"{self._at(address)}/driver") or ""

    def node(self, address: PciAddress) -> Node:
        """Of a function that vfio-pci has. Raises FailedPrecondition if it has no IOMMU group."""
        group = sysfs.link(f"{self._at(address)}/iommu_group")
        if group is None or not group.isdecimal():
            raise FailedPrecondition(
                f"device {address} has no IOMMU group",
                hint="switch the IOMMU on in the firmware, and with intel_iommu=on or amd_iommu=on",
            )
        cdevs = sysfs.names(f"{self._at(address)}/vfio-dev")
        return Node(address, int(group), cdevs[0] if cdevs else None)

    def write(self, address: PciAddress, name: str, value: str, timeout_s: float | None = None) -> None:
        """One of its files. Raises OSError and DeadlineExceeded."""
        self._write(f"{self._at(address)}/{name}", value, timeout_s or self._timeout_s)

    def read(self, address: PciAddress, name: str) -> str | None:
        return sysfs.text(f"{self._at(address)}/{name}")

    def has(self, address: PciAddress, name: str) -> bool:
        return os.path.exists(f"{self._at(address)}/{name}")

    def _change(self, address: PciAddress, driver: str, override: str) -> None:
        """From whatever it is bound to. driver: the one that it must have afterwards, or "" for none."""
        now = self.driver(address)
        if now == driver and self._override(address) == override:
            return
        try:
            if self._override(address) != override:
                # A line's end alone is what the kernel takes for nothing (driver_set_override, drivers/base).
                self.write(address, "driver_override", f"{override}\n")
            if now and now != driver:
                self.write(address, "driver/unbind", str(address))
            if driver and now != driver:
                # Not drivers_probe: of two drivers that would take it, it gets the one that is asked for.
                self._write(f"{self.root}/bus/pci/drivers/{driver}/bind", str(address), self._timeout_s)
        except OSError as error:
            raise FailedPrecondition(
                f"device {address} cannot go from {now or 'no driver'} to {driver or 'none'}",
                f"{error.filename}: {error.strerror}",
                "the kernel's log says more: dmesg",
            ) from error
        if (found := self.driver(address)) != driver:
            raise FailedPrecondition(
                f"device {address} has {found or 'no driver'} now, and should have {driver or 'none'}",
                hint="the kernel's log says why: dmesg",
            )

    def _undo(self, ledger: Ledger, binding: Binding) -> None:
        """What cannot be undone stays in the ledger, and so keeps the device from being free before it is."""
        try:
            self.restore(binding)
        except CasemateError as error:
            _log.warning("device %s is not given back: %s", binding.address, error)
        else:
            ledger.restored(binding.address)

    def _override(self, address: PciAddress) -> str:
        text = self.read(address, "driver_override")
        return "" if text in (None, "(null)") else str(text)

    def _at(self, address: PciAddress) -> str:
        return f"{self.root}/bus/pci/devices/{address}"
