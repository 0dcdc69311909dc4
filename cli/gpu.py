"""`casemate gpu`: the host's PCI devices that pods can be given, GPUs and what belongs to them.

Only turns what vfio/ found into text; must not know how it was found.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import binding, ledger
from cli.exits import ExitCode
from cli.output import JsonOption, can_draw, print_json, print_line, print_note, print_table
from config.load import load
from vfio import inventory, isolation
from vfio.address import PciAddress
from vfio.findings import Finding, Severity
from vfio.inventory import Bar, Device, Inventory
from vfio.isolation import Audit
from vfio.kinds import Kind
from vfio.names import PciNames
from vfio.topology import DEVICE, Branch, tree

if TYPE_CHECKING:  # its module needs the database's
    from vfio.ledger.records import Device as Holding

app = typer.Typer(no_args_is_help=True, help="GPUs and other PCI devices that pods can be given.")

for command in (*binding.COMMANDS, *ledger.COMMANDS):
    app.command()(command)

Json = Annotated[bool, JsonOption]

# What a pod is given for its own sake; the rest (audio, USB, unknown classes) is listed with --all.
SHOWN = (Kind.GPU, Kind.NVSWITCH, Kind.ACCELERATOR, Kind.NIC, Kind.NVME)
_COLUMNS = tuple("ADDRESS KIND DEVICE DRIVER NUMA GROUP BAR LINK STATE POD FINDINGS".split())
READY, REFUSED = "ready", "refused"
Held = dict[PciAddress, "Holding"]
_SYSFS, _PROC = inventory.SYSFS, isolation.PROC


@app.command("list")
def list_devices(
    every: Annotated[
        bool, typer.Option("--all", help="Also what is never given to a pod, with the reason.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the host's GPUs, NVSwitches, network cards and NVMe, and whether pods may have them.

    "refused" is a device that no pod is given while its findings last; `casemate gpu show` says what to do
    about them. A device that is not free has its state in the ledger, with the pod. BAR is the largest one.
    Functions of one card and devices of one IOMMU group go to a pod together.
    """
    found = inventory.read(_SYSFS)
    audit, held = _audit(found), _held()
    shown = [each for each in found.functions.values() if every or each.kind in SHOWN]
    if as_json:
        print_json(
            {
                "host": [_finding(each, audit) for each in audit.host],
                "devices": [_summary(each, found, audit, held) for each in shown if each.skipped is None],
                "skipped": [
                    {"address": str(each.address), "title": each.title, "reason": each.skipped}
                    for each in shown
                    if each.skipped is not None
                ],
                "vanished": [str(address) for address in found.vanished],
            }
        )
        return
    devices = [each for each in shown if each.skipped is None]
    styles = ["red" if _state(each, found, audit, held) == REFUSED else "" for each in devices]
    print_table(_COLUMNS, [_row(each, found, audit, held) for each in devices], styles)
    if every and any(each.skipped for each in shown):
        print_line()
        print_table(
            ("ADDRESS", "NOT FOR PODS", "REASON"),
            [(each.address, each.title, each.skipped) for each in shown if each.skipped is not None],
        )
    for finding in audit.host:
        print_note(f"{finding.code.value}: {finding.text}")
    hidden = len(found.functions) - len(shown)
    if hidden:
        print_note(f"{hidden} more PCI functions: casemate gpu list --all")
    for address in found.vanished:
        print_note(f"{address} vanished while it was read")


@app.command()
def topology(
    every: Annotated[bool, typer.Option("--all", help="Also audio, USB and unknown classes.")] = False,
    as_json: Json = False,
) -> None:
    """Draw which devices are near each other: NUMA node, root port, switch, device.

    Of a device: kind, name, driver, IOMMU group, state as `casemate gpu list` has it, pod. VFs are below the
    function that they are of.
    """
    found = inventory.read(_SYSFS)
    audit, held = _audit(found), _held()
    shown = [each.address for each in found.devices if every or each.kind in SHOWN]
    nodes = tree(found, shown)

    def as_mapping(branch: Branch) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if branch.what == DEVICE:
            device = found.functions[branch.address]
            pod = held[device.address].pod if device.address in held else None
            more = {
                "kind": device.kind.value,
                "name": device.title,
                "driver": device.driver,
                "iommu_group": device.group,
                "state": _state(device, found, audit, held),
                "pod": None if pod is None else str(pod),
            }
        return {
            "what": branch.what,
            "address": str(branch.address),
            **more,
            "below": [as_mapping(each) for each in branch.below],
        }

    def draw(branches: list[Branch], before: str) -> None:
        for branch in branches:
            is_last = branch is branches[-1]
            print_line(before + (last if is_last else between), *_about(branch, found, audit, held))
            draw(branch.below, before + (blank if is_last else line))

    if as_json:
        print_json({"nodes": [{"node": node, "below": list(map(as_mapping, nodes[node]))} for node in nodes]})
        return
    between, last, line = ("├─ ", "└─ ", "│  ") if can_draw() else ("|- ", "`- ", "|  ")
    blank = "   "
    for node, branches in nodes.items():
        print_line(("no NUMA node" if node is None else f"NUMA node {node}", "bold"))
        draw(branches, "")
    if not nodes:
        print_note("this host has no device for pods")


@app.command()
def show(
    address: Annotated[str, typer.Argument(help="As `casemate gpu list` has it: 0000:3b:00.0 or 3b:00.0.")],
    as_json: Json = False,
) -> None:
    """Show all that is known of one device."""
    found = inventory.read(_SYSFS)
    device = found.function(PciAddress.parse(address))
    audit, held = _audit(found), _held()
    if as_json:
        print_json(_summary(device, found, audit, held))
        return
    for name, value in _details(device, found):
        print_line((f"{name:14}", "bold"), value)
    if device.skipped is None:
        print_line((f"{'state':14}", "bold"), _state(device, found, audit, held))
        if device.address in held:
            print_line((f"{'pod':14}", "bold"), str(held[device.address].pod or "-"))
        _print_findings([*audit.host, *_findings(device, found, audit)], audit)


@app.command("audit")
def audit_devices(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADDRESS]...", help="One pod's; without any, every device."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what speaks against giving devices to a stranger, and what to do about it.

    Devices that are named are judged as one pod's, with all that comes with them: other functions of their
    cards, and what else is in their IOMMU groups. The exit code is 1 if any of them is refused.
    """
    found = inventory.read(_SYSFS, PciNames())
    together = None
    if addresses is not None:
        named = [found.device(PciAddress.parse(each)).address for each in addresses]
        together = {each for address in named for each in (address, *found.companions(address))}
    audit = isolation.audit(found, together, waive=load().vfio.waive, sys=_SYSFS, proc=_PROC)
    findings = [*audit.host, *(each for own in audit.devices.values() for each in own)]
    refused = any(map(audit.refuses, findings))
    if as_json:
        print_json({"given": not refused, "findings": [_finding(each, audit) for each in findings]})
    else:
        _print_findings(findings, audit)
        if not findings:
            print_line("nothing speaks against it")
    if refused:
        raise typer.Exit(ExitCode.FAILURE)


def _audit(found: Inventory) -> Audit:
    return isolation.audit(found, waive=load().vfio.waive, sys=_SYSFS, proc=_PROC)


def _findings(device: Device, found: Inventory, audit: Audit) -> list[Finding]:
    """The device's, and those of the functions that come with it; not the host's."""
    functions = (device.address, *sorted(found.companions(device.address)))
    return [each for function in functions for each in audit.devices.get(function, ())]


def _held() -> Held:
    """What of the host's is not free, by the ledger."""
    with ledger.opened(load(), "gpu list") as opened:
        devices = opened.devices() if opened else []
    return {each.address: each for each in devices if each.state.value != "free"}


def _state(device: Device, found: Inventory, audit: Audit, held: Held) -> str:
    """A pod that has it is one of the findings, which then say nothing of what the next one may have."""
    if device.address in held:
        return held[device.address].state.value
    findings = [*audit.host, *_findings(device, found, audit)]
    return REFUSED if any(map(audit.refuses, findings)) else READY


def _about(branch: Branch, found: Inventory, audit: Audit, held: Held) -> list[tuple[str, str] | str]:
    if branch.what != DEVICE:
        return [f"{branch.what} {branch.address}"]
    device = found.functions[branch.address]
    state = _state(device, found, audit, held)
    pod = held[device.address].pod if device.address in held else None
    words = [
        "" if device.physfn is None else "VF",
        device.kind.value,
        device.title,
        device.driver or "no driver",
        "no group" if device.group is None else f"group {device.group}",
    ]
    return [
        (str(device.address), "bold"),
        f"  {'  '.join(filter(None, words))}  ",
        (state, "red" if state in (REFUSED, "quarantined") else ""),
        f"  pod {pod}" if pod is not None else "",
    ]


def _finding(finding: Finding, audit: Audit) -> dict[str, Any]:
    return {
        "code": finding.code.value,
        "severity": finding.severity.value,
        "waived": finding.severity is Severity.REFUSED and not audit.refuses(finding),
        "subject": None if finding.subject is None else str(finding.subject),
        "text": finding.text,
        "fix": finding.fix,
    }


def _print_findings(findings: Iterable[Finding], audit: Audit) -> None:
    for finding in findings:
        refuses = audit.refuses(finding)
        waived = finding.severity is Severity.REFUSED and not refuses
        word = "waived" if waived else finding.severity.value
        style = "bold red" if refuses else "yellow"
        print_line((f"{word:8}", style), f"{finding.code.value}: {finding.text}")
        print_line((f"{'':8}fix: {finding.fix}", "dim"))


def _row(device: Device, found: Inventory, audit: Audit, held: Held) -> tuple[object, ...]:
    return (
        device.address,
        device.kind.value,
        device.title,
        device.driver or "-",
        "-" if device.numa_node is None else device.numa_node,
        "-" if device.group is None else device.group,
        size(max((bar.size_bytes for bar in device.bars if not bar.is_io), default=0)),
        f"{device.link.speed.split()[0]} GT/s x{device.link.width}" if device.link else "-",
        _state(device, found, audit, held),
        (held[device.address].pod if device.address in held else None) or "-",
        " ".join(dict.fromkeys(each.code.value for each in _findings(device, found, audit))) or "-",
    )


def _summary(device: Device, found: Inventory, audit: Audit, held: Held) -> dict[str, Any]:
    judged = {} if device.skipped is not None else _judged(device, found, audit, held)
    return judged | {
        "address": str(device.address),
        "kind": device.kind.value,
        "skipped": device.skipped,
        "class": f"{device.class_code:06x}",
        "vendor_id": f"{device.vendor_id:04x}",
        "device_id": f"{device.device_id:04x}",
        "subsystem_vendor_id": f"{device.subsystem_vendor_id:04x}",
        "subsystem_device_id": f"{device.subsystem_device_id:04x}",
        "vendor": device.vendor,
        "name": device.name,
        "driver": device.driver,
        "driver_override": device.driver_override,
        "numa_node": device.numa_node,
        "iommu_group": device.group,
        "group_members": _texts(found.members(device.address)),
        "siblings": _texts(found.siblings(device.address)),
        "path": _texts(device.path),
        "root_bus": device.root_bus,
        "bars": [
            {
                "index": bar.index,
                "size_bytes": bar.size_bytes,
                "io": bar.is_io,
                "prefetchable": bar.prefetchable,
                "64_bit": bar.is_64_bit,
                "rom": bar.is_rom,
            }
            for bar in device.bars
        ],
        "reset_methods": list(device.reset_methods),
        "link": None
        if device.link is None
        else {
            "speed": device.link.speed,
            "width": device.link.width,
            "most_speed": device.link.most_speed,
            "most_width": device.link.most_width,
        },
        "sriov": {
            "total_vfs": device.total_vfs,
            "vfs": _texts(device.vfs),
            "physfn": None if device.physfn is None else str(device.physfn),
        },
        "mdev_types": [
            {"name": each.name, "description": each.description, "available": each.available}
            for each in device.mdev_types
        ],
        "vgpu_types": list(device.vgpu_types),
        "partitions": None
        if device.partitions is None
        else {"current": device.partitions.current, "available": list(device.partitions.available)},
        "boot_vga": device.boot_vga,
        "vfio_device": None if device.vfio_cdev is None else f"/dev/vfio/devices/{device.vfio_cdev}",
    }


def _judged(device: Device, found: Inventory, audit: Audit, held: Held) -> dict[str, Any]:
    pod = held[device.address].pod if device.address in held else None
    return {
        "state": _state(device, found, audit, held),
        "pod": None if pod is None else str(pod),
        "findings": [_finding(each, audit) for each in _findings(device, found, audit)],
    }


def _details(device: Device, found: Inventory) -> list[tuple[str, str]]:
    """What there is to say, line by line; a line without anything to say is left out."""
    others = [str(each) for each in found.members(device.address) if each != device.address]
    link = device.link
    lines = {
        "address": str(device.address),
        "device": device.title,
        "ids": f"{device.vendor_id:04x}:{device.device_id:04x}",
        "subsystem": f"{device.subsystem_vendor_id:04x}:{device.subsystem_device_id:04x}",
        "kind": f"{device.kind.value}, class {device.class_code:06x}",
        "not for pods": device.skipped or "",
        "driver": device.driver or "none",
        "NUMA node": "not known" if device.numa_node is None else str(device.numa_node),
        "IOMMU group": "none" if device.group is None else str(device.group),
        "group's others": " ".join(others),
        "goes with": " ".join(_texts(found.siblings(device.address))),
        "path": " > ".join([device.root_bus, *_texts(device.path)]),
        "BARs": "\n              ".join(map(_bar, device.bars)),
        "resets": " ".join(device.reset_methods) or ("" if device.skipped else "none"),
        "link": ""
        if link is None
        else f"{link.speed} x{link.width}, at most {link.most_speed} x{link.most_width}",
        "SR-IOV": f"{len(device.vfs)} of {device.total_vfs} VFs" if device.total_vfs else "",
        "VFs": " ".join(_texts(device.vfs)),
        "VF of": "" if device.physfn is None else str(device.physfn),
        "mdev types": ", ".join(f"{each.name} ({each.available} left)" for each in device.mdev_types),
        "vGPU types": ", ".join(device.vgpu_types),
        "partitions": ""
        if device.partitions is None
        else f"{device.partitions.current} of {' '.join(device.partitions.available)}",
    }
    return [(name, text) for name, text in lines.items() if text]


def _texts(addresses: tuple[PciAddress, ...]) -> list[str]:
    return list(map(str, addresses))


def _bar(bar: Bar) -> str:
    if bar.is_io:
        return f"{bar.index}: {bar.size_bytes} I/O ports"
    words = [
        "ROM" if bar.is_rom else str(bar.index) + ":",
        size(bar.size_bytes),
        "64-bit" if bar.is_64_bit else "",
        "prefetchable" if bar.prefetchable and not bar.is_rom else "",
    ]
    return " ".join(filter(None, words))


def size(size_bytes: int) -> str:
    """In the largest unit that leaves a whole number: 128 GiB, 16 MiB, 4 KiB."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << shift and size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift} {unit}"
    return f"{size_bytes} B"
