"""Resetting a function so that it can be shown to be as it was: the method, the comparison, a deadline.

Between two tenants this is what stands for a device that was switched off and on. It must not know who had
the device, nor what follows from a failure (release.py).
"""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rpc.errors import DeadlineExceeded, FailedPrecondition
from vfio import condition
from vfio.address import PciAddress
from vfio.binding import Bus
from vfio.condition import Condition

# Best first, in the kernel's words (pci_reset_fn_methods, drivers/pci/pci.c). A reset of the bus is the whole
# slot's, as at power-on, and not the function's own idea of one; the kernel has it only where nothing else is
# below the same bridge. Power management (D3hot and back) is last: a device decides what it keeps over it.
BEST = ("device_specific", "bus", "cxl_bus", "flr", "af_flr", "acpi", "pm")
# Not a VF's own, though Linux (7.2) lists them: its slot is that of its physical function and all other VFs.
_OF_ALL = ("bus", "cxl_bus")
# Linux waits up to 60 s for a device that answers "not yet" (PCIE_RESET_READY_POLL_MS).
RESET_S = 70.0
UNNAMED = "unnamed"


class ResetFailed(FailedPrecondition):
    """The device cannot be shown to be clean."""


def methods(bus: Bus, address: PciAddress, before: Condition) -> tuple[str, ...]:
    """Those that it has, best first; one that we do not know comes after all others.

    (UNNAMED,) before Linux 5.15, where the kernel chooses; () if there is none.
    """
    if before.resets is None:
        return (UNNAMED,) if bus.has(address, "reset") else ()
    shared = _OF_ALL if bus.has(address, "physfn") else ()
    known = [name for name in before.resets.split() if name not in shared]
    return tuple(sorted(known, key=lambda name: BEST.index(name) if name in BEST else len(BEST)))


def reset(
    bus: Bus,
    address: PciAddress,
    before: Condition,
    timeout_s: float = RESET_S,
    *,
    none_suffices: bool = False,
) -> str:
    """By the best method that works; what was done, for the audit log: `bus in 1.10 s`.

    Raises ResetFailed with what each method came to, if it is not as before after any of them, or not within
    timeout_s altogether. Then it is to be kept from everybody. none_suffices: a device that the kernel knows
    no way to reset is only compared.
    """
    if not bus.is_there(address):
        raise ResetFailed(f"device {address} is not there any more")
    end = time.monotonic() + timeout_s
    tried: list[str] = []
    known = methods(bus, address, before)
    if not known and none_suffices:
        if found := condition.differences(before, condition.read(bus.root, address)):
            raise ResetFailed(f"device {address} cannot be reset", "; ".join(found))
        return "none: there is no way to, and no-reset is waived"
    try:
        # Awake until it has been looked at: the link of a device that sleeps says nothing.
        with _set(bus, address, "power/control", "on", bus.read(address, "power/control")):
            for method in known:
                began = time.monotonic()
                wrong = _by(bus, address, method, before, end)
                if not wrong:
                    return f"{method} in {time.monotonic() - began:.2f} s"
                tried.append(f"{method}: {wrong}")
    except DeadlineExceeded as error:
        # The kernel is still at it, and nothing else can be tried.
        tried.append(f"not done within {timeout_s:.0f} s ({error.brief})")
    except OSError as error:
        tried.append(f"{error.filename}: {error.strerror}")
    words = "; ".join(tried) or "the kernel knows no way to reset it"
    raise ResetFailed(f"device {address} could not be reset", words)


def _by(bus: Bus, address: PciAddress, method: str, before: Condition, end: float) -> str:
    """What is wrong after it, or "". Raises DeadlineExceeded."""
    left = end - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(f"{method} was not tried any more")
    try:
        if method == UNNAMED:
            bus.write(address, "reset", "1", left)
        else:
            with _set(bus, address, "reset_method", method, before.resets):
                bus.write(address, "reset", "1", left)
    except OSError as error:
        return error.strerror or str(error)
    found = condition.differences(before, condition.read(bus.root, address))
    return f"afterwards {'; '.join(found)}" if found else ""


@contextmanager
def _set(bus: Bus, address: PciAddress, name: str, value: str, own: str | None) -> Iterator[None]:
    """An attribute has a value, and then its own. None: it is not there, so there is nothing to set.

    Not after DeadlineExceeded: what the kernel is at is not done, and would be waited for once more.
    """
    if own is None:
        yield
        return
    bus.write(address, name, value)
    try:
        yield
    except DeadlineExceeded:
        raise
    except BaseException:
        _put_back(bus, address, name, own)
        raise
    _put_back(bus, address, name, own)


def _put_back(bus: Bus, address: PciAddress, name: str, own: str) -> None:
    """Of a list of ways to reset, those that can be done now: the kernel refuses a list with one that cannot.

    Of a card's first function it lists what could be done before it knew of the others (Linux 7.2): "bus".
    """
    if not _takes(bus, address, name, own):
        able = [each for each in own.split() if _takes(bus, address, name, each)]
        bus.write(address, name, " ".join(able))


def _takes(bus: Bus, address: PciAddress, name: str, value: str) -> bool:
    try:
        bus.write(address, name, value)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
