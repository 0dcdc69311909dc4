"""What is done so that a pod has its devices: chosen, claimed, judged, bound; and afterwards: given back.

And its own CPUs, with or without devices. Imports vfio/, and blocks: called in a thread, for pods that ask
for any of it alone. It must not know what a machine is.
"""

import logging
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from config.annotations import DEVICES
from config.cpulist import numbers
from config.settings import Settings
from rpc.errors import CasemateError, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from shim import shortage
from shim.dedicated import Cpus
from shim.devicewishes import DeviceWishes, Node, Wish, parse
from shim.hugepages import Ram, none_would_do
from shim.record import Identity
from shim.vm.backing import STRICT, Backing, Cell, allowed_cpus, allowed_nodes, cells_of
from shim.vm.passthrough import Function
from shim.vm.pinning import Pinning
from vfio import inventory, isolation
from vfio.address import PciAddress
from vfio.binding import Bus
from vfio.binding import Node as Bound
from vfio.inventory import SYSFS, Inventory
from vfio.isolation import Audit
from vfio.kinds import Kind
from vfio.ledger.demand import Host, Partition, Request, Same, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Claim, NotEnough, Pod, Process
from vfio.offer import configured, nodes, not_gpus, offer
from vfio.release import Release

log = logging.getLogger("casemate")


@dataclass(frozen=True, slots=True)
class Given:
    """claim: its number in the ledger. functions: of the devices that are to be in the machine, if any, and
    backing, which counts then. pinning: of CPUs of its own, if it has such."""

    claim: int
    functions: tuple[Function, ...] = ()
    backing: Backing = field(default_factory=Backing)
    pinning: Pinning | None = None


class Giver:
    """For one pod. me: its shim, as the host counts it. proc: the host's /proc, which who has what open, and
    what is mounted, is looked for in."""

    def __init__(self, settings: Settings, pod: Pod, me: Process, proc: str, bus: Bus | None = None) -> None:
        self._settings = settings
        self._pod = pod
        self._me = me
        self._proc = proc
        self._bus = bus or Bus(SYSFS)

    @classmethod
    def of(cls, identity: Identity, tenant: str, settings: Settings) -> Self:
        """tenant: who is told how long the pod had what; its namespace where there is none."""
        pod = Pod(identity.namespace, identity.pod_id, tenant or identity.namespace)
        me = Process.here(identity.pid, identity.start_time)
        return cls(settings, pod, me, f"/proc/self/fd/{identity.host_proc}")

    def take(self, wishes: DeviceWishes, ram: Ram, own_cpus: int = 0) -> Given:
        """What is to be in the machine, and what its RAM is to be of. Nothing is claimed or bound if it
        raises, as shortage.check_room() where that is ordinary pages. own_cpus: how many CPUs the guest has,
        if each is to have one of the host's for itself.

        Judged are the devices that were claimed, so that nobody else can have them meanwhile: before that
        only which ones are no candidates for a request that names none.
        """
        found = inventory.read(self._bus.root)
        wanted, by_node, wished = _wanted(wishes, found)
        named = {address for request in wanted.requests for address in request.addresses}
        refused = {} if _names_all(wanted) else self._refused(found)
        partitions = configured(self._settings.vfio.partitions)
        host = offer(found, refused=refused.keys() - named, partitions=partitions, sys=self._bus.root)
        allowed = allowed_nodes(self._proc)
        claimable, cpus = _within(host, allowed), None
        if own_cpus:
            cpus = Cpus.of(self._settings, self._proc)
            claimable, wanted = cpus.within(claimable), replace(wanted, cpus=own_cpus)
        with self._ledger() as ledger, ExitStack() as undo:
            try:
                claim, why = self._claim(ledger, wanted, claimable, ram)
            except NotEnough:
                raise
            except (FailedPrecondition, NotFound, ResourceExhausted) as error:
                raise _with_reasons(error, wanted, found, refused, partitions) from error
            undo.callback(self._give_back, ledger, claim.id)
            if not claim.page_bytes:
                # Of one with devices all RAM is there from its first moment on.
                shortage.check_room(ram.size_bytes)
            self._audit(found, claim.addresses).require()
            bound = self._bus.bind(ledger, claim.id, claim.addresses)
            ledger.use(claim.id)
            functions = _functions(found, claim, bound, by_node, wished)
            backing = _backing(claim, why, ram, functions, host, allowed)
            if cpus is not None:
                pinning = cpus.pinning(claim, own_cpus, backing.cells)
                given = Given(claim.id, functions, backing, pinning)
            else:
                shared = set(allowed_cpus(self._proc)).difference(numbers(self._settings.dedicated_cpus))
                given = Given(claim.id, functions, _near(backing, host, shared))
            undo.pop_all()
        return given

    def take_cpus(self, count: int) -> Given:
        """For a machine without devices, which may come from a template. Raises ResourceExhausted, which says
        who has them; nothing is claimed then."""
        cpus = Cpus.of(self._settings, self._proc)
        host = cpus.within(Host(nodes=tuple(nodes(self._bus.root))))
        with self._ledger() as ledger:
            claim = ledger.claim(self._pod, self._me, Wanted(cpus=count), host)
        return Given(claim.id, pinning=cpus.pinning(claim, count))

    def _claim(self, ledger: Ledger, wanted: Wanted, host: Host, ram: Ram) -> tuple[Claim, str]:
        """With huge pages where that is possible, or why not."""
        why: list[str] = []
        lacking: list[NotEnough] = []
        for choice in ram.choices(host.nodes, shortage.huge_pages_limit):
            if isinstance(choice, str):
                why.append(choice)
                continue
            try:
                more = replace(wanted, pages=choice, nearest=not ram.must)
                return ledger.claim(self._pod, self._me, more, host), ""
            except NotEnough as error:
                lacking.append(error)
                why.append(error.brief)
        if not ram.must:
            return ledger.claim(self._pod, self._me, wanted, host), "; ".join(why)
        if not lacking:
            raise none_would_do(why)
        details = "\n".join(error.details for error in lacking if error.details)
        raise NotEnough("; ".join(why), details or None, lacking[-1].hint)

    def give_back(self, claim: int) -> None:
        """No machine has them any more. Each is free or quarantined afterwards."""
        with self._ledger() as ledger:
            self._give_back(ledger, claim)

    def _give_back(self, ledger: Ledger, claim: int) -> None:
        release = Release.by_settings(self._settings, self._bus, ledger)
        release.give_back(ledger.release(claim, self._me))

    def _ledger(self) -> Ledger:
        return Ledger(
            Path(self._settings.ledger_dir), actor=f"the shim of {self._pod}, uid 0 pid {self._me.pid}"
        )

    def _audit(self, found: Inventory, together: Collection[PciAddress] | None) -> Audit:
        return isolation.audit(
            found, together, waive=self._settings.vfio.waive, sys=self._bus.root, proc=self._proc
        )

    def _refused(self, found: Inventory) -> dict[PciAddress, str]:
        """What no pod may have, each for itself; without what the ledger keeps from it, and says why."""
        audit = self._audit(found, None)
        with self._ledger() as ledger:
            taken = {each.address for each in ledger.devices() if each.state.value != "free"}
        return {
            address: ", ".join(dict.fromkeys(each.code.value for each in refusals))
            for address in audit.devices
            if address not in taken and (refusals := audit.refusals(address))
        }


def _wanted(
    wishes: DeviceWishes, found: Inventory
) -> tuple[Wanted, tuple[tuple[Node, Request], ...], tuple[Wish, ...]]:
    """Nodes' requests come first, in their order. What several name (a group, and a device of it) is asked
    for once. Raises InvalidArgument where an annotation names one of these, too."""
    wished: tuple[Wish, ...] = ()
    together: Same | None = None
    if wishes.text:
        wished, together = parse(wishes.text)
    named: set[PciAddress] = set()
    pairs: list[tuple[Node, Request]] = []
    for node in wishes.nodes:
        if addresses := [each for each in _addresses(node, found) if each not in named]:
            named.update(addresses)
            pairs.append((node, Request.at(*addresses)))
    if twice := sorted(named & {each for wish in wished for each in wish.request.addresses}):
        raise InvalidArgument(
            f"device {twice[0]} is asked for by the annotation {DEVICES}, and by a node or the kubelet, too",
            hint="a device that is asked for twice may be meant for two: leave it to one of them",
        )
    requests = (*(request for _, request in pairs), *(wish.request for wish in wished))
    return Wanted(requests, together), tuple(pairs), wished


def _addresses(node: Node, found: Inventory) -> tuple[PciAddress, ...]:
    """Of a group, all of its functions that can be given away."""
    if node.group is None:
        return (found.device(PciAddress.parse(node.address)).address,)
    members = found.groups.get(node.group, ())
    given = tuple(each for each in members if found.functions[each].skipped is None)
    if not given:
        raise NotFound(f"there is no device in the IOMMU group {node.group}")
    return given


def _names_all(wanted: Wanted) -> bool:
    return all(request.addresses for request in wanted.requests)


def _with_reasons(
    error: CasemateError,
    wanted: Wanted,
    found: Inventory,
    refused: dict[PciAddress, str],
    partitions: Iterable[Partition],
) -> CasemateError:
    """Those that would do and are not given away are reasons, too; so is what is wrong with partitions."""
    everything = offer(found).candidates
    lines = [
        f"{each.kind} {each.address} is not given to a pod: {refused[each.address]}"
        for each in everything
        if each.address in refused and any(request.matches(each) for request in wanted.requests)
    ]
    if any(request.partition for request in wanted.requests):
        lines += _of_partitions(tuple(partitions), found)
    details = "\n".join(filter(None, (error.details, *lines)))
    return type(error)(error.brief, details or None, error.hint)


def _of_partitions(partitions: tuple[Partition, ...], found: Inventory) -> Iterable[str]:
    if not partitions:
        return ["the configuration has no NVLink partition (vfio.partitions)"]
    known = ", ".join(f"{each.name} ({len(each.members)})" for each in partitions)
    wrong = not_gpus(partitions, found)
    return [
        f"NVLink partitions, and of how many devices: {known}",
        *(
            f"NVLink partition {name} cannot be given: {address} is {what}"
            for name, members in wrong.items()
            for address, what in members.items()
        ),
    ]


def _functions(
    found: Inventory,
    claim: Claim,
    nodes: Iterable[Bound],
    by_node: tuple[tuple[Node, Request], ...],
    wished: tuple[Wish, ...],
) -> tuple[Function, ...]:
    """What goes into the machine: what was asked for, with the other functions of its cards. The rest of a
    group stays outside, bound to nothing but VFIO.

    The functions of a card are behind one root port, as on the host, each card behind its own.
    """
    bound = {node.address: node for node in nodes}
    wish_of: dict[PciAddress, Wish] = {}
    by_text: set[PciAddress] = set()
    for wish, given in zip(wished, claim.given[len(by_node) :], strict=True):
        by_text.update(given)
        wish_of[given[0]] = wish
        kind = found.functions[given[0]].kind
        if (wish.interface or wish.ips) and kind is not Kind.NIC:
            raise InvalidArgument(f"device {given[0]} is a {kind.value}, and has no interface to be set up")
    cards: dict[PciAddress, list[PciAddress]] = {}
    for address in sorted(each for group in claim.given for each in group):
        card = sorted({address, *(each for each in found.siblings(address) if each in bound)})
        cards.setdefault(card[0], card)
    functions: list[Function] = []
    for port, card in enumerate(cards.values()):
        # The guest looks for others only where there is a function 0.
        as_on_host = card[0].function == 0
        for number, address in enumerate(card):
            device, asked = found.functions[address], wish_of.get(address)
            functions.append(
                Function(
                    address=str(address),
                    title=device.title,
                    kind=device.kind.value,
                    group=bound[address].group,
                    cdev=bound[address].cdev,
                    port=port,
                    function=address.function if as_on_host and len(card) > 1 else number,
                    several=len(card) > 1,
                    bar_bytes=sum(bar.size_bytes for bar in device.bars if bar.is_64_bit and not bar.is_rom),
                    low_bytes=sum(bar.size_bytes for bar in device.bars if bar.is_low),
                    path=asked.path if asked is not None else "",
                    by_text=any(each in by_text for each in card),
                    vendor=device.vendor_id,
                    node=device.numa_node,
                    interface=asked.interface if asked is not None else "",
                    ips=asked.ips if asked is not None else (),
                )
            )
    return tuple(functions)


def _within(host: Host, allowed: Collection[int]) -> Host:
    """Without huge pages that the pod's cgroup (cpuset) keeps from it."""
    return replace(
        host, nodes=tuple(each if each.node in allowed else replace(each, pages={}) for each in host.nodes)
    )


def _backing(
    claim: Claim,
    why: str,
    ram: Ram,
    functions: Iterable[Function],
    host: Host,
    allowed: Collection[int],
) -> Backing:
    """A host of one node, or whose devices name none, has nothing to tell a guest of; but huge pages are
    taken where they were promised."""
    several = len(host.nodes) > 1
    if claim.page_bytes:
        cells = [Cell(node, count * claim.page_bytes, STRICT) for node, count in sorted(claim.pages.items())]
        return Backing(claim.page_bytes, cells=tuple(cells) if several else ())
    known = {node.node for node in host.nodes}
    named = sorted({each.node for each in functions if each.node is not None} & known) if several else []
    return Backing(0, why, cells_of(ram.size_bytes, named, allowed))


def _near(backing: Backing, host: Host, allowed: Collection[int]) -> Backing:
    """Each cell's CPUs run on those of its node, as far as the pod's cgroup lets them."""
    of = {each.node: [cpu for core in each.cores for cpu in core if cpu in allowed] for each in host.nodes}
    cells = (replace(cell, cpus=tuple(sorted(of.get(cell.host, ())))) for cell in backing.cells)
    return replace(backing, cells=tuple(cells))
