"""Processes that claim, use, reset and free devices, as shims and `casemate gc` do; and what holds then.

What a claimer holds it also locks in a directory of the test's, so that two who have the same are seen
without asking the ledger.
"""

import fcntl
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rpc.errors import ResourceExhausted
from shim.procfs import start_time
from tests.unit.vfio.hosts import TWO_MIB
from vfio.address import PciAddress
from vfio.ledger.demand import Host, HugePages, Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import MOVES, Binding, Claim, Pod, Process, State


def myself() -> Process:
    return Process.here(os.getpid(), start_time(os.getpid()))


def is_alive(process: Process) -> bool:
    """As shim/procfs.py's open_process, for children that their parent has not reaped yet, too."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(fields[19]) == process.started and fields[0] not in "ZX"


@contextmanager
def alone(directory: Path, claim: Claim) -> Iterator[None]:
    """Raises BlockingIOError if another process has one of these devices or CPUs."""
    names = [*map(str, claim.addresses), *(f"cpu{cpu}" for cpus in claim.cpus.values() for cpu in cpus)]
    opened = []
    try:
        for name in names:
            opened.append(os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
            fcntl.flock(opened[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        for fd in opened:
            os.close(fd)


def reset(ledger: Ledger, addresses: tuple[PciAddress, ...]) -> None:
    """What is written down of a reset and of giving back to the host's driver."""
    for address in addresses:
        ledger.was_reset(address)
        ledger.clean(address)


def whole_way(ledger: Ledger, pod: Pod, wanted: Wanted, host: Host, locks: Path) -> bool:
    """From free to free. False if it was not to be had."""
    me = myself()
    try:
        claim = ledger.claim(pod, me, wanted, host)
    except ResourceExhausted:
        return False
    with alone(locks, claim):
        ledger.bind(claim.id, [Binding(address, claim.id, "nvidia", "") for address in claim.addresses])
        ledger.use(claim.id)
    reset(ledger, ledger.release(claim.id, me))
    return True


def any_wish(random_: random.Random) -> Wanted:
    pages = HugePages(random_.randrange(1, 200), TWO_MIB) if random_.random() < 0.5 else None
    if random_.random() < 0.25:
        return Wanted(cpus=random_.randrange(1, 6))
    requests = (Request(random_.randrange(1, 4), kind="gpu"),)
    return Wanted(requests, cpus=random_.randrange(0, 5), pages=pages)


def check(ledger: Ledger) -> None:
    """That all that is written down agrees: states, claims, uses and the audit log."""
    holding = {address: claim.id for claim in ledger.claims() for address in claim.addresses}
    for device in ledger.devices():
        held = device.state in (State.CLAIMED, State.IN_USE)
        assert (device.address in holding) == held, device
        assert not held or device.claim == holding[device.address]
        replayed = None
        for entry in ledger.log(device.address, most=1_000_000):
            if entry.after is not None:
                assert entry.before == replayed
                assert replayed is None or entry.after in MOVES[replayed]
                replayed = entry.after
        assert replayed is device.state
    open_uses = {use.address for use in ledger.usage() if use.to_s is None}
    assert open_uses == set(holding)
    cpus = [cpu for claim in ledger.claims() for cpus in claim.cpus.values() for cpu in cpus]
    assert len(cpus) == len(set(cpus))
