"""Devices of pods that have ended otherwise than they should, taken back: for `delete` and `casemate gc`.

From the ledger alone, which says who had them and what was done already. It must not know of journals.
"""

import os
import select
from pathlib import Path

from config.places import LEDGER_FILE
from config.settings import Settings
from shim import system
from vfio.binding import Bus
from vfio.inventory import SYSFS
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Process, this_process
from vfio.release import Release


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


def reclaim(settings: Settings, actor: str, sys: str = SYSFS) -> dict[str, str | None]:
    """Every device whose pod has ended, and of resets whose worker has: why it is quarantined, or None.

    actor: on whose behalf, for the audit log. Nothing where no pod was ever given a device.
    """
    directory = Path(settings.ledger_dir)
    if not (directory / LEDGER_FILE).exists():
        return {}
    with Ledger(directory, actor=f"{actor}, {this_process()}") as ledger:
        orphans = ledger.collect(is_alive, myself())
        failed = Release.by_settings(settings, Bus(sys), ledger).give_back(orphans.devices)
    touched = {address for claim in orphans.claims for address in claim.addresses}.union(orphans.devices)
    return {str(each): failed.get(each) for each in sorted(touched)}
