"""`casemate cdi`: the devices that are bound to vfio-pci, as a file by which clients name them.

Only turns what vfio/cdi.py says into files and text; must not know which devices may be in one.
"""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import ledger
from cli.exits import ExitCode
from cli.output import JsonOption, print_json, print_line, print_note, print_table
from config.load import load
from config.settings import Settings
from rpc.errors import FailedPrecondition
from vfio import inventory, isolation

if TYPE_CHECKING:
    from vfio.cdi import Listing

app = typer.Typer(no_args_is_help=True, help="Devices that are bound to vfio-pci, for clients that know CDI.")

Json = Annotated[bool, JsonOption]
_SYSFS, _PROC, _DEV = inventory.SYSFS, isolation.PROC, "/dev"


@app.command()
def generate(
    kind: Annotated[str | None, typer.Option(help="VENDOR/CLASS; else vfio.cdi_kind of the config.")] = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to; else vfio.cdi_dir of the config.")
    ] = None,
    stdout: Annotated[bool, typer.Option("--stdout", help="Print the file, and write none.")] = False,
    as_json: Json = False,
) -> None:
    """Write the CDI file: each device that vfio-pci has and that pods may have, by its index and its address.

    `ctr run --device VENDOR/CLASS=NAME` then names one. What is not in it is said, with the reason. Where no
    device can be in it, there is no file, the old one is removed, and the exit code is 1.
    """
    import json

    from vfio import cdi

    settings = load()
    listed = _listing(settings, kind or settings.vfio.cdi_kind)
    directory, name = output or settings.vfio.cdi_dir, cdi.file_name(listed.kind)
    try:
        spec = cdi.spec(listed)
    except FailedPrecondition:
        if not stdout:
            _remove(os.path.join(directory, name))
        raise
    text = json.dumps(spec, indent=2) + "\n"
    path = None if stdout else cdi.write(directory, name, text)
    left = {str(address): reason for address, reason in listed.left.items()}
    if as_json:
        print_json({"path": path, "spec": spec, "left": left, "others": listed.others})
    elif stdout:
        print_line(text.rstrip("\n"))
    else:
        number = len(listed.entries)
        print_line(f"{path}: {number} of {number + len(left)} devices of kind {listed.kind}")
    for address, reason in left.items():
        print_note(f"{address} is not in it: {reason}")
    if listed.others:
        print_note(f"{listed.others} devices of the host are of another kind")
    for rival in cdi.rivals(directory, name, listed.kind):
        print_note(f"{rival} has devices of kind {listed.kind}, too: a client refuses names that both have")


@app.command("list")
def list_devices(
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where they are; else vfio.cdi_dir of the config.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what `casemate cdi generate` wrote, and what of it does not hold any more.

    The exit code is 1 if something of it is stale.
    """
    from vfio import cdi

    settings = load()
    directory = output or settings.vfio.cdi_dir
    names = [each for each in _names(directory) if each.startswith("casemate-") and each.endswith(".json")]
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for name in names:
        path = os.path.join(directory, name)
        kind, devices = cdi.read(path)
        listed = _listing(settings, kind)
        wrong = cdi.stale(listed, devices)
        rows += [
            {
                "name": f"{kind}={device}",
                "address": str(listed.names[device]) if device in listed.names else None,
                "nodes": list(nodes),
                "stale": wrong[device] or None,
                "file": path,
            }
            for device, nodes in devices.items()
        ]
        missing += [
            {"name": f"{kind}={device}", "file": path} for device in listed.devices if device not in devices
        ]
    if as_json:
        print_json({"devices": rows, "missing": missing})
    elif not names:
        print_note(f"{directory} has no file of casemate's: casemate cdi generate")
    else:
        print_table(
            ("NAME", "ADDRESS", "NODES", "STATE"),
            [
                (
                    each["name"],
                    each["address"] or "-",
                    " ".join(each["nodes"]),
                    f"stale: {each['stale']}" if each["stale"] else "ready",
                )
                for each in rows
            ],
            ["red" if each["stale"] else "" for each in rows],
        )
        for each in missing:
            print_note(f"{each['name']} is not in {each['file']}: casemate cdi generate")
    if any(each["stale"] for each in rows):
        raise typer.Exit(ExitCode.FAILURE)


def _listing(settings: Settings, kind: str) -> "Listing":
    from vfio import cdi
    from vfio.binding import Bus

    cdi.check_kind(kind)
    found = inventory.read(_SYSFS)
    audit = isolation.audit(found, waive=settings.vfio.waive, sys=_SYSFS, proc=_PROC)
    with ledger.opened(settings, "cdi") as opened:
        held = opened.devices() if opened else []
        bindings = opened.bindings() if opened else []
    return cdi.listing(kind, found, audit, held, bindings, Bus(_SYSFS).node, _DEV)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    print_note(f"{path} is removed: no device can be in it")
