"""The host's devices as a file of the Container Device Interface, by which clients make nodes of names.

github.com/cncf-tags/container-device-interface, SPEC.md and schema/. Says which devices are in it, by which
names, and why others are not. It must not know how a client reads the file, nor bind anything.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from config import values
from config.whole import write_whole
from rpc.errors import FailedPrecondition, InvalidArgument
from vfio import hostuse
from vfio.address import PciAddress
from vfio.binding import Node
from vfio.findings import Code
from vfio.inventory import Device, Inventory
from vfio.isolation import Audit
from vfio.kinds import AMD, NVIDIA, Kind
from vfio.ledger.records import Binding, State
from vfio.ledger.records import Device as Holding

DIRECTORY_MODE, FILE_MODE = 0o755, 0o644
ALL = "all"
# Names of devices begin with a digit since 0.5.0, a class has dots since 0.6.0 (specs-go/version.go).
_VERSION, _VERSION_OF_DOTS = "0.5.0", "0.6.0"
_VENDORS = {"nvidia.com": NVIDIA, "amd.com": AMD, "intel.com": 0x8086}
_CLASSES = {"pgpu": Kind.GPU} | {kind.value: kind for kind in Kind}
_PERMISSIONS = "rw"


@dataclass(frozen=True, slots=True)
class Entry:
    """nodes: what a container gets for it, paths in /dev."""

    address: PciAddress
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """names: of every device of this kind, its index and its address. entries: those that can be given.

    left: why the others are not. others: how many devices are of another kind.
    """

    kind: str
    names: Mapping[str, PciAddress]
    entries: Mapping[PciAddress, Entry]
    left: Mapping[PciAddress, str]
    others: int

    @property
    def devices(self) -> dict[str, tuple[str, ...]]:
        """The nodes by name, as the file has them; {} if nothing can be given."""
        found = {
            name: self.entries[address].nodes
            for name, address in self.names.items()
            if address in self.entries
        }
        every = dict.fromkeys(node for entry in self.entries.values() for node in entry.nodes)
        return found | {ALL: tuple(every)} if found else {}


def listing(
    kind: str,
    found: Inventory,
    audit: Audit,
    held: Iterable[Holding],
    bindings: Iterable[Binding],
    node: Callable[[PciAddress], Node],
    dev: str = "/dev",
) -> Listing:
    """audit: of every device, each for itself. held, bindings: the ledger's. node: of one that VFIO has.

    An index counts cards of this kind by address, whoever has them, as NVIDIA's tools count GPUs; the other
    functions of a card, and VFs, have their addresses only. Raises InvalidArgument for what is no kind.
    """
    wanted = [device for device in found.devices if _is_of(check_kind(kind), device)]
    holdings = {each.address: each for each in held if each.state is not State.FREE}
    drivers = {each.address: each.driver for each in bindings}
    entries, left = {}, {}
    names: dict[str, PciAddress] = {}
    cards: set[str] = set()
    for device in wanted:
        at = device.address
        if device.physfn is None and at.slot_name not in cards:
            names[str(len(cards))] = at
            cards.add(at.slot_name)
        names[str(at)] = at
        together = (at, *sorted(found.companions(at)))
        if reason := _left(found, audit, together, holdings, drivers):
            left[at] = reason
        else:
            nodes = dict.fromkeys(_path(node(each), dev) for each in together)
            entries[at] = Entry(at, tuple(nodes))
    return Listing(kind, names, entries, left, len(found.devices) - len(wanted))


def check_kind(text: str) -> str:
    """Raises InvalidArgument."""
    try:
        return values.cdi_kind(text)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def _is_of(kind: str, device: Device) -> bool:
    vendor, _, name = kind.partition("/")
    return (
        _VENDORS.get(vendor, device.vendor_id) == device.vendor_id
        and _CLASSES.get(name, device.kind) is device.kind
    )


def _left(
    found: Inventory,
    audit: Audit,
    together: tuple[PciAddress, ...],
    holdings: Mapping[PciAddress, Holding],
    drivers: Mapping[PciAddress, str],
) -> str:
    """Why a device is not in the file, "" if it is. together: it, and all that goes with it."""
    about = {each: "" if each == together[0] else f"{each}, which goes with it, is " for each in together}
    driver = {each: found.functions[each].driver for each in together}
    for each in together:
        holding = holdings.get(each)
        if holding is not None and holding.state is State.QUARANTINED:
            return f"{about[each]}quarantined: {holding.reason}"
        if holding is not None and not hostuse.drives_for_guests(drivers.get(each, driver[each])):
            return f"{about[each]}bound to {driver[each]} for pod {holding.pod} only"
    # A pod that has it holds it open, and that it is open says nothing of the next one.
    ignored = {Code.OPEN_HANDLES} if together[0] in holdings else set()
    findings = [*audit.host, *(each for at in together for each in audit.devices.get(at, ()))]
    refusing = [each.code for each in findings if audit.refuses(each) and each.code not in ignored]
    # What the host uses is nobody's to bind; but that a group is whole is what binding is for.
    if codes := [code for code in refusing if code is not Code.GROUP_NOT_VIABLE]:
        return _refused(codes)
    for each in together:
        if not hostuse.drives_for_guests(driver[each]):
            had = f"bound to {driver[each]}" if driver[each] else "without a driver"
            return f"{about[each]}{had}: casemate gpu bind {together[0]}"
    return _refused(refusing) if refusing else ""


def _refused(codes: Iterable[Code]) -> str:
    return f"refused: {', '.join(dict.fromkeys(code.value for code in codes))}"


def _path(node: Node, dev: str) -> str:
    """Of the device where the host has IOMMUFD, else of its group."""
    path = node.cdev_path
    if path and os.path.exists(f"{dev}/iommu") and os.path.exists(dev + path.removeprefix("/dev")):
        return path
    return node.group_path


# --- the file ---


def spec(listed: Listing) -> dict[str, Any]:
    """Raises FailedPrecondition if there is no device to be listed: CDI has no file without one."""
    if not listed.entries:
        lines = [f"{address}: {reason}" for address, reason in listed.left.items()]
        raise FailedPrecondition(
            f"no device of kind {listed.kind} can be listed",
            "\n".join(lines) or "this host has none of that kind",
            "casemate gpu bind gives devices to vfio-pci",
        )
    return {
        "cdiVersion": _VERSION_OF_DOTS if "." in listed.kind.partition("/")[2] else _VERSION,
        "kind": listed.kind,
        "devices": [
            {
                "name": name,
                "containerEdits": {
                    "deviceNodes": [{"path": node, "permissions": _PERMISSIONS} for node in nodes]
                },
            }
            for name, nodes in listed.devices.items()
        ],
    }


def file_name(kind: str) -> str:
    """One for each kind. Clients read what ends in .json or .yaml."""
    return f"casemate-{kind.replace('/', '-')}.json"


def write(directory: str, name: str, text: str) -> str:
    """The file's path. It is there wholly, or as it was. Raises PermissionError, FailedPrecondition."""
    path = os.path.join(directory, name)
    try:
        os.makedirs(directory, DIRECTORY_MODE, exist_ok=True)
        write_whole(path, text.encode("ascii"), FILE_MODE, lasting=True)
    except PermissionError:
        raise
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be written", str(error)) from error
    return path


def read(path: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The kind, and the nodes by name, of a file of casemate's. Raises FailedPrecondition for another."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        devices = {
            str(each["name"]): tuple(str(node["path"]) for node in each["containerEdits"]["deviceNodes"])
            for each in found["devices"]
        }
        return str(found["kind"]), devices
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"{path} is not what casemate cdi generate writes", str(error), "generate it again"
        ) from error


def stale(listed: Listing, devices: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """What is wrong with each name of a file, by what could be listed now. "" if nothing is."""
    now = listed.devices
    return {name: _stale(name, nodes, listed, now) for name, nodes in devices.items()}


def _stale(name: str, nodes: tuple[str, ...], listed: Listing, now: Mapping[str, tuple[str, ...]]) -> str:
    if name in now:
        return "" if now[name] == nodes else f"it has {' '.join(now[name])} now"
    if name not in listed.names:
        return "no device of this host has that name" if name != ALL else "no device can be listed"
    return listed.left[listed.names[name]]


def rivals(directory: str, name: str, kind: str) -> list[str]:
    """Other files there with devices of this kind: what two of them name, a client refuses to find.

    YAML is not parsed; its form for a kind, and JSON's, are looked for.
    """
    form = re.compile(rf"""^\s*["']?kind["']?\s*:\s*["']?{re.escape(kind)}["']?\s*(?:,|#|$)""", re.MULTILINE)
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for each in sorted(os.listdir(directory)):
            if each == name or not each.endswith((".json", ".yaml")):
                continue
            with open(os.path.join(directory, each), encoding="utf-8", errors="replace") as file:
                if form.search(file.read()):
                    found.append(os.path.join(directory, each))
    return found
