"""`casemate gpu claims | usage | log | clear`: who has which device, who had it, what was done to it.

Only turns what the ledger says into text; must not know how it is kept. What collects after the dead, for
`casemate gc`, is here too.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.output import JsonOption, print_json, print_line, print_note, print_table
from config import places
from config.cpulist import ranges
from config.load import load
from config.settings import Settings
from rpc.errors import NotFound
from vfio.address import PciAddress
from vfio.inventory import SYSFS

if TYPE_CHECKING:  # `casemate gpu list` needs none of it
    from vfio.ledger.ledger import Ledger
    from vfio.ledger.records import Device, Entry, Pod, Use

Json = Annotated[bool, JsonOption]
_SYSFS = SYSFS
_STYLES = {"quarantined": "red", "resetting": "yellow"}
_NOTHING = "no pod of this host was ever given a device"


@contextmanager
def opened(settings: Settings, what: str) -> "Iterator[Ledger | None]":
    """The ledger, or None if there is none yet: who only looks does not make one. what: the command."""
    directory = Path(settings.ledger_dir)
    if not (directory / places.LEDGER_FILE).exists():
        yield None
        return
    from vfio.ledger.ledger import Ledger
    from vfio.ledger.records import this_process

    with Ledger(directory, actor=f"casemate {what}, {this_process()}") as ledger:
        yield ledger


def claims(as_json: Json = False) -> None:
    """List what is not free: claimed, in use, resetting or quarantined; and pods' own CPUs and huge pages."""
    from cli.ps import age

    with opened(load(), "gpu claims") as ledger:
        held = ledger.claims() if ledger else []
        devices = [each for each in ledger.devices() if each.state.value != "free"] if ledger else []
    if as_json:
        print_json(
            {
                "devices": [_device(each) for each in devices],
                "claims": [
                    {
                        "claim": claim.id,
                        **_pod(claim.pod),
                        "pid": claim.owner.pid,
                        "since": claim.made_s,
                        "devices": [str(address) for group in claim.given for address in group],
                        "companions": list(map(str, claim.companions)),
                        "partitions": list(claim.partitions),
                        "cpus": {str(node): list(cpus) for node, cpus in claim.cpus.items()},
                        "huge_pages": {str(node): count for node, count in claim.pages.items()},
                        "huge_page_bytes": claim.page_bytes,
                    }
                    for claim in held
                ],
            }
        )
        return
    if not devices and not held:
        print_note("all devices are free")
        return
    now = time.time()
    rows = [
        (
            each.address,
            each.state.value,
            each.pod or "-",
            (each.pod.tenant if each.pod else "") or "-",
            age(now - each.since_s),
            each.reason,
        )
        for each in devices
    ]
    if rows:
        styles = [_STYLES.get(each.state.value, "") for each in devices]
        print_table(("ADDRESS", "STATE", "POD", "TENANT", "SINCE", "REASON"), rows, styles)
    for claim in held:
        for partition in claim.partitions:
            print_line(f"{claim.pod}: NVLink partition {partition}")
        for node, cpus in claim.cpus.items():
            print_line(f"{claim.pod}: CPUs {ranges(cpus)} of node {node}")
        for node, count in claim.pages.items():
            print_line(f"{claim.pod}: {count} huge pages of {claim.page_bytes >> 10} KiB of node {node}")


def usage(
    tenants: Annotated[bool, typer.Option("--tenants", help="One line for each tenant: the sum.")] = False,
    as_json: Json = False,
) -> None:
    """List who had which device, from when to when, and for how many seconds.

    Devices that only came along with another (functions of one card, an IOMMU group) are marked, not summed.
    """
    with opened(load(), "gpu usage") as ledger:
        # While an operator binds or resets a device, it is nobody's use.
        uses = [use for use in ledger.usage() if not use.pod.is_host] if ledger else []
    if as_json:
        print_json(_tenants(uses) if tenants else [_use(use) for use in uses])
    elif not uses:
        print_note(_NOTHING)
    elif tenants:
        rows = [(each["tenant"] or "-", each["uses"], f"{each['seconds']:.0f}") for each in _tenants(uses)]
        print_table(("TENANT", "USES", "SECONDS"), rows)
    else:
        print_table(
            ("POD", "TENANT", "ADDRESS", "FROM", "TO", "SECONDS"),
            [
                (
                    use.pod,
                    use.pod.tenant or "-",
                    f"{use.address}{' (came along)' if use.companion else ''}",
                    moment(use.from_s),
                    "now" if use.to_s is None else moment(use.to_s),
                    f"{use.seconds:.0f}",
                )
                for use in uses
            ],
        )


def log(
    address: Annotated[str | None, typer.Argument(help="Of one device only.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="The newest so many.")] = 100,
    as_json: Json = False,
) -> None:
    """Show what happened to devices: every change of state, and what was done to them, with who and when.

    Lines are only ever added to it.
    """
    about = PciAddress.parse(address) if address else None
    with opened(load(), "gpu log") as ledger:
        entries = ledger.log(about, most=lines) if ledger else []
    if as_json:
        print_json([_entry(entry) for entry in entries])
    elif not entries:
        print_note(_NOTHING)
    for entry in () if as_json else entries:
        change = (
            f"{entry.before.value if entry.before else 'new'} > {entry.after.value}" if entry.after else ""
        )
        words = (
            moment(entry.at_s),
            _subject(entry),
            change or entry.cause.value,
            entry.detail,
            f"pod {entry.pod}" if entry.pod and not entry.pod.is_host else "",
            f"({entry.actor})",
        )
        print_line("  ".join(word for word in words if word))


def clear(
    address: Annotated[str, typer.Argument(help="Of the quarantined device: 0000:3b:00.0 or 3b:00.0.")],
    as_json: Json = False,
) -> None:
    """End the quarantine of a device, whose cause you have seen to: its driver has it back, pods may have it.

    It is not reset again. `casemate gpu log ADDRESS` has what happened.
    """
    from vfio.binding import Bus
    from vfio.release import Release

    settings = load()
    wanted = PciAddress.parse(address)
    with opened(settings, "gpu clear") as ledger:
        if ledger is None:
            raise NotFound(f"device {wanted} is not quarantined: {_NOTHING}")
        reason = Release.by_settings(settings, Bus(_SYSFS), ledger).clear(wanted)
        cleared = ledger.device(wanted)
    if as_json:
        print_json({"device": _device(cleared), "was_quarantined": reason})
    else:
        print_line(f"{wanted} is {cleared.state.value}; it was quarantined because: {reason}")


COMMANDS = (claims, usage, log, clear)


# --- for casemate gc ---


def collect(settings: Settings, *, dry_run: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Devices of pods that have ended, and of resets whose worker has: each, and why it is not free. And
    the CPUs that were such pods' alone."""
    with opened(settings, "gc") as ledger:
        if ledger is None:
            return [], []
        from shim.reclaim import Reclaimed, is_alive, reclaim

        found = ledger.orphans(is_alive) if dry_run else None
    if found is not None:
        taken = Reclaimed({str(each): None for each in found.devices}, found.cpus)
    else:
        taken = reclaim(settings, "casemate gc", _SYSFS)
    devices = [{"device": device, "quarantined": reason} for device, reason in taken.devices.items()]
    return devices, [{**_pod(pod), "cpus": list(cpus)} for pod, cpus in taken.cpus.items()]


# --- in words ---


def moment(seconds: float) -> str:
    """Local time, to the second, with its offset."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")


def _subject(entry: "Entry") -> str:
    if entry.address is not None:
        return str(entry.address)
    return "host" if entry.claim is None else f"claim {entry.claim}"


def _tenants(uses: "Sequence[Use]") -> list[dict[str, Any]]:
    own = [use for use in uses if not use.companion]
    return [
        {
            "tenant": tenant,
            "uses": sum(use.pod.tenant == tenant for use in own),
            "seconds": sum(use.seconds for use in own if use.pod.tenant == tenant),
        }
        for tenant in sorted({use.pod.tenant for use in own})
    ]


def _pod(pod: "Pod | None") -> dict[str, Any]:
    if pod is None:
        return {"namespace": None, "pod": None, "tenant": None}
    return {"namespace": pod.namespace, "pod": pod.id, "tenant": pod.tenant}


def _device(device: "Device") -> dict[str, Any]:
    return {
        "address": str(device.address),
        "state": device.state.value,
        "claim": device.claim,
        **_pod(device.pod),
        "since": device.since_s,
        "reason": device.reason,
    }


def _use(use: "Use") -> dict[str, Any]:
    return {
        **_pod(use.pod),
        "address": str(use.address),
        "companion": use.companion,
        "from": use.from_s,
        "to": use.to_s,
        "seconds": use.seconds,
    }


def _entry(entry: "Entry") -> dict[str, Any]:
    return {
        "number": entry.number,
        "at": entry.at_s,
        "cause": entry.cause.value,
        "actor": entry.actor,
        "address": str(entry.address) if entry.address else None,
        "claim": entry.claim,
        **_pod(entry.pod),
        "before": entry.before.value if entry.before else None,
        "after": entry.after.value if entry.after else None,
        "detail": entry.detail,
    }
