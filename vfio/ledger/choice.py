"""Which devices a pod gets of those that are free. Pure: plain records in, the possibilities out, best first.

The best one, by the first of these that makes a difference:
1. It takes the fewest devices away from others without giving them to the pod (companions of an IOMMU group).
2. It is on the fewest NUMA nodes, then below the fewest PCIe switches: what is near each other is fast.
3. It leaves the most to later pods: the largest NVLink partitions whole, then the most devices alike on one
   node, then below one switch. Of two switches with two free GPUs and one, a pod of one GPU gets the one.
4. Its addresses are the lowest, so that the same question always has the same answer.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice

from vfio.address import PciAddress
from vfio.ledger.demand import Candidate, Host, Partition, Request, Same, Wanted

# How many possibilities are compared. Devices that are alike count as one, so a host of eight GPUs has at
# most 70; beyond this number the best of the first ones is taken, which begin with those near each other.
MOST_COMPARED = 4096
# How many are looked at for one request after another: a bound of the time that the ledger is held for.
MOST_LOOKED_AT = 16 * MOST_COMPARED


@dataclass(frozen=True, slots=True)
class Choice:
    """given: the devices for each request, in its order. companions: what goes with them, free as well.

    partitions: the NVLink partitions that were asked for, by name.
    """

    given: tuple[tuple[Candidate, ...], ...]
    companions: frozenset[PciAddress] = frozenset()
    partitions: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[Candidate, ...]:
        return tuple(candidate for devices in self.given for candidate in devices)

    @property
    def distance(self) -> tuple[int, int]:
        """On how many NUMA nodes, below how many PCIe switches."""
        nodes = {candidate.node for candidate in self.devices}
        return len(nodes), len({candidate.switch or candidate.address for candidate in self.devices})

    @property
    def addresses(self) -> frozenset[PciAddress]:
        """Everything that is claimed by it."""
        return frozenset(candidate.address for candidate in self.devices) | self.companions


def ranked(wanted: Wanted, host: Host, taken: AbstractSet[PciAddress]) -> list[Choice]:
    """Every choice that meets what is wanted without what is taken, best first; [] if there is none.

    A device is free if it and all its companions are.
    """
    free = [c for c in host.candidates if c.address not in taken and not c.companions & taken]
    free.sort(key=lambda c: c.address)
    search = _Search(wanted, host, free)
    found = list(islice(search.choices(), MOST_COMPARED))
    found.sort(key=search.cost)
    return found


class _Search:
    def __init__(self, wanted: Wanted, host: Host, free: Sequence[Candidate]) -> None:
        self._wanted = wanted
        self._free = free
        self._addresses = frozenset(candidate.address for candidate in free)
        self._partitions = [p for p in host.partitions if p.members <= self._addresses]
        self._alike = {candidate.address: self._likeness(candidate) for candidate in free}
        # Those with the least choice first: addresses, then partitions, then the largest.
        order = sorted(
            range(len(wanted.requests)),
            key=lambda i: (
                not wanted.requests[i].addresses,
                not wanted.requests[i].partition,
                -wanted.requests[i].count,
            ),
        )
        self._order = order
        self._looked_at = 0

    def choices(self) -> Iterator[Choice]:
        yield from self._extend({}, {}, frozenset())

    def _extend(
        self,
        given: dict[int, tuple[Candidate, ...]],
        partitions: dict[int, str],
        used: frozenset[PciAddress],
    ) -> Iterator[Choice]:
        if len(given) == len(self._order):
            yield self._choice(given, partitions)
            return
        index = self._order[len(given)]
        before = [candidate for devices in given.values() for candidate in devices]
        for devices, partition in self._options(self._wanted.requests[index], used):
            self._looked_at += 1
            if self._looked_at > MOST_LOOKED_AT:
                return
            if self._wanted.same is not None and not share([*before, *devices], self._wanted.same):
                continue
            named = partitions | {index: partition.name} if partition else partitions
            taken = used | {candidate.address for candidate in devices}
            yield from self._extend(given | {index: devices}, named, taken)

    def _choice(self, given: dict[int, tuple[Candidate, ...]], partitions: dict[int, str]) -> Choice:
        devices = tuple(given[index] for index in range(len(self._order)))
        addresses = {candidate.address for group in devices for candidate in group}
        together = frozenset(
            other for group in devices for candidate in group for other in candidate.companions
        )
        names = tuple(partitions[index] for index in sorted(partitions))
        return Choice(devices, together - addresses, names)

    def _options(
        self, request: Request, used: frozenset[PciAddress]
    ) -> Iterator[tuple[tuple[Candidate, ...], Partition | None]]:
        usable = [c for c in self._free if c.address not in used and request.matches(c)]
        if request.partition:
            by_address = {candidate.address: candidate for candidate in usable}
            for partition in self._partitions:
                if len(partition.members) == request.count and partition.members <= by_address.keys():
                    devices = tuple(by_address[address] for address in sorted(partition.members))
                    if request.same is None or share(devices, request.same):
                        yield devices, partition
            return
        places: dict[Hashable, dict[Hashable, list[Candidate]]] = {}
        for candidate in usable:
            classes = places.setdefault(self._place(candidate, request), {})
            classes.setdefault(self._alike[candidate.address], []).append(candidate)
        for classes in places.values():
            for devices in _compositions(list(classes.values()), request.count):
                yield devices, None

    def _place(self, candidate: Candidate, request: Request) -> Hashable:
        """What the devices of a request have in common if they have to."""
        sames = (request.same, self._wanted.same)
        node = candidate.node if Same.NODE in sames else None
        switch = (candidate.switch or candidate.address) if Same.SWITCH in sames else None
        return node, switch

    def _likeness(self, candidate: Candidate) -> Hashable:
        """Two devices with the same one can be exchanged for each other in any choice."""
        unit = (candidate.companions | {candidate.address}) & self._addresses
        member_of = frozenset(p.name for p in self._partitions if candidate.address in p.members)
        others = unit if len(unit) > 1 else None
        model = (candidate.kind, candidate.vendor, candidate.device, candidate.name)
        return model, candidate.node, candidate.switch, member_of, others

    def cost(self, choice: Choice) -> tuple[object, ...]:
        gone = choice.addresses
        nodes: Counter[Hashable] = Counter()
        switches: Counter[Hashable] = Counter()
        for candidate in self._free:
            if candidate.address not in gone:
                nodes[candidate.kind, candidate.vendor, candidate.device, candidate.node] += 1
                if candidate.switch is not None:
                    switches[candidate.kind, candidate.vendor, candidate.device, candidate.switch] += 1
        whole = [len(p.members) for p in self._partitions if not p.members & gone]
        return (
            len(choice.companions & self._addresses),
            *choice.distance,
            _most_left(whole),
            _most_left(nodes.values()),
            _most_left(switches.values()),
            sorted(candidate.address for candidate in choice.devices),
        )


def share(devices: Sequence[Candidate], same: Same) -> bool:
    """One device shares everything with itself; devices below no switch share none with others.

    Devices of no known node count as those of a node, as on a host that has but one.
    """
    if same is Same.NODE:
        return len({candidate.node for candidate in devices}) <= 1
    switches = {candidate.switch for candidate in devices}
    return len(devices) <= 1 or (len(switches) == 1 and None not in switches)


def _most_left(counts: Iterable[int]) -> list[int]:
    """Sorts before what leaves less: 3, 1 before 3 before 2, 2, as the largest set counts first."""
    return [*(-count for count in sorted(counts, reverse=True)), 0]


def _compositions(classes: Sequence[Sequence[Candidate]], count: int) -> Iterator[tuple[Candidate, ...]]:
    """Every way to take count devices, the first ones of each class; most of one class first."""
    if count == 0:
        yield ()
        return
    if sum(map(len, classes)) < count:
        return
    first, *others = classes
    for taken in range(min(len(first), count), -1, -1):
        for rest in _compositions(others, count - taken):
            yield (*first[:taken], *rest)
