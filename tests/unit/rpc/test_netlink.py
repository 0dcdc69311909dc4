"""Netlink's format, and the kernel's own answers to questions that anybody may ask."""

import socket
import struct

import pytest

from rpc import netlink
from rpc.netlink import Netlink, attribute, attributes_of, each_attribute, nested, number, text

LINKS = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
NAME = 3


def test_attributes_are_padded_and_found_again() -> None:
    data = attribute(1, b"abc") + attribute(2, "lo") + attribute(3, 7) + nested(4, attribute(1, b""))
    assert len(data) % 4 == 0
    found = attributes_of(data)
    assert found == {1: b"abc", 2: b"lo\0", 3: struct.pack("=I", 7), 4: struct.pack("=HH", 4, 1)}
    assert (text(found[2]), number(found[3])) == ("lo", 7)


def test_the_last_of_several_counts_and_each_is_seen() -> None:
    data = attribute(1, b"a") + attribute(1, b"b")
    assert attributes_of(data) == {1: b"b"}
    assert list(each_attribute(data)) == [(1, b"a"), (1, b"b")]


@pytest.mark.parametrize("data", [struct.pack("=HH", 3, 1), struct.pack("=HH", 9, 1) + b"abcd"])
def test_an_attribute_that_is_cut_off_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="netlink attribute"):
        attributes_of(data)


def test_a_dump_has_every_interface() -> None:
    before = {name for _, name in socket.if_nameindex()}
    with Netlink() as asking:
        names = {text(attributes_of(body[16:])[NAME]) for body in asking.dump(netlink.RTM_GETLINK, LINKS)}
    after = {name for _, name in socket.if_nameindex()}  # this machine's come and go
    assert before & after <= names <= before | after


def test_what_the_kernel_does_not_do_is_an_error_with_its_words() -> None:
    """To root it says more than that it is forbidden."""
    body = struct.pack("=B3xiIII", 0, 1, 0xFFFF0000, 0xFFFFFFF1, 0) + attribute(1, "nonsense")
    with Netlink() as asking:
        with pytest.raises(OSError, match=r"unknown|not permitted"):
            asking.ask(netlink.RTM_NEWQDISC, body, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL)
        assert asking.dump(netlink.RTM_GETLINK, LINKS)  # it can be asked again


def test_there_may_be_no_changes_to_forget() -> None:
    with Netlink(netlink.RTMGRP_LINK) as changes:
        changes.forget_changes()
        assert changes.fileno() >= 0
