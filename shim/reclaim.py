"""Devices and CPUs of pods that have ended otherwise than they should, for `delete` and `casemate gc`.

From the ledger alone, which says who had them and what was done already. It must not know of journals.
"""

import os
import select
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from config.places import LEDGER_FILE
from config.settings import Settings
from shim import system
from vfio.binding import Bus
from vfio.inventory import SYSFS
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Pod, Process, this_process
from vfio.release import Release


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """devices: each, and why it is quarantined, or None. cpus: that were a pod's alone."""

    devices: dict[str, str | None] = field(default_factory=dict)
    cpus: Mapping[Pod, tuple[int, ...]] = field(default_factory=dict)


def is_alive(process: Process) -> bool:
    """Whether this very process runs, as the host counts pids. One that is dead and not reaped does not."""
    pidfd = system.open_process(process.pid, process.started)
    if pidfd is None:
        return False
    ended = bool(select.select([pidfd], [], [], 0)[0])
    os.close(pidfd)
    return not ended


def myself() -> Process:
    """This process, as the ledger knows one; not within a PID namespace."""
    return Process.here(os.getpid(), system.start_time(os.getpid()))


def reclaim(settings: Settings, actor: str, sys: str = SYSFS) -> Reclaimed:
    """Every device whose pod has ended, and of resets whose worker has; and CPUs of such pods.

    actor: on whose behalf, for the audit log. Nothing where no pod was ever given any.
    """
    directory = Path(settings.ledger_dir)
    if not (directory / LEDGER_FILE).exists():
        return Reclaimed()
    with Ledger(directory, actor=f"{actor}, {this_process()}") as ledger:
        orphans = ledger.collect(is_alive, myself())
        failed = Release.by_settings(settings, Bus(sys), ledger).give_back(orphans.devices)
    touched = {address for claim in orphans.claims for address in claim.addresses}.union(orphans.devices)
    return Reclaimed({str(each): failed.get(each) for each in sorted(touched)}, orphans.cpus)
