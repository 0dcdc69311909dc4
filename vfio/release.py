"""From a pod's hands back to the host: reset, compared, scrubbed, given back, free; or quarantined.

Every step is in the ledger, so that whoever is killed is followed by another that goes on from there. It must
not know who had the device, nor who asks.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from config.settings import Settings
from rpc.errors import CasemateError
from vfio.address import PciAddress
from vfio.binding import VFIO, Bus
from vfio.condition import Condition
from vfio.findings import Code
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Binding, Cause, IllegalMove, State
from vfio.reset import RESET_S, ResetFailed, reset
from vfio.scrub import Scrub, ScrubFailed

_log = logging.getLogger("casemate")
_AT_ONCE = 16


class Release:
    """What the worker does to the devices that `Ledger.release` and `Ledger.collect` name to it."""

    def __init__(
        self,
        bus: Bus,
        ledger: Ledger,
        *,
        scrub: Scrub | None = None,
        reset_s: float = RESET_S,
        no_reset_waived: bool = False,
    ) -> None:
        self._bus = bus
        self._ledger = ledger
        self._scrub = scrub
        self._reset_s = reset_s
        self._no_reset_waived = no_reset_waived

    @classmethod
    def by_settings(cls, settings: Settings, bus: Bus, ledger: Ledger) -> "Release":
        """As the operator has it: vfio.scrub, scrub_s, reset_s and waive."""
        return cls(
            bus,
            ledger,
            scrub=Scrub(settings.vfio.scrub, settings.vfio.scrub_s) if settings.vfio.scrub else None,
            reset_s=settings.vfio.reset_s,
            no_reset_waived=Code.NO_RESET.value in settings.vfio.waive,
        )

    def give_back(self, addresses: Iterable[PciAddress]) -> dict[PciAddress, str]:
        """Each is free or quarantined afterwards. Of those that are quarantined, why.

        Different slots side by side, the functions of one after each other.
        """
        slots: dict[str, list[PciAddress]] = {}
        for address in sorted(addresses):
            slots.setdefault(address.slot_name, []).append(address)
        if not slots:
            return {}
        failed: dict[PciAddress, str] = {}
        with ThreadPoolExecutor(min(len(slots), _AT_ONCE), "release") as pool:
            for found in pool.map(self._slot, slots.values()):
                failed.update(found)
        return failed

    def clear(self, address: PciAddress) -> str:
        """A person has seen to a quarantined device: its driver has it back, pods may have it. Why it was.

        Raises IllegalMove if it is not quarantined, and what Bus.restore raises.
        """
        device = self._ledger.device(address)
        if device.state is not State.QUARANTINED:
            raise IllegalMove(f"device {address} is {device.state.value}, not quarantined")
        for binding in self._ledger.bindings():
            if binding.address == address:
                self._bus.restore(binding)
                self._ledger.restored(address)
        return self._ledger.clear(address)

    def _slot(self, functions: Iterable[PciAddress]) -> dict[PciAddress, str]:
        failed = {}
        for address in functions:
            binding = next((b for b in self._ledger.bindings() if b.address == address), None)
            try:
                if binding is None:
                    raise ResetFailed(f"device {address} was used, and how it was before is not written down")
                if not binding.clean:
                    self._make_clean(binding)
                self._bus.restore(binding)
            except CasemateError as error:
                failed[address] = reason = _reason(error)
                _log.error("device %s is quarantined: %s", address, reason)
                self._ledger.quarantine(address, reason)
            else:
                self._ledger.clean(address)
        return failed

    def _make_clean(self, binding: Binding) -> None:
        """Raises ResetFailed, ScrubFailed."""
        address = binding.address
        driver = self._bus.driver(address)
        if binding.boot != self._ledger.now().boot:
            self._ledger.note(Cause.RESET, address, "by the boot of the host since")
        elif driver in (VFIO, ""):
            done = reset(
                self._bus,
                address,
                Condition.from_text(binding.condition),
                self._reset_s,
                none_suffices=self._no_reset_waived,
            )
            self._ledger.note(Cause.RESET, address, done)
            if self._scrub is not None:
                self._scrubbed(address, self._scrub)
        elif binding.used:
            raise ResetFailed(f"device {address} has driver {driver}, and was not reset since a pod had it")
        # Else it never left its driver, or was given back by who was killed then: nobody has had it.
        self._ledger.was_reset(address)

    def _scrubbed(self, address: PciAddress, scrub: Scrub) -> None:
        try:
            said = scrub.run(address)
        except ScrubFailed as error:
            self._ledger.note(Cause.SCRUB, address, f"failed: {_reason(error)}")
            raise
        self._ledger.note(Cause.SCRUB, address, said)


def _reason(error: CasemateError) -> str:
    return f"{error.brief}: {error.details}" if error.details else error.brief
