"""What a pod's network namespace has that its guest is to have too, read from the kernel.

Nothing is changed here. It must not know how packets get to the guest.
"""

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from rpc import netlink
from rpc.api import agent as api
from rpc.netlink import Netlink, attributes_of, number, text

TAP_PREFIX = "casemate"
"""Of the names of our own interfaces in a pod's namespace."""

# linux/if.h, if_arp.h, if_link.h, if_addr.h, rtnetlink.h, neighbour.h
_UP, _LOOPBACK = 0x1, 0x8
_ETHERNET = 1
_IFLA_ADDRESS, _IFLA_NAME, _IFLA_MTU, _IFLA_MASTER = 1, 3, 4, 10
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_TENTATIVE_FAILED, NO_PREFIX_ROUTE = 0x08, 0x200
_RTA_DESTINATION, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_SOURCE = 1, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 8, 9, 15, 18
_MAIN_TABLE, _BY_KERNEL = 254, 2
_UNICAST, _REFUSING = 1, (6, 7, 8)  # blackhole, unreachable, prohibit
_CLONED, _ONLINK = 0x200, 0x4
_PERMANENT = 0x80
_NDA_DESTINATION, _NDA_MAC = 1, 2

_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")
_HOP = struct.Struct("=HBBi")
_NEIGHBOUR = struct.Struct("=B3xiHBB")


@dataclass(frozen=True, slots=True)
class Link:
    """An interface of the namespace."""

    index: int
    name: str
    mac: bytes
    mtu: int

    def same_device(self, other: "Link") -> bool:
        return (self.index, self.mac) == (other.index, other.mac)


@dataclass(slots=True)
class View:
    """links: those that the guest is to have, by name. taken: the interfaces of ours that are there already.
    left_out: a line for each thing that no guest gets."""

    links: dict[str, Link] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    request: api.NetworkRequest = field(default_factory=api.NetworkRequest)


def read(asking: Netlink) -> View:
    """What there is now, in an order that is the same as long as nothing changes. Raises OSError."""
    view = View()
    names = _read_links(asking, view)
    if view.links or _LO in names.values():
        _read_addresses(asking, view, names)
    if view.links:
        _read_routes(asking, view, names)
        _read_neighbours(asking, view, names)
    return view


_LO = "lo"


def _read_links(asking: Netlink, view: View) -> dict[int, str]:
    """The names of what the guest is to have, by index."""
    names: dict[int, str] = {}
    for body in asking.dump(netlink.RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, kind, index, flags, _ = _LINK.unpack_from(body)
        about = attributes_of(body[_LINK.size :])
        name = text(about[_IFLA_NAME])
        if name.startswith(TAP_PREFIX):
            view.taken[name] = index
        elif flags & _LOOPBACK:
            names[index] = name
        elif not flags & _UP or _IFLA_MASTER in about:
            continue  # of no use to anybody, or a part of another one
        elif kind != _ETHERNET:
            view.left_out.append(f"interface {name} is no Ethernet")
        else:
            names[index] = name
            view.links[name] = Link(index, name, about[_IFLA_ADDRESS], number(about[_IFLA_MTU]))
    return names


def _read_addresses(asking: Netlink, view: View, names: Mapping[int, str]) -> None:
    found: dict[str, list[api.Address]] = {name: [] for name in names.values()}
    for body in asking.dump(netlink.RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, prefix, flags, scope, index = _ADDRESS.unpack_from(body)
        about = attributes_of(body[_ADDRESS.size :])
        flags = number(about[_IFA_FLAGS]) if _IFA_FLAGS in about else flags
        if index not in names or flags & _TENTATIVE_FAILED:
            continue
        peer = about.get(_IFA_ADDRESS, b"")
        local = about.get(_IFA_LOCAL, peer)
        if names[index] == _LO and _every_loopback_has(local):
            continue
        found[names[index]].append(
            api.Address(
                local=local,
                prefix=prefix,
                peer=b"" if peer == local else peer,
                broadcast=about.get(_IFA_BROADCAST, b""),
                scope=scope,
                prefix_route=not flags & NO_PREFIX_ROUTE,
            )
        )
    for name, addresses in found.items():
        link = view.links.get(name)
        if link is not None:
            entry = api.Interface(name=name, mac=link.mac, mtu=link.mtu, addresses=addresses)
            view.request.interfaces.append(entry)
        elif addresses:
            view.request.interfaces.append(api.Interface(name=name, addresses=addresses))


def _every_loopback_has(address: bytes) -> bool:
    return address in (b"\x7f\0\0\1", bytes(15) + b"\1")


def _read_routes(asking: Netlink, view: View, names: Mapping[int, str]) -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        for body in asking.dump(netlink.RTM_GETROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            _, prefix, _, _, table, protocol, scope, kind, flags = _ROUTE.unpack_from(body)
            content = body[_ROUTE.size :]
            about = attributes_of(content)
            table = number(about[_RTA_TABLE]) if _RTA_TABLE in about else table
            if protocol == _BY_KERNEL or flags & _CLONED or kind not in (_UNICAST, *_REFUSING):
                continue  # comes with an address or an interface
            if table != _MAIN_TABLE:
                view.left_out.append(f"a route of table {table}: a guest has the main table alone")
                continue
            hops = _hops(about, flags, names) if kind == _UNICAST else []
            if hops is None:
                view.left_out.append("a route by an interface that the guest has not")
                continue
            view.request.routes.append(
                api.Route(
                    ipv6=family == socket.AF_INET6,
                    destination=about.get(_RTA_DESTINATION, b""),
                    prefix=prefix,
                    kind=kind,
                    scope=scope,
                    priority=number(about[_RTA_PRIORITY]) if _RTA_PRIORITY in about else 0,
                    source=about.get(_RTA_SOURCE, b""),
                    hops=hops,
                    metrics=about.get(_RTA_METRICS, b""),
                )
            )


def _hops(about: "netlink.Attributes", flags: int, names: Mapping[int, str]) -> list[api.Hop] | None:
    """None: one goes by an interface that the guest has not."""
    hops = []
    if _RTA_MULTIPATH in about:
        data = about[_RTA_MULTIPATH]
        while len(data) >= _HOP.size:
            length, hop_flags, weight, index = _HOP.unpack_from(data)
            hops.append((attributes_of(data[_HOP.size : length]), hop_flags, weight + 1, index))
            data = data[length + -length % 4 :]
    elif _RTA_OIF in about:
        hops.append((about, flags, 1, number(about[_RTA_OIF])))
    if not hops or any(index not in names for *_, index in hops):
        return None
    return [
        api.Hop(
            # RTA_VIA: two bytes of family, and the address.
            gateway=each.get(_RTA_GATEWAY, each.get(_RTA_VIA, b"")[2:]),
            interface=names[index],
            onlink=bool(hop_flags & _ONLINK),
            weight=weight,
        )
        for each, hop_flags, weight, index in hops
    ]


def _read_neighbours(asking: Netlink, view: View, names: Mapping[int, str]) -> None:
    for body in asking.dump(netlink.RTM_GETNEIGH, _NEIGHBOUR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, index, state, _, _ = _NEIGHBOUR.unpack_from(body)
        about = attributes_of(body[_NEIGHBOUR.size :])
        if index in names and names[index] in view.links and state & _PERMANENT and _NDA_MAC in about:
            entry = api.Neighbour(
                interface=names[index], address=about[_NDA_DESTINATION], mac=about[_NDA_MAC]
            )
            view.request.neighbours.append(entry)


def index_of(asking: Netlink, name: str) -> int:
    """Raises OSError if there is none of this name."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    for found in asking.dump(netlink.RTM_GETLINK, body):
        if text(attributes_of(found[_LINK.size :])[_IFLA_NAME]) == name:
            return int(_LINK.unpack_from(found)[2])
    raise FileNotFoundError(2, "there is no interface", name)
