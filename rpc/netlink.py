"""Questions to the kernel's networking: netlink messages, their attributes, and a socket that asks.

The shim reads a pod's network namespace with it and directs its packets, the agent makes the guest's
interfaces: neither can afford to import a library for it. The format is netlink(7)'s and rtnetlink(7)'s, the
numbers and their names are linux/'s headers'. It must not know what an interface is for.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self, TypeAlias

    # type -> content; of several of one type the last
    Attributes: TypeAlias = dict[int, bytes]

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWQDISC, RTM_DELQDISC = 36, 37
RTM_NEWTFILTER, RTM_DELTFILTER = 44, 45
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
RTMGRP_LINK, RTMGRP_NEIGH = 0x1, 0x4
RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x10, 0x40
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE = 0x100, 0x400

# Interfaces (linux/if.h, if_arp.h, if_link.h): family, type, index, flags, which of the flags change
LINK = struct.Struct("=BxHiII")
IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
ARPHRD_ETHER = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_AF_SPEC = 1, 3, 4, 10, 26
IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_INFO_DATA = 18, 1, 2
IFLA_IPVLAN_MODE, IPVLAN_MODE_L3S = 1, 2
IFLA_NET_NS_FD, IFLA_PARENT_DEV_NAME = 28, 56  # the latter since Linux 5.14
IFLA_INET_CONF, IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 1, 8, 1
# Addresses (linux/if_addr.h): family, length of the prefix, flags, scope, interface
ADDRESS = struct.Struct("=BBBBi")
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_NOPREFIXROUTE = 0x02, 0x08, 0x200
# Routes (linux/rtnetlink.h): family, lengths of destination and source, TOS, table, protocol, scope, type,
# flags
ROUTE = struct.Struct("=BBBBBBBBI")
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 4, 5, 6, 7
RTA_METRICS, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 8, 9, 15, 18
RT_TABLE_MAIN, RTPROT_KERNEL, RTPROT_STATIC = 254, 2, 4
RTN_UNICAST, RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT = 1, 6, 7, 8
RTNH_F_ONLINK, RTM_F_CLONED = 0x4, 0x200
# One of a route's several hops: length, flags, weight less one, interface
HOP = struct.Struct("=HBBi")
# Neighbours (linux/neighbour.h): family, interface, state, flags, type
NEIGHBOUR = struct.Struct("=B3xiHBB")
NDA_DST, NDA_LLADDR = 1, 2
NUD_PERMANENT = 0x80

_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_DUMP_INTERRUPTED = 0x10
_ERROR, _DONE = 2, 3
_ACK_ATTRIBUTES = 0x200
_EXPLANATION = 1  # NLMSGERR_ATTR_MSG
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_SOL_NETLINK, _EXT_ACK, _CAP_ACK = 270, 11, 10
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_MOST_BYTES = 1 << 20
_DUMPS = 8  # how often a dump is begun anew that was overtaken by a change


def attribute(kind: int, content: bytes | int | str) -> bytes:
    """One attribute, padded. A number is 32 bits of the machine's order, a text ends with a NUL."""
    if isinstance(content, int):
        content = struct.pack("=I", content)
    elif isinstance(content, str):
        content = content.encode() + b"\0"
    length = _ATTRIBUTE.size + len(content)
    return _ATTRIBUTE.pack(length, kind) + content + bytes(-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(attributes))


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, content) in their order. Raises ValueError for what is cut off."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            raise ValueError(f"a netlink attribute of {length} bytes in {len(data)}")
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]


def attributes_of(data: bytes) -> Attributes:
    return dict(each_attribute(data))


def number(content: bytes) -> int:
    return int.from_bytes(content, "little" if _LITTLE else "big")


def text(content: bytes) -> str:
    return content.split(b"\0", 1)[0].decode(errors="replace")


_LITTLE = struct.pack("=H", 1) == b"\1\0"


def addresses_by_hand(index: int) -> bytes:
    """What RTM_SETLINK takes so that an interface makes itself no IPv6 address."""
    mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes((IN6_ADDR_GEN_MODE_NONE,)))
    return LINK.pack(0, 0, index, 0, 0) + nested(IFLA_AF_SPEC, nested(socket.AF_INET6, mode))


class Netlink:
    """A socket in the network namespace of the thread that makes it, and so for all its life.

    groups: RTMGRP_... whose changes are told; such a socket is for listening alone.
    """

    def __init__(self, groups: int = 0) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._sequence = 0
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.bind((0, groups))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Has the kernel do something. Raises OSError with the kernel's own words, where it has any."""
        self._send(kind, body, _REQUEST | _ACK | flags)
        for _ in self._answers():
            pass

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """What there is of a kind (RTM_GET...), a message's body each. Raises OSError."""
        for _ in range(_DUMPS):
            self._send(kind, body, _REQUEST | _DUMP)
            found, whole = [], True
            for flags, content in self._answers():
                found.append(content)
                whole = whole and not flags & _DUMP_INTERRUPTED
            if whole:
                return found
        raise BlockingIOError("the network changes faster than it can be read")

    def forget_changes(self) -> None:
        """Of a listening socket: takes what was told, and that something was lost, which was a change too."""
        while True:
            try:
                self._socket.recv(_MOST_BYTES, socket.MSG_DONTWAIT | socket.MSG_TRUNC)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._sequence += 1
        message = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body
        self._socket.sendto(message, (0, 0))

    def _answers(self) -> Iterator[tuple[int, bytes]]:
        """(flags, body) of each message until the last. Raises what the kernel says went wrong."""
        while True:
            data = self._socket.recv(_MOST_BYTES)
            while data:
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data)
                body, data = data[_HEADER.size : length], data[length + -length % 4 :]
                if sequence != self._sequence:
                    continue  # of a question that was given up
                if kind in (_ERROR, _DONE):
                    _raise_error(flags, body)
                    return
                yield flags, body


def _raise_error(flags: int, body: bytes) -> None:
    (code,) = struct.unpack_from("=i", body) if len(body) >= 4 else (0,)
    if code == 0:
        return
    words = ""
    if flags & _ACK_ATTRIBUTES:
        # What was asked comes back before the attributes: its header alone, as the socket is set to.
        words = text(attributes_of(body[4 + _HEADER.size :]).get(_EXPLANATION, b""))
    raise OSError(-code, f"{os.strerror(-code)} ({words})" if words else os.strerror(-code))
