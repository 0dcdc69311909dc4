"""Devices of the host that a container asks for: by nodes of VFIO among linux.devices, by an annotation.

As text and numbers only: what they mean on this host is vfio/'s, which a pod without devices never imports
(shim/devices.py does). The grammar of the annotation is in docs/gpus.md.
"""

import os
import re

from config.annotations import DEVICES
from config.record import Record
from rpc.errors import FailedPrecondition, InvalidArgument
from shim.oci import Device, Spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfio.ledger.demand import Request, Same

MOST_BYTES = 4096  # of the annotation
MOST_REQUESTS = 16
SYSFS = "/sys"
DEFAULT_MODE = 0o660
# Of /sys/dev/char, its links; compiled when needed, which is never for most pods. What stands for all of
# VFIO is no request for a device.
_ALL_OF_VFIO = r".*/misc/(vfio|iommu)"
_GROUP = r".*/virtual/vfio/([0-9]+)"
_MADE_UP_GROUP = r".*/virtual/vfio/noiommu-[0-9]+"
_CDEV = r".*/([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])/vfio-dev/vfio[0-9]+"
_VFIO_NODES = "/dev/vfio/"


class Node(Record):
    """A node of VFIO's: of an IOMMU group, or (group None) of the function at this address.

    path: where the container is to find the device; "" if it leaves that to the guest. mode: permission bits.
    """

    group: int | None
    address: str
    path: str
    mode: int
    uid: int
    gid: int


class DeviceWishes(Record):
    """False if there are none. text: the annotation's."""

    nodes: tuple[Node, ...]
    text: str

    def __bool__(self) -> bool:
        return bool(self.nodes or self.text)


NO_DEVICES = DeviceWishes(nodes=(), text="")


class Wish(Record):
    """One request of the annotation. path: in the container, of its one device; "" if it says none.

    interface, ips: of a network card, its name and its addresses ("192.0.2.7/24") in the pod's network.
    """

    request: "Request"
    path: str
    interface: str = ""
    ips: tuple[str, ...] = ()


def wishes_of(spec: Spec, sysfs: str = SYSFS) -> DeviceWishes:
    """Raises InvalidArgument for an annotation that is empty or too long."""
    text = spec.annotations.get(DEVICES)
    if text is not None:
        text = text.strip()
        if not text or len(text) > MOST_BYTES:
            raise InvalidArgument(f"annotation {DEVICES} is {'too long' if text else 'empty'}")
    found = (vfio_node(device, sysfs) for device in spec.devices if is_vfio(device, sysfs))
    return DeviceWishes(nodes=tuple(node for node in found if node is not None), text=text or "")


def is_vfio(device: Device, sysfs: str = SYSFS) -> bool:
    """By its numbers, as its path may be any; by its path where the host has no such device any more."""
    if device.type not in ("c", "u"):
        return False
    target = _target(device, sysfs)
    if target is None:
        return device.path.startswith(_VFIO_NODES)
    return any(re.fullmatch(form, target) for form in (_ALL_OF_VFIO, _GROUP, _MADE_UP_GROUP, _CDEV))


def vfio_node(device: Device, sysfs: str = SYSFS) -> Node | None:
    """Of one that is VFIO's; None for what stands for all of VFIO. Raises FailedPrecondition for a group or a
    device that is gone, or that no IOMMU is before."""
    target = _target(device, sysfs)
    if target is None:
        raise FailedPrecondition(
            f"device {device.path}: the host has no such device any more",
            hint="it was taken from vfio-pci; `casemate gpu list` shows what there is",
        )
    if re.fullmatch(_ALL_OF_VFIO, target):
        return None
    if re.fullmatch(_MADE_UP_GROUP, target):
        raise FailedPrecondition(f"device {device.path}: no IOMMU is before it")
    path = "" if device.path.startswith(_VFIO_NODES) else device.path
    mode = DEFAULT_MODE if device.mode is None else device.mode & 0o777
    node = Node(group=None, address="", path=path, mode=mode, uid=device.uid, gid=device.gid)
    if found := re.fullmatch(_CDEV, target):
        return node.replace(address=found[1])
    found = re.fullmatch(_GROUP, target)
    assert found is not None  # is_vfio() said so
    return node.replace(group=int(found[1]))


def _target(device: Device, sysfs: str) -> str | None:
    try:
        return os.readlink(f"{sysfs}/dev/char/{device.major}:{device.minor}")
    except OSError:
        return None


# --- the annotation ---


def parse(text: str) -> "tuple[tuple[Wish, ...], Same | None]":
    """`REQUEST; REQUEST; same=node`: what is wanted, and what the devices of all requests have in common.

    Raises InvalidArgument, naming the word that is wrong.
    """
    from vfio.ledger.demand import Same

    wishes: list[Wish] = []
    together: Same | None = None
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if len(parts) > MOST_REQUESTS:
        raise _wrong(f"more than {MOST_REQUESTS} requests")
    for part in parts:
        words = [word.strip() for word in part.split(",")]
        if len(words) == 1 and words[0].startswith("same=") and len(parts) > 1:
            together = _same(words[0].removeprefix("same="))
        else:
            wishes.append(_wish(words))
    if not wishes:
        raise _wrong("no device is asked for")
    return tuple(wishes), together


def _wish(words: list[str]) -> Wish:
    from vfio.address import PciAddress
    from vfio.ledger.demand import MOST_DEVICES, Request

    try:
        addresses = [PciAddress.parse(word) for word in words if "=" not in word]
    except InvalidArgument as error:
        raise _wrong(error.brief) from None
    given: dict[str, str] = {}
    ips: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if name == "ip" and equals:
            ips.append(_ip(value))
            continue
        if equals and (name in given or name not in _NAMES or not value):
            raise _wrong(f"{word[:80]!r}")
        if equals:
            given[name] = value
    if beyond := given.keys() - {"path", "interface"} if addresses else ():
        raise _wrong(f"{sorted(beyond)[0]}= beside addresses")
    if len(set(addresses)) != len(addresses):
        raise _wrong("an address twice")
    count = _number(given.get("count", "1"), 10, MOST_DEVICES)
    path = given.get("path", "")
    if path and (not path.startswith("/") or "\0" in path or (len(addresses) or count) != 1):
        raise _wrong(f"path={path[:80]}: an absolute path, of one device")
    interface = given.get("interface", "")
    if (interface or ips) and ((len(addresses) or count) != 1 or given.get("kind", "nic") != "nic"):
        raise _wrong("interface= and ip= are of one network card")
    if interface and not re.fullmatch(_INTERFACE, interface):
        raise _wrong(f"interface={interface[:80]}: no name of an interface")
    if addresses:
        request = Request.at(*addresses)
        return Wish(request=request, path=path, interface=interface, ips=tuple(ips))
    if not given.keys() & {"kind", "vendor", "device", "model"}:
        raise _wrong("a request says neither an address nor what the device is like")
    request = Request(
        count=count,
        kind=_kind(given["kind"]) if "kind" in given else None,
        vendor=_number(given["vendor"], 16, 0xFFFF) if "vendor" in given else None,
        device=_number(given["device"], 16, 0xFFFF) if "device" in given else None,
        model=given.get("model"),
        same=_same(given["same"]) if "same" in given else None,
        partition=_yes(given.get("partition", "no")),
    )
    return Wish(request=request, path=path, interface=interface, ips=tuple(ips))


_NAMES = ("count", "kind", "vendor", "device", "model", "same", "partition", "path", "interface")
_INTERFACE = r"(?!lo$|casemate)[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}"


def _ip(text: str) -> str:
    from ipaddress import ip_interface

    try:
        found = ip_interface(text)
    except ValueError:
        raise _wrong(f"ip={text[:80]}: no address as 192.0.2.7/24") from None
    return found.with_prefixlen


def _number(text: str, base: int, most: int) -> int:
    digits = text.lower().removeprefix("0x") if base == 16 else text
    allowed = "0123456789abcdef"[:base]
    if not digits or len(digits) > 8 or any(digit not in allowed for digit in digits):
        raise _wrong(f"{text[:80]!r} is not a number")
    if (number := int(digits, base)) > most:
        raise _wrong(f"{text[:80]!r} is more than {most if base == 10 else f'{most:x}'}")
    return number


def _kind(text: str) -> str:
    from vfio.kinds import GIVEN

    if text not in GIVEN:
        raise _wrong(f"kind={text[:80]}: known are {', '.join(GIVEN)}")
    return text


def _same(text: str) -> "Same":
    from vfio.ledger.demand import Same

    try:
        return Same(text)
    except ValueError:
        raise _wrong(f"same={text[:80]}: known are {', '.join(each.value for each in Same)}") from None


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise _wrong(f"partition={text[:80]}: yes or no")
    return text == "yes"


def _wrong(what: str) -> InvalidArgument:
    return InvalidArgument(
        f"annotation {DEVICES}: {what}",
        hint='"0000:3b:00.0", or what it is to be like: "count=2,kind=gpu,vendor=10de"; docs/gpus.md has all',
    )
