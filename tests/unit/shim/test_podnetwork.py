"""What is said of a pod's network that its guest cannot have. Packets are tests/vm's."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import cast

import pytest

from config.settings import Profile
from rpc import netlink
from rpc.api import agent as api
from rpc.codec import Message
from rpc.errors import Unimplemented
from rpc.netlink import ADDRESS, IFA_LOCAL, Netlink, attribute
from shim.interfaces import View
from shim.podnetwork import PodNetwork
from shim.vm.guest import Machine
from tests.unit.shim.networks import in_a_network_of_its_own
from tests.unit.shim.test_domain import DEFAULT

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network")


class Guest:
    """A machine whose agent keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Message] = []

    async def call(self, method: object, request: Message) -> None:
        self.asked.append(request)


class SomeNetwork(PodNetwork):
    """Of this kernel's, which may have no ipvlan, with what another would say of one."""

    def __init__(self, machine: Machine, profile: Profile) -> None:
        super().__init__(machine, profile)
        self.impossible: list[str] = []

    def _read(self) -> View:
        view = super()._read()
        view.impossible += self.impossible
        return view


def test_an_interface_that_no_guest_can_have_is_refused_and_the_rest_is_there() -> None:
    async def scenario() -> None:
        guest = Guest()
        with Netlink() as asking:
            own = ADDRESS.pack(socket.AF_INET, 32, 0, 0, socket.if_nametoindex("lo"))
            own += attribute(IFA_LOCAL, socket.inet_aton("10.9.9.9"))
            asking.ask(netlink.RTM_NEWADDR, own, netlink.NLM_F_CREATE)
        network = SomeNetwork(cast("Machine", guest), DEFAULT)
        try:
            network.impossible = ["interface eth0 is an ipvlan of mode l3s"]
            with pytest.raises(Unimplemented, match=r"^interface eth0 is an ipvlan of mode l3s: ") as caught:
                await network.settle()
            assert "modes l2 and l3" in (caught.value.hint or "")
            assert [type(request) for request in guest.asked] == [api.NetworkRequest]
            network.impossible = []
            await network.settle()
        finally:
            await network.close()

    in_a_network_of_its_own(lambda: asyncio.run(scenario()))
