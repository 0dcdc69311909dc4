"""Two interfaces that are one: what comes in at either goes out at the other (tc-mirred(8)).

The pod's interface keeps its addresses, so that who looks from the host sees them, and its namespace's own
stack gets no packet any more: the guest does. It must not know what a guest is.
"""

import errno
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from rpc import netlink
from rpc.netlink import Netlink, attribute, nested

# linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h, if_ether.h
_INGRESS, _INGRESS_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_EVERY_PROTOCOL = 0x0003
_PRIORITY = 0xC35E
"""Of our filters, by which they are found again."""
_ANSWERS = ((_PRIORITY - 1, 0x0800), (_PRIORITY - 2, 0x0806))
"""Of those of spare_answers(), with their protocols: IPv4, ARP."""
ASKING_PORTS = (0xFC00, 0xFFFF)
"""From which a namespace's own stack asks name servers where answers are spared. No guest's kernel chooses
one of them by itself (ip-sysctl.rst, ip_local_port_range)."""
_TCA_KIND, _TCA_OPTIONS = 1, 2
_U32_SELECTOR, _U32_ACTION, _U32_TERMINAL = 5, 7, 1
_ACTION_KIND, _ACTION_OPTIONS = 1, 2
_MIRRED_PARAMETERS, _REDIRECT, _MIRROR = 2, 1, 2
_OK, _STOLEN = 0, 4
_GONE = (errno.ENOENT, errno.EINVAL, errno.ENODEV)
"""What the kernel says of filters and queues of an interface that has none, or is none any more."""
_TC = struct.Struct("=B3xiIII")
_Keys = Sequence[tuple[int, int, int]]
# A key of no bits, which everything matches. Not every kernel has cls_matchall, which would say it better.
_EVERYTHING = ((0, 0, 0),)
# linux/ip.h, IPV4_DEVCONF_...; what they do: ip-sysctl.rst. FORWARDING, RP_FILTER (strict), ARP_IGNORE (all).
_DEAF = ((1, 0), (8, 1), (19, 8))
_NAME_PORT, _UDP, _TCP, _ARP_ANSWER = 53, 17, 6, 2


def join(asking: Netlink, one: int, other: int, mac: bytes) -> bool:
    """By their indices. Of what comes in at `other`, only what has this MAC for its source goes out at `one`.
    Filters of ours from before are replaced. Whether `one` had no ingress queue before, and so is to have
    none after part(). Raises OSError."""
    made = _make_ingress(asking, one)
    _redirect(asking, one, other, _EVERYTHING)
    _make_ingress(asking, other)
    _redirect(asking, other, one, _sent_by(mac))
    return made


def spare_answers(asking: Netlink, one: int, other: int) -> None:
    """Of two that are joined: name servers' answers to ASKING_PORTS that come in at `one` stay with its
    namespace, and the answers by which it finds its neighbours go to both. Raises OSError.

    For a server within the namespace that asks others. IPv4 alone.
    """
    (ip, ip_protocol), (arp, arp_protocol) = _ANSWERS
    first, last = ASKING_PORTS
    for protocol in (_UDP, _TCP):
        keys = (
            (0x0F000000, 0x05000000, 0),  # a header without options
            (0x00001FFF, 0, 4),  # the first fragment
            (0x00FF0000, protocol << 16, 8),
            (0xFFFF0000 | 0xFFFF & ~(first ^ last), _NAME_PORT << 16 | first, 20),
        )
        _add_filter(asking, _filter(one, ip, ip_protocol), keys)
    answers = ((0x0000FFFF, _ARP_ANSWER, 4),)
    _add_filter(asking, _filter(one, arp, arp_protocol), answers, _mirred(_MIRROR, _OK, other))


def part(asking: Netlink, index: int, *, wholly: bool) -> None:
    """As if join() had not been, for an interface that may be gone. wholly: what join() returned.

    Raises OSError.
    """
    _drop_filters(asking, index)
    if wholly:
        with _suppressed(_GONE):
            asking.ask(netlink.RTM_DELQDISC, _ingress(index))


def _make_ingress(asking: Netlink, index: int) -> bool:
    """Whether there was none."""
    try:
        asking.ask(netlink.RTM_NEWQDISC, _ingress(index), netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)
    except FileExistsError:
        _drop_filters(asking, index)
        return False
    return True


def _redirect(asking: Netlink, source: int, target: int, keys: _Keys) -> None:
    _add_filter(asking, _filter(source), keys, _mirred(_REDIRECT, _STOLEN, target))


def _sent_by(mac: bytes) -> _Keys:
    """The source's address is followed by the protocol, and that by the network header."""
    first, last = struct.unpack("!IH", mac)
    return ((0xFFFFFFFF, first, -8), (0xFFFF0000, last << 16, -4))


def _mirred(how: int, verdict: int, target: int) -> bytes:
    mirred = struct.pack("=IIiiiiI", 0, 0, verdict, 0, 0, how, target)
    parameters = nested(_ACTION_OPTIONS, attribute(_MIRRED_PARAMETERS, mirred))
    return nested(_U32_ACTION, nested(1, attribute(_ACTION_KIND, "mirred"), parameters))


def _add_filter(asking: Netlink, place: bytes, keys: _Keys, action: bytes = b"") -> None:
    """keys: (mask, value, offset in bytes) that a packet has to match, from its network header on. Without an
    action it goes its way."""
    # Flags, the offset's shift, keys; the mask of the offset, two offsets, the hash's two.
    selector = struct.pack("=BBBxHHHHI", _U32_TERMINAL, 0, len(keys), 0, 0, 0, 0, 0)
    for mask, value, offset in keys:
        selector += struct.pack("!II", mask, value) + struct.pack("=ii", offset, 0)
    options = nested(_TCA_OPTIONS, attribute(_U32_SELECTOR, selector), action)
    body = place + attribute(_TCA_KIND, "u32") + options
    asking.ask(netlink.RTM_NEWTFILTER, body, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)


def be_quiet(asking: Netlink, index: int, mtu: int) -> None:
    """The host's kernel says nothing of its own on this interface, which has this MTU, and of IPv4 takes
    nothing that is not redirected: it forwards none of it, tells nobody an address, and no route leads back
    there. Raises OSError."""
    link = netlink.LINK.pack(0, 0, index, 0, 0)
    deaf = nested(netlink.IFLA_INET_CONF, *(attribute(number, value) for number, value in _DEAF))
    body = attribute(netlink.IFLA_MTU, mtu) + nested(netlink.IFLA_AF_SPEC, nested(socket.AF_INET, deaf))
    asking.ask(netlink.RTM_SETLINK, link + body)
    with _suppressed((errno.EAFNOSUPPORT,)):  # a host without IPv6 is quiet by itself
        asking.ask(netlink.RTM_SETLINK, netlink.addresses_by_hand(index))


def _drop_filters(asking: Netlink, index: int) -> None:
    for priority, protocol in ((_PRIORITY, _EVERY_PROTOCOL), *_ANSWERS):
        with _suppressed(_GONE):
            asking.ask(netlink.RTM_DELTFILTER, _filter(index, priority, protocol))


def _ingress(index: int) -> bytes:
    return _TC.pack(0, index, _INGRESS_HANDLE, _INGRESS, 0) + attribute(_TCA_KIND, "ingress")


def _filter(index: int, priority: int = _PRIORITY, protocol: int = _EVERY_PROTOCOL) -> bytes:
    return _TC.pack(0, index, 0, _INGRESS_HANDLE, priority << 16 | socket.htons(protocol))


@contextmanager
def _suppressed(numbers: Collection[int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
