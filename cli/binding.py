"""`casemate gpu bind | unbind | reset`: what an operator does to free devices.

Only turns what vfio/ahead.py did into text; must not know how it is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.exits import ExitCode
from cli.output import JsonOption, print_json, print_line, print_note
from config.load import load
from rpc.errors import CasemateError
from vfio import inventory
from vfio.address import PciAddress
from vfio.inventory import Device, Inventory
from vfio.isolation import PROC
from vfio.kinds import GIVEN, Kind

if TYPE_CHECKING:  # `casemate gpu list` needs none of it
    from vfio.ahead import Change, Operator

Json = Annotated[bool, JsonOption]
_SYSFS, _PROC = inventory.SYSFS, PROC
_ADDRESSES = "As `casemate gpu list` has them: 0000:3b:00.0 or 3b:00.0."


def bind(
    addresses: Annotated[
        list[str] | None, typer.Argument(metavar="[ADDRESS]...", help=_ADDRESSES, show_default=False)
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--all", metavar="KIND", help="Every device of a kind instead: gpu, nic, nvme ..."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give free devices to vfio-pci ahead of any pod, so that /dev/vfio has them: for CDI, device plugins.

    With them go the other functions of their cards and the rest of their IOMMU groups. A pod that has one
    later leaves it there. Named devices are all bound or none; with --all, each for itself, and what is not
    bound is said, with the exit code 1. Not bound are devices that no pod may have (`casemate gpu audit`),
    and those that are not free.
    """
    if bool(addresses) == (kind is not None):
        raise typer.BadParameter("either addresses, or --all with a kind")
    done: list[Change] = []
    left: list[tuple[PciAddress, str]] = []
    with _operator("gpu bind") as operator:
        if addresses:
            done += operator.bind([PciAddress.parse(each) for each in addresses])
        else:
            _bind_all(operator, _kind(kind or ""), done, left)
    if as_json:
        print_json({"devices": [_change(each) for each in done], "left": [_left(*each) for each in left]})
    else:
        for each in done:
            _print_change(each)
        for address, reason in left:
            print_note(f"{address} is left as it is: {reason}")
        if not done and not left:
            print_note(f"this host has no device of kind {kind}")
    if left:
        raise typer.Exit(ExitCode.FAILURE)


def unbind(
    addresses: Annotated[list[str], typer.Argument(metavar="ADDRESS...", help=_ADDRESSES)],
    as_json: Json = False,
) -> None:
    """Give free devices back from vfio-pci to the drivers of the host's that take them.

    With them go the other functions of their cards and the rest of their IOMMU groups. A driver whose module
    is not loaded takes its device when it is.
    """
    with _operator("gpu unbind") as operator:
        done = operator.unbind([PciAddress.parse(each) for each in addresses])
    if as_json:
        print_json({"devices": [_change(each) for each in done]})
    else:
        for each in done:
            _print_change(each)


def reset(
    address: Annotated[str, typer.Argument(help="As `casemate gpu list` has it: 0000:3b:00.0 or 3b:00.0.")],
    as_json: Json = False,
) -> None:
    """Reset a free device as after a pod: it is free afterwards, or quarantined if it is not as it was.

    With it go the other functions of its card and the rest of its IOMMU group. A driver of the host's that
    has it loses it meanwhile. The exit code is 1 if one of them is quarantined.
    """
    with _operator("gpu reset") as operator:
        done = operator.reset(PciAddress.parse(address))
    failed = any(each.failed for each in done)
    if as_json:
        print_json(
            {
                "devices": [
                    {
                        "address": str(each.address),
                        "reset": each.done or None,
                        "quarantined": each.failed or None,
                    }
                    for each in done
                ]
            }
        )
    else:
        for each in done:
            if each.failed:
                print_line((f"{each.address} is quarantined: {each.failed}", "red"))
            else:
                print_line(f"{each.address} is as it was: {each.done}")
    if failed:
        raise typer.Exit(ExitCode.FAILURE)


COMMANDS = (bind, unbind, reset)


@contextmanager
def _operator(what: str) -> "Iterator[Operator]":
    """With the ledger, which is made if there is none."""
    from shim.reclaim import myself
    from vfio.ahead import Operator
    from vfio.binding import Bus
    from vfio.ledger.ledger import Ledger
    from vfio.ledger.records import this_process

    settings = load()
    with Ledger(Path(settings.ledger_dir), actor=f"casemate {what}, {this_process()}") as ledger:
        yield Operator(settings, ledger, myself(), Bus(_SYSFS), _PROC)


def _kind(text: str) -> Kind:
    if text not in GIVEN:
        raise typer.BadParameter(f"no kind {text!r}: known are {', '.join(GIVEN)}", param_hint="--all")
    return GIVEN[text]


def _bind_all(
    operator: "Operator", kind: Kind, done: "list[Change]", left: list[tuple[PciAddress, str]]
) -> None:
    found = inventory.read(_SYSFS)
    seen: set[PciAddress] = set()
    for device in found.devices:
        if device.kind is not kind or device.address in seen:
            continue
        seen |= {device.address, *found.companions(device.address)}
        if _is_bound(found, device):
            done.append(operator.as_it_is(device.address))
            continue
        try:
            done += operator.bind([device.address])
        except CasemateError as error:
            left.append((device.address, f"{error.brief}: {error.details}" if error.details else error.brief))


def _is_bound(found: Inventory, device: Device) -> bool:
    """With all that goes with it, whoever has it."""
    from vfio.hostuse import drives_for_guests

    together = (device.address, *found.companions(device.address))
    return all(drives_for_guests(found.functions[each].driver) for each in together)


def _print_change(change: "Change") -> None:
    words = f"from {change.before or 'no driver'}" if change.before != change.after else "as it was"
    node = ""
    if change.node is not None:
        node = f", {' '.join(filter(None, (change.node.group_path, change.node.cdev_path)))}"
    print_line(
        f"{change.address} is bound to {change.after}, {words}{node}"
        if change.after
        else f"{change.address} has no driver, {words}: none that is loaded takes it"
    )


def _change(change: "Change") -> dict[str, Any]:
    return {
        "address": str(change.address),
        "before": change.before or None,
        "driver": change.after or None,
        "group_node": change.node.group_path if change.node else None,
        "device_node": change.node.cdev_path if change.node else None,
    }


def _left(address: PciAddress, reason: str) -> dict[str, Any]:
    return {"address": str(address), "reason": reason}
