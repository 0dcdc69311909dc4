"""The host's devices that a pod has: all of them from before its machine starts until after it has ended.

So has it CPUs of its own. A pod without any imports nothing for it. What is done to a device is vfio/'s, in
threads (giving.py); here is when. It must not know what a device is.
"""

import asyncio
import logging
from dataclasses import replace
from functools import partial

from config.annotations import DEVICES
from config.settings import Settings
from rpc.api import agent as api
from rpc.errors import CasemateError, FailedPrecondition
from shim import phases, shortage
from shim.devicewishes import DEFAULT_MODE, DeviceWishes, Node
from shim.helper import in_thread
from shim.journal import Entry, Journal, Kind
from shim.record import Identity
from shim.trace import Trace
from shim.wants import Wants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shim.giving import Given, Giver
    from shim.vm.guest import Machine
    from shim.vm.passthrough import Function

log = logging.getLogger("casemate")


class Held:
    """What the pod has, and had asked for."""

    def __init__(self, giver: "Giver", wishes: DeviceWishes, given: "Given") -> None:
        self.giver = giver
        self.wishes = wishes
        self.given = given


class Devices:
    """Of one pod."""

    def __init__(self, identity: Identity, settings: Settings, journal: Journal, trace: Trace) -> None:
        self._identity = identity
        self._settings = settings
        self._journal = journal
        self._trace = trace
        self._held: Held | None = None
        self._taking: asyncio.Future[Held] | None = None
        self._machine: Machine | None = None
        self._allocated: Mapping[str, tuple[Node, ...]] = {}  # by containers' names, a kubelet's
        self._changing = asyncio.Lock()
        self.changed: Callable[[], None] = lambda: None
        """Called once a machine that runs has lost one."""

    async def in_a_machine(
        self, wants: Wants, obtain: "Callable[[Given | None], Awaitable[Machine]]"
    ) -> "Machine":
        """The machine that has what is wanted. Where it cannot be made they are given back: nothing of it is
        left. Raises as take() and obtain() do, and ResourceExhausted where there is no room for it."""
        shortage.check_room()
        try:
            self._machine = machine = await obtain(await self.take(await self._with_the_kubelets(wants)))
        except CasemateError:
            await self.give_back()
            raise
        if machine.facts.devices:
            await self._follow(machine)
        return machine

    async def _follow(self, machine: "Machine") -> None:
        """Of one that is pulled out, or that the guest lets go of, the log tells; the pod goes on."""

        def on_gone(function: "Function") -> None:
            log.error(
                "device %s (%s) is gone from the pod's machine: it was taken out of the host, or the guest "
                "let go of it. The containers go on without it. It stays the pod's until that is deleted, "
                "and is then reset, or quarantined if it is not there",
                function.address,
                function.title,
            )
            self.changed()

        try:
            await machine.follow_devices(on_gone)
        except CasemateError as error:
            log.warning("devices that are lost while the pod runs will not be told of: %s", error)

    async def _with_the_kubelets(self, wants: Wants) -> Wants:
        """With what a kubelet has allocated to the pod's containers. Raises as kubelet.ask()."""
        if wants.kubelet_pod is None:
            return wants
        from shim import kubelet

        if not kubelet.may_have(self._settings, wants):
            return wants
        with self._trace.span(phases.DEVICES_ASK, phases.POD_READY):
            self._allocated = told = await kubelet.ask(self._settings, wants)
        nodes = (*wants.devices.nodes, *(node for nodes in told.values() for node in nodes))
        return replace(wants, devices=wants.devices.replace(nodes=nodes))

    async def take(self, wants: Wants) -> "Given | None":
        """All of them, bound and this pod's, or an error and nothing. Raises what is wrong with the wish, who
        has what of it, and what speaks against giving it away. None where nothing is wanted."""
        if not wants.devices and not wants.profile.has_own_cpus:
            return None
        # Before anything is claimed: whoever cleans up after this process looks into the ledger then.
        self._journal.add(Entry(Kind.DEVICES, self._settings.ledger_dir))
        with self._trace.span(phases.DEVICES_CLAIM, phases.POD_READY):
            self._taking = in_thread(partial(self._take, wants))
            self._held = await asyncio.shield(self._taking)
        given = self._held.given
        for each in given.functions:
            log.info("the pod is given device %s (%s)", each.address, each.title)
        if given.functions:
            log.info("the machine's RAM is of %s", given.backing)
        if given.pinning is not None:
            log.info("the guest's CPUs are the pod's alone, pinned to %s", given.pinning)
        return given

    def _take(self, wants: Wants) -> Held:
        from shim.giving import Giver
        from shim.hugepages import Ram

        giver = Giver.of(self._identity, wants.owner, self._settings)
        own_cpus = wants.profile.vcpus if wants.profile.has_own_cpus else 0
        if not wants.devices:
            return Held(giver, wants.devices, giver.take_cpus(own_cpus))
        return Held(giver, wants.devices, giver.take(wants.devices, Ram.of(wants.profile), own_cpus))

    def of_container(self, container_id: str, wishes: DeviceWishes, name: str = "") -> list[api.GivenDevice]:
        """Those of the pod's that a container asks for, or that a kubelet has allocated to it. name: what it
        is for the kubelet. Raises FailedPrecondition if the pod has not all."""
        allocated = self._allocated.get(name, ())
        if not wishes and not allocated:
            return []
        held = self._held
        if wishes.text and (held is None or wishes.text != held.wishes.text):
            raise _too_late(container_id, wishes.text)
        functions = held.given.functions if held is not None else ()
        given = {
            each.address: api.GivenDevice(name=each.address, path=each.path, mode=DEFAULT_MODE)
            for each in functions
            if wishes.text and each.by_text
        }
        # What config.json says of a node is said last.
        for node in (*allocated, *wishes.nodes):
            ports = {each.port for each in functions if _is(node, each)}
            if not ports:
                named = node.address or f"the IOMMU group {node.group}"
                raise _too_late(container_id, named)
            rights = {"mode": node.mode, "uid": node.uid, "gid": node.gid}
            path = node.path
            for each in functions:
                if each.port in ports:
                    given[each.address] = api.GivenDevice(name=each.address, path=path, **rights)
                    path = ""  # one device can be there
        return list(given.values())

    async def give_back(self) -> None:
        """Once the machine has ended, which this sees to. What cannot be given back is quarantined; what the
        ledger cannot be told stays the pod's there until `casemate gc`."""
        async with self._changing:
            if self._taking is None:
                return
            if self._held is None:
                # Whoever waited for it gave up: it may yet become ours.
                await asyncio.wait([self._taking])
                if self._taking.exception() is not None:
                    self._taking = None
                    return
                self._held = self._taking.result()
            if self._machine is not None:
                await self._machine.end()
            held, self._held, self._taking = self._held, None, None
            with self._trace.span(phases.DEVICES_RELEASE, phases.DELETE):
                try:
                    await in_thread(partial(held.giver.give_back, held.given.claim))
                except (CasemateError, OSError) as error:
                    log.error("the pod's devices are not given back; `casemate gc` tries again: %s", error)


def _is(node: Node, function: "Function") -> bool:
    return node.address == function.address if node.group is None else node.group == function.group


def _too_late(container_id: str, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"container {container_id}: {what}: its pod was not given this when it started",
        hint="devices are in a pod's machine from its start on: ask for them with the pod (in Kubernetes, by "
        f"a device plugin's resource, which the kubelet tells of, or by the pod's annotation {DEVICES})",
    )
