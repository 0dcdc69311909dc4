"""`casemate gpu`: the host's PCI devices that pods can be given, GPUs and what belongs to them.

Only turns what vfio/ found into text; must not know how it was found.
"""

from typing import Annotated, Any

import typer

from cli.output import JsonOption, print_json, print_line, print_note, print_table
from vfio import inventory
from vfio.address import PciAddress
from vfio.inventory import Bar, Device, Inventory
from vfio.kinds import Kind

app = typer.Typer(no_args_is_help=True, help="GPUs and other PCI devices that pods can be given.")

Json = Annotated[bool, JsonOption]

# What a pod is given for its own sake; the rest (audio, USB, unknown classes) is listed with --all.
SHOWN = (Kind.GPU, Kind.NVSWITCH, Kind.ACCELERATOR, Kind.NIC, Kind.NVME)
_COLUMNS = ("ADDRESS", "KIND", "DEVICE", "DRIVER", "NUMA", "GROUP", "LARGEST BAR", "LINK")
_SYSFS = inventory.SYSFS


@app.command("list")
def list_devices(
    every: Annotated[
        bool, typer.Option("--all", help="Also what is never given to a pod, with the reason.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the host's GPUs, NVSwitches, network cards and NVMe.

    Functions of one card go to a pod together; `casemate gpu show` names them.
    """
    found = inventory.read(_SYSFS)
    shown = [each for each in found.functions.values() if every or each.kind in SHOWN]
    if as_json:
        print_json(
            {
                "devices": [_summary(each, found) for each in shown if each.skipped is None],
                "skipped": [
                    {"address": str(each.address), "title": each.title, "reason": each.skipped}
                    for each in shown
                    if each.skipped is not None
                ],
                "vanished": [str(address) for address in found.vanished],
            }
        )
        return
    print_table(_COLUMNS, [_row(each) for each in shown if each.skipped is None])
    if every and any(each.skipped for each in shown):
        print_line()
        print_table(
            ("ADDRESS", "NOT FOR PODS", "REASON"),
            [(each.address, each.title, each.skipped) for each in shown if each.skipped is not None],
        )
    hidden = len(found.functions) - len(shown)
    if hidden:
        print_note(f"{hidden} more PCI functions: casemate gpu list --all")
    for address in found.vanished:
        print_note(f"{address} vanished while it was read")


@app.command()
def show(
    address: Annotated[str, typer.Argument(help="As `casemate gpu list` has it: 0000:3b:00.0 or 3b:00.0.")],
    as_json: Json = False,
) -> None:
    """Show all that is known of one device."""
    found = inventory.read(_SYSFS)
    device = found.function(PciAddress.parse(address))
    if as_json:
        print_json(_summary(device, found))
        return
    for name, value in _details(device, found):
        print_line((f"{name:14}", "bold"), value)


def _row(device: Device) -> tuple[object, ...]:
    return (
        device.address,
        device.kind.value,
        device.title,
        device.driver or "-",
        "-" if device.numa_node is None else device.numa_node,
        "-" if device.group is None else device.group,
        size(max((bar.size_bytes for bar in device.bars if not bar.is_io), default=0)),
        f"{device.link.speed.split()[0]} GT/s x{device.link.width}" if device.link else "-",
    )


def _summary(device: Device, found: Inventory) -> dict[str, Any]:
    return {
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
