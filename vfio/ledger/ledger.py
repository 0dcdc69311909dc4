"""The ledger: which pod has which device, CPU and huge page of this host, and has had.

Everything is written down before it is done, in one transaction each, so that whoever is killed leaves a
state that says what is to be done: collect() finds it. It must not know how a device is bound or reset, nor
what a shim is: whether a process lives is the caller's to say.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

from config.cpulist import ranges
from rpc.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from vfio.address import PciAddress
from vfio.ledger import rows
from vfio.ledger.allotment import Allotment, Shortage, Spoken, allot
from vfio.ledger.choice import Choice, ranked
from vfio.ledger.database import Database
from vfio.ledger.demand import Candidate, Host, Request, Wanted
from vfio.ledger.records import (
    Binding,
    Cause,
    Claim,
    Device,
    Entry,
    IllegalMove,
    Instant,
    NotEnough,
    Orphans,
    Pod,
    Process,
    State,
    Use,
    check_move,
    instant,
    this_process,
)


class Ledger:
    """Of the directory that config names as ledger_dir. database.py says what opening it raises.

    Every method may take as long as a disk does: a coroutine calls it in a thread. actor: who does all this,
    for the audit log. A process that is forked opens its own.
    """

    def __init__(
        self, directory: Path, *, actor: str | None = None, clock: Callable[[], Instant] = instant
    ) -> None:
        self._database = Database(directory)
        self._actor = actor or this_process()
        self._clock = clock

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- claiming and giving back ---

    def claim(self, pod: Pod, owner: Process, wanted: Wanted, host: Host) -> Claim:
        """All that is wanted, or an error and nothing. owner: who lives as long as the claim is good.

        Raises ResourceExhausted if it is there and not free, and says who has it, NotEnough where that is
        not devices; FailedPrecondition or NotFound if this host can never give it; FailedPrecondition also
        if the pod has a claim already.
        """
        if not wanted.requests and not wanted.cpus and wanted.pages is None:
            raise InvalidArgument(f"pod {pod} claims nothing")
        with self._writing() as (connection, now):
            if (held := rows.claim_of(connection, pod)) is not None:
                raise FailedPrecondition(
                    f"pod {pod} has claim {held} already",
                    hint="if that was a pod that is gone: `casemate gc`",
                )
            devices = {device.address: device for device in rows.devices(connection)}
            taken = {address for address, device in devices.items() if device.state is not State.FREE}
            try:
                choice, allotment = _chosen(wanted, host, taken, devices, rows.spoken(connection))
            except NotEnough as error:
                details = "\n".join(_holders(wanted, rows.claims(connection)))
                raise NotEnough(error.brief, details or None, error.hint) from error
            size = wanted.pages.size_bytes if wanted.pages else 0
            made = rows.insert_claim(connection, now, pod, owner, choice, allotment, size)
            for address in sorted(choice.addresses):
                rows.set_state(connection, now, address, State.CLAIMED, claim=made)
            rows.note(connection, Cause.CLAIM, claim=made, detail=str(wanted))
            return rows.claim(connection, made)

    def use(self, claim: int) -> None:
        """To be called before a machine gets its first device. Raises IllegalMove, NotFound."""
        with self._writing() as (connection, now):
            rows.claim(connection, claim)
            for address in rows.addresses_of(connection, claim):
                self._move(connection, now, address, State.IN_USE)
            rows.mark_used(connection, claim)

    def release(self, claim: int, worker: Process) -> tuple[PciAddress, ...]:
        """To be called when no machine has them any more. What is to be reset now, by the worker.

        Its CPUs and pages are free at once, and so are devices that were never bound nor used. Of a claim
        that was released before: what the worker has not reported yet. Raises NotFound.
        """
        with self._writing() as (connection, now):
            found = rows.claim(connection, claim)
            if found.ended_s is None:
                self._release(connection, now, claim, worker, Cause.RELEASE)
            return rows.resetting(connection, claim, worker)

    def keep(self, claim: int, drivers: Mapping[PciAddress, str]) -> None:
        """Its functions stay with the drivers that they have now, and are free: nothing is to be restored.

        For a claim that bound them ahead of any machine. drivers: for the audit log. Raises NotFound,
        FailedPrecondition if it was released, IllegalMove if one of them was used.
        """
        with self._writing() as (connection, now):
            if rows.claim(connection, claim).ended_s is not None:
                raise FailedPrecondition(f"claim {claim} was released: it keeps nothing")
            for address in rows.addresses_of(connection, claim):
                device = rows.device(connection, address)
                if device.state is not State.CLAIMED:
                    raise IllegalMove(f"device {address} is {device.state.value}, and to be reset first")
                rows.delete_binding(connection, address)
                detail = f"with {drivers[address] or 'no driver'}"
                rows.note(connection, Cause.KEEP, address=address, claim=claim, detail=detail)
                self._move(connection, now, address, State.FREE)
            rows.end_claim(connection, now, claim)
            rows.note(connection, Cause.RELEASE, claim=claim)

    def clean(self, address: PciAddress) -> None:
        """It was reset and given back to the driver that it had: it is free. Raises IllegalMove.

        FailedPrecondition if a binding is written down, and not that it was reset since a pod used it.
        """
        with self._writing() as (connection, now):
            device = rows.device(connection, address)
            if device.state is not State.RESETTING:
                raise IllegalMove(f"device {address} is {device.state.value}, so nobody was resetting it")
            binding = rows.binding(connection, address)
            if binding is not None:
                if not binding.clean:
                    raise FailedPrecondition(f"device {address} is not known to have been reset")
                # With its state in one transaction: between the two nobody could tell what is left to do.
                self._restored(connection, binding)
            self._move(connection, now, address, State.FREE)

    def quarantine(self, address: PciAddress, reason: str) -> None:
        """Nobody gets it until a person clears it. From free or resetting. Raises IllegalMove."""
        if not reason.strip():
            raise InvalidArgument(f"device {address}: a quarantine needs a reason")
        with self._writing() as (connection, now):
            self._move(connection, now, address, State.QUARANTINED, reason=reason.strip())

    def clear(self, address: PciAddress) -> str:
        """What a person does who has seen to it. The reason it had. Raises IllegalMove if it has none.

        FailedPrecondition as long as a binding of it is written down.
        """
        with self._writing() as (connection, now):
            device = rows.device(connection, address)
            if device.state is not State.QUARANTINED:
                raise IllegalMove(f"device {address} is {device.state.value}, not quarantined")
            if binding := rows.binding(connection, address):
                raise FailedPrecondition(
                    f"device {address} is to be given back to {binding.driver or 'nobody'}"
                )
            self._move(connection, now, address, State.FREE)
            return device.reason

    def orphans(self, is_alive: Callable[[Process], bool]) -> Orphans:
        """What collect() would find; nothing is done. devices: also those that would be free at once."""
        dead = self._dead(is_alive)
        with self._database.reading() as connection:
            claims = tuple(claim for claim in rows.claims(connection) if claim.owner in dead)
            devices = [address for claim in claims for address in claim.addresses]
            devices += [address for address, worker in rows.resets(connection) if worker in dead]
        return Orphans(claims, tuple(sorted(devices)), _cpus_of(claims))

    def collect(self, is_alive: Callable[[Process], bool], worker: Process) -> Orphans:
        """Releases the claims whose owner has ended, and takes over the resets of workers that have.

        is_alive is asked about processes of this boot only. Of two callers at once, one gets each device.
        """
        dead = self._dead(is_alive)
        if not dead:
            self.still_held()
            return Orphans((), ())
        with self._writing() as (connection, now):
            held = [claim for claim in rows.claims(connection) if claim.owner in dead]
            ended = []
            for found in held:
                self._release(connection, now, found.id, worker, Cause.ORPHAN)
                ended.append(rows.claim(connection, found.id))
            devices = [address for claim in ended for address in rows.resetting(connection, claim.id, worker)]
            for address, working in rows.resets(connection):
                if working in dead:
                    rows.set_worker(connection, address, worker)
                    rows.note(connection, Cause.TAKEOVER, address=address, detail=f"from pid {working.pid}")
                    devices.append(address)
            return Orphans(tuple(ended), tuple(sorted(devices)), _cpus_of(held))

    def still_held(self) -> bool:
        """Whether any claim holds. Writes down that it does: should the host end without another word, the
        uses of now have lasted until then at least.

        Whatever is written to the ledger says so of all claims; this is for when nothing else is.
        """
        with self._database.reading() as connection:
            if not rows.any_holds(connection):
                return False
        with self._writing():
            return True

    def _dead(self, is_alive: Callable[[Process], bool]) -> set[Process]:
        """A process that has ended is never alive again, so they may be asked without holding others up."""
        boot = self._clock().boot
        with self._database.reading() as connection:
            asked = {*rows.owners(connection), *rows.workers(connection)}
        return {process for process in asked if process.boot != boot or not is_alive(process)}

    # --- what is done to devices ---

    def bind(self, claim: int, functions: Sequence[Binding]) -> None:
        """Writes down how functions were before they are bound. One that is written down already stays so.

        Raises NotFound, FailedPrecondition if the claim has been released or a function is another claim's.
        """
        with self._writing() as (connection, now):
            if rows.claim(connection, claim).ended_s is not None:
                raise FailedPrecondition(f"claim {claim} was released: nothing is bound for it")
            for binding in functions:
                known = rows.binding(connection, binding.address)
                if known is not None and known.claim != claim:
                    raise FailedPrecondition(f"{binding.address} is bound for claim {known.claim}")
                if known is None:
                    rows.insert_binding(connection, now, claim, binding)
                    was = binding.driver or "no driver"
                    rows.note(
                        connection, Cause.BIND, address=binding.address, claim=claim, detail=f"from {was}"
                    )

    def was_reset(self, address: PciAddress) -> None:
        """A function is as it was before a pod had it: whoever goes on from here need not reset it again."""
        with self._writing() as (connection, _):
            rows.mark_clean(connection, address)

    def restored(self, address: PciAddress) -> None:
        """A function is as it was. Nothing, if nothing is written down about it."""
        with self._writing() as (connection, _):
            known = rows.binding(connection, address)
            if known is not None:
                self._restored(connection, known)

    def note(self, cause: Cause, address: PciAddress, detail: str) -> None:
        """A line of the audit log about what was done to a device (Cause.RESET, Cause.SCRUB)."""
        with self._writing() as (connection, _):
            claim = rows.device(connection, address).claim
            rows.note(connection, cause, address=address, claim=claim, detail=detail)

    # --- reading ---

    def devices(self) -> list[Device]:
        """Every device that was ever claimed or quarantined, by address. All others are free."""
        with self._database.reading() as connection:
            return rows.devices(connection)

    def device(self, address: PciAddress) -> Device:
        with self._database.reading() as connection:
            return rows.device(connection, address)

    def claims(self) -> list[Claim]:
        """Those that hold, oldest first."""
        with self._database.reading() as connection:
            return rows.claims(connection)

    def get(self, claim: int) -> Claim:
        """Also one that was released. Raises NotFound."""
        with self._database.reading() as connection:
            return rows.claim(connection, claim)

    def bindings(self, claim: int | None = None) -> list[Binding]:
        """What is to be restored, of one claim or of all."""
        with self._database.reading() as connection:
            return [b for b in rows.bindings(connection) if claim in (None, b.claim)]

    def usage(self, since_s: float = 0.0) -> list[Use]:
        """Who had which device for how long, oldest first; without what ended before since_s (since 1970)."""
        with self._database.reading() as connection:
            return rows.uses(connection, self._clock(), since_s)

    def log(self, address: PciAddress | None = None, *, after: int = 0, most: int = 1000) -> list[Entry]:
        """The newest lines of the audit log, oldest of them first. after: none up to this number."""
        with self._database.reading() as connection:
            return rows.entries(connection, address, after, most)

    def now(self) -> Instant:
        """By the clock that all this is written with."""
        return self._clock()

    # --- within a transaction ---

    @contextmanager
    def _writing(self) -> Iterator[tuple[sqlite3.Connection, Instant]]:
        now = self._clock()
        with self._database.writing(now, self._actor) as connection:
            yield connection, now

    def _move(
        self, connection: sqlite3.Connection, now: Instant, address: PciAddress, to: State, reason: str = ""
    ) -> None:
        device = rows.device(connection, address)
        check_move(address, device.state, to)
        claim = device.claim if to is not State.FREE else None
        rows.set_state(connection, now, address, to, claim=claim, reason=reason)

    def _restored(self, connection: sqlite3.Connection, binding: Binding) -> None:
        rows.delete_binding(connection, binding.address)
        detail = f"to {binding.driver or 'no driver'}"
        rows.note(connection, Cause.RESTORE, address=binding.address, claim=binding.claim, detail=detail)

    def _release(
        self, connection: sqlite3.Connection, now: Instant, claim: int, worker: Process, cause: Cause
    ) -> None:
        for address in rows.addresses_of(connection, claim):
            state = rows.device(connection, address).state
            if state is State.CLAIMED and rows.binding(connection, address) is None:
                rows.set_state(connection, now, address, State.FREE)
            else:
                check_move(address, state, State.RESETTING)
                rows.set_state(connection, now, address, State.RESETTING, claim=claim, worker=worker)
        rows.end_claim(connection, now, claim)
        rows.note(connection, cause, claim=claim)


def _cpus_of(claims: Iterable[Claim]) -> dict[Pod, tuple[int, ...]]:
    return {claim.pod: claim.own_cpus for claim in claims if claim.cpus}


def _chosen(
    wanted: Wanted,
    host: Host,
    taken: set[PciAddress],
    devices: dict[PciAddress, Device],
    spoken: Spoken,
) -> tuple[Choice, Allotment]:
    """The best choice whose nodes have the CPUs and pages, too."""
    shortage: Shortage | None = None
    choices = ranked(wanted, host, taken)
    nearest: tuple[int, int] | None = None  # of those that would do without pages
    for choice in choices:
        if nearest is not None and choice.distance > nearest:
            continue
        found = _allotted(wanted, host, choice, spoken)
        if isinstance(found, Allotment):
            return choice, found
        shortage = shortage or found
        if wanted.nearest and nearest is None:
            least = _allotted(replace(wanted, pages=None), host, choice, spoken)
            if isinstance(least, Allotment):
                nearest, shortage = choice.distance, found
    if shortage is not None:
        raise NotEnough(f"not free: {shortage.words}", hint=_advice(wanted))
    _check_possible(wanted, host)
    raise _refusal(wanted, host, taken, devices)


def _allotted(wanted: Wanted, host: Host, choice: Choice, spoken: Spoken) -> Allotment | Shortage:
    return allot(wanted, host, [candidate.node for candidate in choice.devices], spoken)


def _advice(wanted: Wanted) -> str:
    more = ["give the host more huge pages"] if wanted.pages is not None else []
    more += ["let pods have more CPUs (dedicated_cpus, the pod's cpuset)"] if wanted.cpus else []
    return ", or ".join(["wait for a pod to end (`casemate gc`: of those that are gone)", *more])


def _holders(wanted: Wanted, claims: Sequence[Claim]) -> Iterator[str]:
    for claim in claims:
        if wanted.cpus:
            for node, cpus in sorted(claim.cpus.items()):
                yield f"CPUs {ranges(cpus)} of NUMA node {node} are claimed, pod {claim.pod}"
        if wanted.pages is not None and claim.page_bytes == wanted.pages.size_bytes:
            for node, count in sorted(claim.pages.items()):
                yield f"{count} huge pages of NUMA node {node} are claimed, pod {claim.pod}"


def _check_possible(wanted: Wanted, host: Host) -> None:
    """Raises NotFound or FailedPrecondition for what could not be had if everything were free."""
    known = {candidate.address for candidate in host.candidates}
    for request in wanted.requests:
        for address in request.addresses:
            if address not in known:
                raise NotFound(
                    f"device {address} is not there, or may not be given away",
                    hint="`casemate gpu list` shows what may, and why the others may not",
                )
    if not ranked(wanted, host, frozenset()):
        found = ", ".join(
            f"{sum(map(request.matches, host.candidates))} for {request}" for request in wanted.requests
        )
        raise FailedPrecondition(
            f"this host cannot give {wanted}",
            f"even if all were free; it has {found}",
            "`casemate gpu list` has nodes, `casemate gpu show ADDRESS` the switches above",
        )


def _refusal(
    wanted: Wanted, host: Host, taken: set[PciAddress], devices: dict[PciAddress, Device]
) -> ResourceExhausted:
    """Who has what of that which would do."""
    lines = []
    for candidate in _of_interest(wanted.requests, host.candidates):
        for address in sorted({candidate.address, *candidate.companions}):
            if address in taken:
                lines.append(_holder(candidate, devices[address]))
    return ResourceExhausted(
        f"not free: {wanted}", "\n".join(lines) or None, "wait for a pod to end, or clear what is quarantined"
    )


def _of_interest(requests: Iterable[Request], candidates: Iterable[Candidate]) -> list[Candidate]:
    wanted = list(requests)
    return sorted(
        (candidate for candidate in candidates if any(request.matches(candidate) for request in wanted)),
        key=lambda candidate: candidate.address,
    )


def _holder(candidate: Candidate, device: Device) -> str:
    about = f"{candidate.kind} {candidate.address}"
    if device.address != candidate.address:
        about += f", which goes with {device.address}, that"
    about += f" is {device.state.value}"
    if device.pod is not None:
        about += f", pod {device.pod}"
    return f"{about}: {device.reason}" if device.reason else about
