"""An operator's hands on free devices: to vfio-pci ahead of any pod, back to their drivers, reset.

Each is a claim in the ledger for as long as it takes, so that no pod gets a device half way, and
`casemate gc` ends what somebody was killed at. It must not know what a command prints.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from config.settings import Settings
from vfio import hostuse, inventory, isolation
from vfio.address import PciAddress
from vfio.binding import VFIO, Bus, Node
from vfio.findings import OF_HOST_USE, Code
from vfio.inventory import Inventory
from vfio.isolation import PROC
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import HOST, Cause, Claim, Pod, Process
from vfio.offer import offer
from vfio.release import Release


@dataclass(frozen=True, slots=True)
class Change:
    """before, after: the names of its drivers, "" for none. node: by what VFIO has it, if it has."""

    address: PciAddress
    before: str
    after: str
    node: Node | None = None


@dataclass(frozen=True, slots=True)
class Reset:
    """done: which way, and how long it took; "" if not done. failed: why it is quarantined, or ""."""

    address: PciAddress
    done: str
    failed: str


class Operator:
    """me: this process, whose end ends what it has claimed. proc: the host's /proc."""

    def __init__(
        self, settings: Settings, ledger: Ledger, me: Process, bus: Bus | None = None, proc: str = PROC
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._me = me
        self._bus = bus or Bus()
        self._proc = proc

    def bind(self, addresses: Sequence[PciAddress]) -> tuple[Change, ...]:
        """All of these, with all that goes with them, to vfio-pci, where they stay; or none.

        A pod that has one later leaves it there. Raises ResourceExhausted with who has what is not free;
        FailedPrecondition with the findings of what no pod may have; what Bus.bind raises.
        """
        found = inventory.read(self._bus.root)
        with self._claimed(found, addresses, "bind") as claim:
            self._require(found, claim, f"bound to {VFIO}", None)
            before = {address: self._bus.driver(address) for address in claim.addresses}
            nodes = self._bus.bind(self._ledger, claim.id, claim.addresses)
            self._ledger.keep(claim.id, dict.fromkeys(claim.addresses, VFIO))
        return tuple(Change(node.address, before[node.address], VFIO, node) for node in nodes)

    def as_it_is(self, address: PciAddress) -> Change:
        """One that vfio-pci has already. Raises FailedPrecondition if it has no IOMMU group."""
        driver = self._bus.driver(address)
        return Change(address, driver, driver, self._bus.node(address))

    def unbind(self, addresses: Sequence[PciAddress]) -> tuple[Change, ...]:
        """All of these, with all that goes with them, to the drivers of the host's that take them.

        Nothing of it is undone if it fails half way, by nobody: once a driver of the host's has a device, the
        host may use it. What it came to is in the audit log. Raises as bind() does, but of the findings only
        for who has it open, and what Bus.hand_over raises.
        """
        found = inventory.read(self._bus.root)
        changes = []
        with self._claimed(found, addresses, "unbind") as claim:
            self._require(found, claim, "unbound", {Code.OPEN_HANDLES})
            for address in claim.addresses:
                before = after = self._bus.driver(address)
                if not before or hostuse.drives_for_guests(before):
                    after = self._bus.hand_over(address)
                    self._ledger.note(Cause.RESTORE, address, f"to {after or 'no driver'}")
                changes.append(Change(address, before, after))
        return tuple(changes)

    def reset(self, address: PciAddress) -> tuple[Reset, ...]:
        """As after a pod: this one, with all that goes with it, is free or quarantined afterwards.

        A driver of the host's that has it loses it meanwhile. Raises as bind() does, but of the findings only
        for those of the host's own use, and for what the kernel cannot reset.
        """
        found = inventory.read(self._bus.root)
        with self._claimed(found, [address], "reset") as claim:
            self._require(found, claim, "reset", OF_HOST_USE | {Code.NO_RESET})
            self._bus.bind(self._ledger, claim.id, claim.addresses)
            failed = self._give_back(claim)
        return tuple(Reset(each, self._done(each, claim), failed.get(each, "")) for each in claim.addresses)

    @contextmanager
    def _claimed(self, found: Inventory, addresses: Sequence[PciAddress], what: str) -> Iterator[Claim]:
        """What is still its own at the end is given back, as a pod's is."""
        named = sorted({found.device(address).address for address in addresses})
        pod = Pod(HOST, f"gpu-{what}-{self._me.pid}")
        wanted = Wanted((Request.at(*named),))
        claim = self._ledger.claim(pod, self._me, wanted, offer(found, sys=self._bus.root))
        try:
            yield claim
        finally:
            self._give_back(claim)

    def _give_back(self, claim: Claim) -> dict[PciAddress, str]:
        release = Release.by_settings(self._settings, self._bus, self._ledger)
        return release.give_back(self._ledger.release(claim.id, self._me))

    def _require(self, found: Inventory, claim: Claim, what: str, codes: Collection[Code] | None) -> None:
        """Judged once they are claimed, so that nobody else begins to use them through us meanwhile."""
        waive = self._settings.vfio.waive
        audit = isolation.audit(found, claim.addresses, waive=waive, sys=self._bus.root, proc=self._proc)
        audit.require(what, codes)

    def _done(self, address: PciAddress, claim: Claim) -> str:
        entries = self._ledger.log(address)
        return next(
            (e.detail for e in reversed(entries) if (e.cause, e.claim) == (Cause.RESET, claim.id)), ""
        )
