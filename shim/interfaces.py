"""What a pod's network namespace has that its guest is to have too, read from the kernel.

Nothing is changed here. It must not know how packets get to the guest.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from rpc import netlink
from rpc.api import agent as api
from rpc.netlink import (
    ADDRESS,
    ARPHRD_ETHER,
    HOP,
    IFA_ADDRESS,
    IFA_BROADCAST,
    IFA_F_DADFAILED,
    IFA_F_NOPREFIXROUTE,
    IFA_FLAGS,
    IFA_LOCAL,
    IFF_LOOPBACK,
    IFF_NOARP,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_IPVLAN_MODE,
    IFLA_LINKINFO,
    IFLA_MASTER,
    IFLA_MTU,
    IPVLAN_MODE_L3S,
    LINK,
    NDA_DST,
    NDA_LLADDR,
    NEIGHBOUR,
    NUD_PERMANENT,
    ROUTE,
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_GATEWAY,
    RTA_METRICS,
    RTA_MULTIPATH,
    RTA_OIF,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTA_TABLE,
    RTA_VIA,
    RTM_F_CLONED,
    RTN_BLACKHOLE,
    RTN_PROHIBIT,
    RTN_UNICAST,
    RTN_UNREACHABLE,
    RTNH_F_ONLINK,
    RTPROT_KERNEL,
    Netlink,
    attributes_of,
    number,
    text,
)

TAP_PREFIX = "casemate"
"""Of the names of our own interfaces in a pod's namespace."""

_REFUSING = (RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT)


@dataclass(frozen=True, slots=True)
class Link:
    """An interface of the namespace. kind: as in `ip link add type KIND`, "" for a card."""

    index: int
    name: str
    mac: bytes
    mtu: int
    kind: str = ""
    asks_nobody: bool = False

    def same_device(self, other: "Link") -> bool:
        return (self.index, self.mac) == (other.index, other.mac)


@dataclass(slots=True)
class View:
    """links: those that the guest is to have, by name. taken: the interfaces of ours that are there already.
    left_out: a line for each thing that no guest gets. impossible: one for each interface for which a pod
    was meant to be reached and cannot be. request: of the guest, but for its ports."""

    links: dict[str, Link] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
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
    for body in asking.dump(netlink.RTM_GETLINK, LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, kind, index, flags, _ = LINK.unpack_from(body)
        about = attributes_of(body[LINK.size :])
        name = text(about[IFLA_IFNAME])
        if name.startswith(TAP_PREFIX):
            view.taken[name] = index
        elif flags & IFF_LOOPBACK:
            names[index] = name
        elif not flags & IFF_UP or IFLA_MASTER in about:
            continue  # of no use to anybody, or a part of another one
        elif kind != ARPHRD_ETHER:
            view.left_out.append(f"interface {name} is no Ethernet")
        else:
            more = attributes_of(about.get(IFLA_LINKINFO, b""))
            kind_name = text(more.get(IFLA_INFO_KIND, b""))
            if kind_name in ("ipvlan", "ipvtap") and _ipvlan_mode(more) == IPVLAN_MODE_L3S:
                # What comes in is given to the namespace's IP at once, and never to the interface
                # (ipvlan_l3s.c): there is nothing to redirect. l2 and l3 give it to the interface first.
                view.impossible.append(f"interface {name} is an ipvlan of mode l3s")
                continue
            names[index] = name
            mac, mtu = about[IFLA_ADDRESS], number(about[IFLA_MTU])
            view.links[name] = Link(index, name, mac, mtu, kind_name, bool(flags & IFF_NOARP))
    return names


def _ipvlan_mode(more: "netlink.Attributes") -> int:
    """Raises ValueError."""
    return number(attributes_of(more.get(IFLA_INFO_DATA, b"")).get(IFLA_IPVLAN_MODE, b""))


def _read_addresses(asking: Netlink, view: View, names: Mapping[int, str]) -> None:
    found: dict[str, list[api.Address]] = {name: [] for name in names.values()}
    for body in asking.dump(netlink.RTM_GETADDR, ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, prefix, flags, scope, index = ADDRESS.unpack_from(body)
        about = attributes_of(body[ADDRESS.size :])
        flags = number(about[IFA_FLAGS]) if IFA_FLAGS in about else flags
        if index not in names or flags & IFA_F_DADFAILED:
            continue
        peer = about.get(IFA_ADDRESS, b"")
        local = about.get(IFA_LOCAL, peer)
        if names[index] == _LO and _every_loopback_has(local):
            continue
        found[names[index]].append(
            api.Address(
                local=local,
                prefix=prefix,
                peer=b"" if peer == local else peer,
                broadcast=about.get(IFA_BROADCAST, b""),
                scope=scope,
                prefix_route=not flags & IFA_F_NOPREFIXROUTE,
            )
        )
    for name, addresses in found.items():
        link = view.links.get(name)
        if link is not None:
            interface = api.Interface(
                name=name, mtu=link.mtu, addresses=addresses, asks_nobody=link.asks_nobody
            )
            view.request.interfaces.append(interface)
        elif addresses:
            view.request.interfaces.append(api.Interface(name=name, addresses=addresses))


def _every_loopback_has(address: bytes) -> bool:
    return address in (b"\x7f\0\0\1", bytes(15) + b"\1")


def _read_routes(asking: Netlink, view: View, names: Mapping[int, str]) -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        for body in asking.dump(netlink.RTM_GETROUTE, ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            _, prefix, _, _, table, protocol, scope, kind, flags = ROUTE.unpack_from(body)
            content = body[ROUTE.size :]
            about = attributes_of(content)
            table = number(about[RTA_TABLE]) if RTA_TABLE in about else table
            if protocol == RTPROT_KERNEL or flags & RTM_F_CLONED or kind not in (RTN_UNICAST, *_REFUSING):
                continue  # comes with an address or an interface
            if table != RT_TABLE_MAIN:
                view.left_out.append(f"a route of table {table}: a guest has the main table alone")
                continue
            hops = _hops(about, flags, names) if kind == RTN_UNICAST else []
            if hops is None:
                view.left_out.append("a route by an interface that the guest has not")
                continue
            view.request.routes.append(
                api.Route(
                    ipv6=family == socket.AF_INET6,
                    destination=about.get(RTA_DST, b""),
                    prefix=prefix,
                    kind=kind,
                    scope=scope,
                    priority=number(about[RTA_PRIORITY]) if RTA_PRIORITY in about else 0,
                    source=about.get(RTA_PREFSRC, b""),
                    hops=hops,
                    metrics=about.get(RTA_METRICS, b""),
                )
            )


def _hops(about: "netlink.Attributes", flags: int, names: Mapping[int, str]) -> list[api.Hop] | None:
    """None: one goes by an interface that the guest has not."""
    hops = []
    if RTA_MULTIPATH in about:
        data = about[RTA_MULTIPATH]
        while len(data) >= HOP.size:
            length, hop_flags, weight, index = HOP.unpack_from(data)
            hops.append((attributes_of(data[HOP.size : length]), hop_flags, weight + 1, index))
            data = data[length + -length % 4 :]
    elif RTA_OIF in about:
        hops.append((about, flags, 1, number(about[RTA_OIF])))
    if not hops or any(index not in names for *_, index in hops):
        return None
    return [
        api.Hop(
            # RTA_VIA: two bytes of family, and the address.
            gateway=each.get(RTA_GATEWAY, each.get(RTA_VIA, b"")[2:]),
            interface=names[index],
            onlink=bool(hop_flags & RTNH_F_ONLINK),
            weight=weight,
        )
        for each, hop_flags, weight, index in hops
    ]


def _read_neighbours(asking: Netlink, view: View, names: Mapping[int, str]) -> None:
    for body in asking.dump(netlink.RTM_GETNEIGH, NEIGHBOUR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, index, state, _, _ = NEIGHBOUR.unpack_from(body)
        about = attributes_of(body[NEIGHBOUR.size :])
        if index in names and names[index] in view.links and state & NUD_PERMANENT and NDA_LLADDR in about:
            entry = api.Neighbour(interface=names[index], address=about[NDA_DST], mac=about[NDA_LLADDR])
            view.request.neighbours.append(entry)


def index_of(asking: Netlink, name: str) -> int:
    """Raises OSError if there is none of this name."""
    body = LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    for found in asking.dump(netlink.RTM_GETLINK, body):
        if text(attributes_of(found[LINK.size :])[IFLA_IFNAME]) == name:
            return int(LINK.unpack_from(found)[2])
    raise FileNotFoundError(2, "there is no interface", name)
