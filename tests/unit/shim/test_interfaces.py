"""What a guest is to have of its network namespace, as the kernel's messages tell it. Real ones: tests/vm."""

from __future__ import annotations

import socket
import struct

import pytest

from rpc import netlink
from rpc.netlink import (
    ADDRESS,
    ARPHRD_ETHER,
    IFA_ADDRESS,
    IFA_LOCAL,
    IFF_NOARP,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_IPVLAN_MODE,
    IFLA_LINKINFO,
    IFLA_MTU,
    LINK,
    ROUTE,
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_OIF,
    RTN_UNICAST,
    RTPROT_STATIC,
    Netlink,
    attribute,
    nested,
)
from shim import interfaces
from shim.interfaces import Link, View

MAC = bytes.fromhex("020000000077")
ADDRESS_OF = socket.inet_aton("10.77.0.2")
L2, L3, L3S = 0, 1, 2


class Answers(Netlink):
    """A kernel that has one interface of an address and a route by it."""

    def __init__(self, link: bytes) -> None:
        super().__init__()
        self._bodies = {
            netlink.RTM_GETLINK: [link],
            netlink.RTM_GETADDR: [
                ADDRESS.pack(socket.AF_INET, 24, 0, 0, 7)
                + attribute(IFA_ADDRESS, ADDRESS_OF)
                + attribute(IFA_LOCAL, ADDRESS_OF)
            ],
        }

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        if kind == netlink.RTM_GETROUTE and body[0] == socket.AF_INET:
            route = ROUTE.pack(socket.AF_INET, 24, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST, 0)
            return [route + attribute(RTA_DST, socket.inet_aton("10.78.0.0")) + attribute(RTA_OIF, 7)]
        return self._bodies.get(kind, [])


def seen(about: bytes, flags: int = IFF_UP) -> View:
    """Of an interface of these further attributes."""
    body = LINK.pack(0, ARPHRD_ETHER, 7, flags, 0) + attribute(IFLA_IFNAME, "eth0")
    with Answers(body + attribute(IFLA_ADDRESS, MAC) + attribute(IFLA_MTU, 1400) + about) as asking:
        return interfaces.read(asking)


def of_kind(name: str, data: bytes = b"") -> bytes:
    return nested(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, name), nested(IFLA_INFO_DATA, data))


def ipvlan(mode: int) -> bytes:
    return of_kind("ipvlan", attribute(IFLA_IPVLAN_MODE, struct.pack("=H", mode)))


@pytest.mark.parametrize("kind", ["veth", "macvlan", "macvtap", ""])
def test_an_interface_has_a_kind_unless_it_is_a_card(kind: str) -> None:
    view = seen(of_kind(kind) if kind else b"")
    assert view.links == {"eth0": Link(7, "eth0", MAC, 1400, kind)}
    assert [interface.asks_nobody for interface in view.request.interfaces] == [False]
    assert len(view.request.routes) == 1
    assert (view.impossible, view.left_out) == ([], [])


def test_an_ipvlan_of_mode_l2_is_as_a_macvlan() -> None:
    view = seen(ipvlan(L2))
    assert view.links["eth0"] == Link(7, "eth0", MAC, 1400, "ipvlan")
    assert view.impossible == []


def test_an_interface_that_asks_for_no_neighbours_is_so_in_the_guest() -> None:
    view = seen(ipvlan(L3), IFF_UP | IFF_NOARP)
    assert view.links["eth0"] == Link(7, "eth0", MAC, 1400, "ipvlan", asks_nobody=True)
    assert [interface.asks_nobody for interface in view.request.interfaces] == [True]
    assert view.impossible == []


def test_an_ipvlan_of_mode_l3s_is_impossible_and_named() -> None:
    view = seen(ipvlan(L3S), IFF_UP | IFF_NOARP)
    assert view.impossible == ["interface eth0 is an ipvlan of mode l3s"]
    assert view.links == {}
    assert view.request.interfaces == []
    assert seen(ipvlan(L3S), flags=0).impossible == [], "it is down, and of no use to anybody"


def test_details_that_are_cut_off_are_an_error() -> None:
    with pytest.raises(ValueError, match="netlink attribute"):
        seen(attribute(IFLA_LINKINFO, struct.pack("=HH", 9, 1)))
