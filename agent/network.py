"""The guest's network as the pod's is: interfaces found by their ports, named, given addresses and routes.

Asked again, it changes what differs from what it was asked for before; what containers did themselves stays.
Knows netlink; must not know what a container is.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import socket
import struct
from contextlib import ExitStack, nullcontext
from itertools import count

from agent import boot
from rpc import netlink
from rpc.api import agent as api
from rpc.errors import DeadlineExceeded, FailedPrecondition
from rpc.netlink import (
    ADDRESS,
    ARPHRD_ETHER,
    HOP,
    IFA_ADDRESS,
    IFA_BROADCAST,
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFA_FLAGS,
    IFA_LOCAL,
    IFF_NOARP,
    IFF_UP,
    IFLA_IFNAME,
    IFLA_MTU,
    IFLA_NET_NS_FD,
    IFLA_PARENT_DEV_NAME,
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
    RTA_VIA,
    RTNH_F_ONLINK,
    RTPROT_STATIC,
    Netlink,
    attribute,
    attributes_of,
    nested,
    text,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from agent.users import Users

DEVICE_S = 10.0  # from QEMU's word that a device is plugged in to the guest's interface
DRIVER = "net"
DEVICES = "/sys/bus/virtio/devices"
_BEHIND_PORT = re.compile(r"/pci0000:00/0000:00:([0-9a-f]{2}\.[0-7])/[^/]+/virtio[0-9]+$")
"""Of the directory of a device that has an interface. Those that a container makes are no device's."""
_log = logging.getLogger("casemate.agent")

_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL)


class Network:
    """One per guest. users: those whom it belongs to, where they are the pod's own."""

    def __init__(self, users: Users | None = None) -> None:
        self._users = users
        self._asked: api.NetworkRequest | None = None
        self._settled = True
        self._applied: dict[tuple[int, bytes], None] = {}
        self._ipv6: dict[int, bool] = {}
        self._lock = asyncio.Lock()

    async def apply(self, request: api.NetworkRequest) -> None:
        """Raises FailedPrecondition with the kernel's words, DeadlineExceeded if a device does not appear."""
        # A host that waited too long for one asks again while it runs.
        async with self._lock:
            self._asked = request
            await self._settle(request)

    async def move(self, enter: Callable[[], Users]) -> None:
        """enter: takes the agent to the network namespace of the pod's own users, who are what it returns.
        There is then what was asked for until now. Raises as apply(), and as enter."""
        async with self._lock:  # who waits for a device does so where devices came when that began
            users = enter()
            if users is not self._users:
                # What an interface has stays behind when it moves.
                self._users, self._applied, self._ipv6, self._settled = users, {}, {}, False
            if self._asked is not None and not self._settled:
                await self._settle(self._asked)

    async def _settle(self, request: api.NetworkRequest) -> None:
        self._settled = False
        await self._apply(request)
        self._settled = True

    async def _apply(self, request: api.NetworkRequest) -> None:
        indices = {"lo": socket.if_nametoindex("lo")}
        wanted = {interface.port: interface for interface in request.interfaces if interface.port}
        if wanted:
            boot.load_feature(DRIVER)
            await self._bring(set(wanted))
        with Netlink() as asking:
            _name(asking, wanted)
            ipv6 = {}
            for port, (index, _) in _by_port(asking).items():
                if port in wanted:
                    indices[wanted[port].name] = index
                    _bring_up(asking, wanted[port], index, self._ipv6.get(index))
                    ipv6[index] = _has_ipv6(wanted[port])
            self._ipv6 = ipv6
            self._replace(asking, _entries(request, indices))

    async def _bring(self, ports: set[str]) -> None:
        """Until there is an interface behind each, here: devices come to the machine's first namespace."""
        if self._users is None:
            await _wait_for(ports, nullcontext)
            return
        if not (missing := ports - _present()):
            return
        await _wait_for(missing, self._users.where_devices_come)
        with self._users.where_devices_come(), Netlink() as asking:
            for port, (index, _) in _by_port(asking).items():
                if port in missing:
                    _move(asking, index, self._users, f"casemate{port}")  # a name that nobody has there

    def _replace(self, asking: Netlink, entries: dict[tuple[int, bytes], None]) -> None:
        for kind, body in reversed(self._applied):
            if (kind, body) not in entries:
                try:
                    asking.ask(kind + 1, body)  # RTM_DEL... follows RTM_NEW...
                except OSError as error:
                    if error.errno not in _GONE:
                        _log.warning("an address or route that is wanted no more stays: %s", error)
        for kind, body in entries:
            if (kind, body) not in self._applied:
                _ask(asking, kind, body, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE, _WHAT[kind])
        self._applied = entries


_WHAT = {
    netlink.RTM_NEWADDR: "an address",
    netlink.RTM_NEWROUTE: "a route",
    netlink.RTM_NEWNEIGH: "a neighbour",
}


def _ask(asking: Netlink, kind: int, body: bytes, flags: int, what: str) -> None:
    try:
        asking.ask(kind, body, flags)
    except OSError as error:
        raise FailedPrecondition(f"the guest's kernel does not take {what}", error.strerror) from error


async def _wait_for(ports: set[str], there: Callable[[], AbstractContextManager[None]]) -> None:
    """Until there is an interface behind each, told by the kernel. there: the namespace where they come."""
    loop = asyncio.get_running_loop()
    missing = ports
    with ExitStack() as undo:
        with there():
            changes = undo.enter_context(Netlink(netlink.RTMGRP_LINK))
        changed = asyncio.Event()
        loop.add_reader(changes.fileno(), changed.set)
        try:
            async with asyncio.timeout(DEVICE_S):
                while missing := ports - _present(there):
                    await changed.wait()
                    changed.clear()
                    changes.forget_changes()
        except TimeoutError:
            names = ", ".join(sorted(missing))
            raise DeadlineExceeded(f"no network device at {names} appeared within {DEVICE_S:g} s") from None
        finally:
            loop.remove_reader(changes.fileno())


def set_up_card(name: str, wanted: api.PciDevice) -> str:
    """An interface of a network card that the machine was given: named as it is wanted, or nicN, up, with its
    addresses. The pod's other interfaces may have any other name. Returns its own. Raises FailedPrecondition.
    """
    title = wanted.interface or _free_name()
    with Netlink() as asking:
        _rename(asking, socket.if_nametoindex(name), title)
        _raise_card(asking, title, wanted)
    return title


def move_card(title: str, wanted: api.PciDevice, users: Users) -> None:
    """From the machine's first namespace to the pod's, where we are: a move takes all but its name away."""
    with users.where_devices_come(), Netlink() as asking:
        _move(asking, socket.if_nametoindex(title), users, title)
    with Netlink() as asking:
        _raise_card(asking, title, wanted)


def _raise_card(asking: Netlink, title: str, wanted: api.PciDevice) -> None:
    index = socket.if_nametoindex(title)
    body = LINK.pack(0, 0, index, IFF_UP, IFF_UP)
    _ask(asking, netlink.RTM_SETLINK, body, 0, f"that {title} is up")
    for address in wanted.addresses:
        flags = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
        _ask(asking, netlink.RTM_NEWADDR, _address(address, index), flags, f"an address of {title}")


def _move(asking: Netlink, index: int, users: Users, name: str) -> None:
    body = LINK.pack(0, 0, index, 0, 0) + attribute(IFLA_NET_NS_FD, users.net) + attribute(IFLA_IFNAME, name)
    _ask(asking, netlink.RTM_SETLINK, body, 0, f"where the interface {name} is to be")


def _free_name() -> str:
    taken = {name for _, name in socket.if_nameindex()}
    return next(name for number in count() if (name := f"nic{number}") not in taken)


def _present(there: Callable[[], AbstractContextManager[None]] = nullcontext) -> set[str]:
    with there(), Netlink() as asking:
        return set(_by_port(asking))


def _by_port(asking: Netlink) -> dict[str, tuple[int, str]]:
    """The index and the name of the interface behind each port that has one."""
    found = {}
    for body in asking.dump(netlink.RTM_GETLINK, LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, kind, index, _, _ = LINK.unpack_from(body)
        if kind == ARPHRD_ETHER:
            attributes = attributes_of(body[LINK.size :])
            if port := _port_of(text(attributes.get(IFLA_PARENT_DEV_NAME, b""))):
                found[port] = index, text(attributes[IFLA_IFNAME])
    return found


def _port_of(device: str) -> str | None:
    """None for "", or what else is no virtio device of the machine's, or has gone meanwhile."""
    try:
        behind = _BEHIND_PORT.search(os.readlink(f"{DEVICES}/{device}"))
    except OSError:  # it has gone, or is the directory itself
        return None
    return behind and behind[1]


def _name(asking: Netlink, wanted: dict[str, api.Interface]) -> None:
    """Those whose names are other's get one that nobody has first."""
    renamed = []
    for port, (index, name) in _by_port(asking).items():
        interface = wanted.get(port)
        if interface is not None and name != interface.name:
            _rename(asking, index, f"casemate{index}")
            renamed.append((index, interface.name))
    for index, name in renamed:
        _rename(asking, index, name)


def _rename(asking: Netlink, index: int, name: str) -> None:
    body = LINK.pack(0, 0, index, 0, IFF_UP) + attribute(IFLA_IFNAME, name)  # which takes one that is down
    _ask(asking, netlink.RTM_SETLINK, body, 0, f"the interface's name {name}")


def _has_ipv6(interface: api.Interface) -> bool:
    return any(len(each.local) == 16 for each in interface.addresses)


def _bring_up(asking: Netlink, interface: api.Interface, index: int, had_ipv6: bool | None) -> None:
    """had_ipv6: None for an interface that is new."""
    has_ipv6 = _has_ipv6(interface)
    if has_ipv6 is not had_ipv6:
        # No router of the pod's network adds anything to what the host has decided.
        _set_ipv6(interface.name, "accept_ra", 0, wanted=has_ipv6)
        if has_ipv6:
            # The pod's own link-local address is among those that are asked for, or there is to be none.
            body = netlink.addresses_by_hand(index)
            _ask(asking, netlink.RTM_SETLINK, body, 0, f"how {interface.name} makes its addresses")
        _set_ipv6(interface.name, "disable_ipv6", int(not has_ipv6), wanted=has_ipv6)
    flags = IFF_UP | (IFF_NOARP if interface.asks_nobody else 0)
    body = LINK.pack(0, 0, index, flags, IFF_UP | IFF_NOARP) + attribute(IFLA_MTU, interface.mtu)
    _ask(asking, netlink.RTM_SETLINK, body, 0, f"an MTU of {interface.mtu} for {interface.name}")


def _set_ipv6(name: str, parameter: str, value: int, *, wanted: bool) -> None:
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/{parameter}", "w") as file:
            file.write(str(value))
    except FileNotFoundError:
        if wanted:
            raise FailedPrecondition(f"{name} is to have an IPv6 address: the guest has no IPv6") from None


def _entries(request: api.NetworkRequest, indices: dict[str, int]) -> dict[tuple[int, bytes], None]:
    """(RTM_NEW..., body) of all there is to be, what others need first."""
    entries: dict[tuple[int, bytes], None] = {}
    for interface in request.interfaces:
        for address in interface.addresses:
            entries[netlink.RTM_NEWADDR, _address(address, indices[interface.name])] = None
    for route in sorted(request.routes, key=_needs_others):
        entries[netlink.RTM_NEWROUTE, _route(route, indices)] = None
    for neighbour in request.neighbours:
        entries[netlink.RTM_NEWNEIGH, _neighbour(neighbour, indices)] = None
    return entries


def _needs_others(route: api.Route) -> bool:
    """A gateway has to be reachable when its route is made."""
    return any(hop.gateway and not hop.onlink for hop in route.hops)


def _address(address: api.Address, index: int) -> bytes:
    ipv6 = len(address.local) == 16
    # The pod's interface has it already, and would answer to the question whether anybody has.
    flags = (IFA_F_NODAD if ipv6 else 0) | (0 if address.prefix_route else IFA_F_NOPREFIXROUTE)
    body = ADDRESS.pack(_family(ipv6), address.prefix, 0, address.scope, index)
    body += attribute(IFA_LOCAL, address.local) + attribute(IFA_ADDRESS, address.peer or address.local)
    if address.broadcast:
        body += attribute(IFA_BROADCAST, address.broadcast)
    return body + attribute(IFA_FLAGS, flags)


def _route(route: api.Route, indices: dict[str, int]) -> bytes:
    hops = route.hops
    flags = RTNH_F_ONLINK if len(hops) == 1 and hops[0].onlink else 0
    body = ROUTE.pack(
        _family(route.ipv6), route.prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, route.scope, route.kind, flags
    )
    for kind, content in ((RTA_DST, route.destination), (RTA_PREFSRC, route.source)):
        if content:
            body += attribute(kind, content)
    if route.priority:
        body += attribute(RTA_PRIORITY, route.priority)
    if route.metrics:
        body += nested(RTA_METRICS, route.metrics)
    if len(hops) == 1:
        body += attribute(RTA_OIF, indices[hops[0].interface]) + _gateway(route, hops[0])
    elif hops:
        body += nested(RTA_MULTIPATH, *(_hop(route, hop, indices) for hop in hops))
    return body


def _hop(route: api.Route, hop: api.Hop, indices: dict[str, int]) -> bytes:
    gateway = _gateway(route, hop)
    flags = RTNH_F_ONLINK if hop.onlink else 0
    return HOP.pack(HOP.size + len(gateway), flags, hop.weight - 1, indices[hop.interface]) + gateway


def _gateway(route: api.Route, hop: api.Hop) -> bytes:
    if not hop.gateway:
        return b""
    ipv6 = len(hop.gateway) == 16
    if ipv6 == route.ipv6:
        return attribute(RTA_GATEWAY, hop.gateway)
    return attribute(RTA_VIA, struct.pack("=H", _family(ipv6)) + hop.gateway)


def _neighbour(neighbour: api.Neighbour, indices: dict[str, int]) -> bytes:
    family = _family(len(neighbour.address) == 16)
    body = NEIGHBOUR.pack(family, indices[neighbour.interface], NUD_PERMANENT, 0, 0)
    return body + attribute(NDA_DST, neighbour.address) + attribute(NDA_LLADDR, neighbour.mac)


def _family(ipv6: bool) -> int:
    return socket.AF_INET6 if ipv6 else socket.AF_INET
