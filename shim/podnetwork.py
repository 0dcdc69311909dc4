"""The pod's network in its guest: what the namespace has, the guest is given, now and whenever it changes.

Each interface of the namespace gets a device in the guest with its MAC, behind a tap that the packets are
redirected to; addresses, routes and neighbours are the guest's to answer for. It must not know of containers.
"""

import asyncio
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config.settings import Profile
from rpc import netlink
from rpc.api import agent as api
from rpc.errors import AlreadyExists, CasemateError, Unavailable, Unimplemented
from rpc.netlink import Netlink
from shim import interfaces, network, redirect
from shim.helper import in_thread
from shim.interfaces import TAP_PREFIX, Link, View
from shim.multicast import EveryGroup
from shim.nameservers import NameServers
from shim.vm import designer
from shim.vm.domain import Nic
from shim.vm.guest import Machine

CHANGES = (
    netlink.RTMGRP_LINK
    | netlink.RTMGRP_NEIGH
    | netlink.RTMGRP_IPV4_IFADDR
    | netlink.RTMGRP_IPV4_ROUTE
    | netlink.RTMGRP_IPV6_IFADDR
    | netlink.RTMGRP_IPV6_ROUTE
)
MOST_LEFT_OUT = 100
"""Lines in the log of what no guest gets."""
_TAKES_ALL = "veth"
"""A kind of interfaces that leave no multicast frame out. Others do by what their namespace listens to:
macvlan and ipvlan, and network cards."""
log = logging.getLogger("casemate")


@dataclass(slots=True)
class Plugged:
    """An interface that the guest has, and whether redirecting it took an ingress queue of its own."""

    link: Link
    nic: Nic
    made_ingress: bool
    answers_spared: bool = False


class PodNetwork:
    """Of the namespace that the calling thread is in when it is made, and of the machine of one pod."""

    def __init__(self, machine: Machine, profile: Profile) -> None:
        self._machine = machine
        self._profile = profile
        self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._asking = Netlink()
        self._changes = Netlink(CHANGES)
        self._lock = asyncio.Lock()
        self._plugged: dict[str, Plugged] = {}
        self._told: bytes = b""
        self._left_out: set[str] = set()
        self._following: asyncio.Task[None] | None = None
        self._names = NameServers(machine)
        self._groups: EveryGroup | None = None

    def heed(self, resolv_conf: Path) -> None:
        """The guest gets to ask what this names on the namespace's loopback, from the next settle() on."""
        self._names.heed(resolv_conf)

    async def settle(self) -> None:
        """Returns when the guest has what the namespace has at this moment.

        Raises ResourceExhausted for more interfaces than a guest has room for, AlreadyExists if another pod's
        guest is in this network, Unavailable with what the kernel, libvirt or the guest says, Unimplemented,
        when all else is there, for an interface that no guest can have.
        """
        async with self._lock:
            view = self._read()
            for name, plugged in list(self._plugged.items()):
                if name not in view.links or not plugged.link.same_device(view.links[name]):
                    del self._plugged[name]
                    self._part(plugged)
                    await self._detach(plugged.nic)
            for name, link in view.links.items():
                if name not in self._plugged:
                    self._plugged[name] = await self._plug(link, view)
                    self._told = b""  # what is asked for may be the same, but the guest has yet to do it
                elif self._plugged[name].link != link:
                    self._adapt(self._plugged[name], link)
            for interface in view.request.interfaces:
                if interface.name in self._plugged:
                    interface.port = designer.port_place(self._plugged[interface.name].nic.bus)
            wanted = view.request.encode()
            if wanted != self._told:
                await self._machine.call(api.NETWORK, view.request)
                self._told = wanted
            await self._names.settle()
            if self._names.any:
                self._let_answers_in()
            if view.impossible:
                raise Unimplemented(
                    f"{view.impossible[0]}: what comes in by it cannot be redirected to a VM",
                    hint="modes l2 and l3 can: say so where the network is defined",
                )

    def follow(self) -> None:
        """Has the guest follow every change, beginning with what there is, until close()."""
        self._following = asyncio.create_task(self._follow(), name="network")

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        loop.add_reader(self._changes.fileno(), changed.set)
        changed.set()
        try:
            while True:
                await changed.wait()
                changed.clear()
                self._changes.forget_changes()
                try:
                    await self.settle()
                except CasemateError as error:
                    log.error("the guest's network is not as the pod's: %s", error)
        finally:
            loop.remove_reader(self._changes.fileno())

    async def close(self) -> None:
        """The namespace as it was found. A tap ends with QEMU."""
        if self._following is not None:
            self._following.cancel()
            (ended,) = await asyncio.gather(self._following, return_exceptions=True)
            if not isinstance(ended, asyncio.CancelledError):
                log.error("the pod's network was not followed to its end", exc_info=ended)
        await self._names.close()
        for plugged in self._plugged.values():
            self._part(plugged)
        self._plugged.clear()
        if self._groups is not None:
            self._groups.close()
        self._asking.close()
        self._changes.close()
        os.close(self._namespace)

    def _read(self) -> View:
        try:
            view = interfaces.read(self._asking)
        except (OSError, ValueError) as error:
            raise Unavailable("the pod's network cannot be read", str(error)) from error
        for line in view.left_out:
            if line not in self._left_out and len(self._left_out) < MOST_LEFT_OUT:
                self._left_out.add(line)
                log.warning("not in the guest: %s", line)
        return view

    async def _plug(self, link: Link, view: View) -> "Plugged":
        tap = f"{TAP_PREFIX}{link.index}"
        if tap in view.taken:
            raise AlreadyExists(
                f"interface {link.name} is another pod's already: its network namespace has {tap}",
                hint="two VMs cannot share one network namespace: run both containers in one pod",
            )
        bus = self._machine.ports.take(f"interface {link.name}")
        nic = designer.nic(link.mac, tap, bus, self._profile)
        try:
            await self._machine.plug(partial(self._attach, nic))
        except BaseException:
            self._machine.ports.give_back(bus)
            raise
        try:
            index = interfaces.index_of(self._asking, nic.tap)
            redirect.be_quiet(self._asking, index, link.mtu)
            self._hear_all(link)
            return Plugged(link, nic, redirect.join(self._asking, link.index, index, link.mac))
        except OSError as error:
            await self._detach(nic)
            raise Unavailable(
                f"interface {link.name} cannot be redirected to the guest", str(error)
            ) from error

    def _let_answers_in(self) -> None:
        """Servers of the namespace's own ask others, by its interfaces."""
        try:
            for plugged in self._plugged.values():
                if not plugged.answers_spared:
                    _set_ports(redirect.ASKING_PORTS)
                    index = interfaces.index_of(self._asking, plugged.nic.tap)
                    redirect.spare_answers(self._asking, plugged.link.index, index)
                    plugged.answers_spared = True
        except OSError as error:
            raise Unavailable("the pod's name servers cannot ask others", str(error)) from error

    def _adapt(self, plugged: "Plugged", link: Link) -> None:
        """To another MTU."""
        try:
            redirect.be_quiet(self._asking, interfaces.index_of(self._asking, plugged.nic.tap), link.mtu)
        except OSError as error:
            raise Unavailable(f"{plugged.nic.tap} cannot have {link.name}'s MTU", str(error)) from error
        plugged.link = link

    def _hear_all(self, link: Link) -> None:
        """The groups that the guest listens to are not known here. Raises OSError."""
        if link.kind != _TAKES_ALL:
            if self._groups is None:
                self._groups = EveryGroup()
            self._groups.join(link.index)

    def _part(self, plugged: "Plugged") -> None:
        try:
            if self._groups is not None and plugged.link.kind != _TAKES_ALL:
                self._groups.leave(plugged.link.index)
            redirect.part(self._asking, plugged.link.index, wholly=plugged.made_ingress)
        except OSError as error:
            log.warning("interface %s is still redirected: %s", plugged.link.name, error)

    def _attach(self, nic: Nic) -> None:
        """In a thread of its own: libvirt makes the tap in the namespace of its caller."""
        try:
            network.enter(self._namespace)
        except OSError as error:
            raise Unavailable("the pod's network namespace cannot be entered", str(error)) from error
        self._machine.host.attach(nic.xml())

    async def _detach(self, nic: Nic) -> None:
        try:
            await in_thread(partial(self._machine.host.detach, nic.xml()))
        except CasemateError as error:
            log.warning("the guest keeps its device for %s: %s", nic.tap, error)
        else:
            self._machine.ports.give_back(nic.bus)


def _set_ports(ports: tuple[int, int]) -> None:
    """That the namespace of this thread chooses from."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
        file.write("{} {}".format(*ports))
