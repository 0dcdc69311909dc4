"""Making a container: its files, its stand-in on the host, its counterpart in the guest, and the ways back.

It must not know of the pod's other containers, nor of whom the making is told to.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from config import annotations
from config.settings import Profile
from rpc.api import agent as api
from rpc.api.types import Mount
from rpc.errors import AlreadyExists, CasemateError, DeadlineExceeded, NotFound
from shim import oci, phases, resources, rootfs, spec, users
from shim.anchor import Anchors
from shim.blockdevices import BlockDevice
from shim.bundle import read_config
from shim.cleanup import remove_tree
from shim.container import Container, Process
from shim.devices import Devices
from shim.disks import Disks
from shim.hooks import HostHooks
from shim.journal import Journal
from shim.nameservers import RESOLV_CONF
from shim.oomscore import OomScores
from shim.paths import PodPaths
from shim.record import Identity
from shim.sandbox import (
    GUEST_SHM,
    Siblings,
    container_name,
    furnished,
    has_pods_users,
    is_sandbox,
    pod_limits,
    pod_request,
    shm_of,
)
from shim.stdio import open_stdio
from shim.trace import Trace
from shim.vm.guest import Machine

log = logging.getLogger("casemate")


@dataclass(frozen=True, slots=True)
class NewContainer:
    """What a client says of a container that it wants; the rest is in the bundle's config.json, or in
    document. gives: of a sandbox that is made by the Sandbox API, see sandbox.Siblings.
    """

    container_id: str
    bundle: str
    mounts: tuple[Mount, ...]
    terminal: bool
    stdin: str
    stdout: str
    stderr: str
    document: oci.Document | None = None
    gives: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Means:
    """What a pod's process has that its containers are made with. journal: of what they may leave behind."""

    identity: Identity
    anchors: Anchors
    paths: PodPaths
    journal: Journal
    trace: Trace
    disks: Disks
    devices: Devices
    oom_scores: OomScores = field(default_factory=OomScores)


async def make_container(
    new: NewContainer,
    means: Means,
    siblings: Siblings,
    machine_ready: Callable[[], Awaitable[tuple[Machine, Profile]]],
    network_ready: Callable[[Path | None], Awaitable[None]],
    undo: AsyncExitStack,
) -> Container:
    """A container up to the point where only its program is missing; undo gets every way back.

    network_ready: is told of the container's own resolv.conf.

    Raises what is wrong with the spec, the mounts, the machine or the program.
    """
    document = new.document or await asyncio.to_thread(read_config, new.bundle)
    if document is None:
        raise NotFound(f"{new.bundle}/config.json does not exist")
    wanted = furnished(oci.parse(document), siblings)
    stands_for_pod, score = is_sandbox(wanted), oci.oom_score(wanted)
    asked = annotations.of_machine(wanted.annotations)
    for name in sorted(asked.items() - siblings.asked.items()) if siblings.pids else ():
        log.warning(
            "container %s: %s=%s: the VM is as the pod's first container has it", new.container_id, *name
        )
    guest = spec.for_guest(wanted, new.container_id, siblings)
    for line in guest.ignored:
        log.info("container %s: %s", new.container_id, line)
    for line in guest.unmet:
        log.warning("container %s: %s", new.container_id, line)
    identity, trace = means.identity, means.trace
    hooks = HostHooks(wanted, new.container_id, new.bundle, identity.namespace, means.journal, trace)
    undo.push_async_callback(hooks.gone)  # the last that happens to a container
    await hooks.connect()
    stdio = await open_stdio(new.stdin, new.stdout, new.stderr, new.terminal, new.container_id, identity)
    undo.push_async_callback(stdio.close)
    with trace.span(phases.CREATE_WAITS, phases.CREATE):
        machine, profile = await machine_ready()
    for line in resources.beyond(pod_limits(wanted), profile):
        log.warning("container %s: %s", new.container_id, line)
    with trace.span(phases.ROOTFS, phases.CREATE):
        directory = machine.share / new.container_id
        try:
            directory.mkdir(mode=0o711)
        except FileExistsError as error:
            raise AlreadyExists(f"{directory} is there already: not this pod's doing") from error
        undo.callback(remove_tree, directory)
        root = directory / "rootfs"
        root.mkdir(mode=0o755)
        mounts: Sequence[Mount] = new.mounts
        if new.gives is None:  # such a sandbox may have none: there is no program
            mounts = rootfs.mounts_of(new.mounts, new.bundle, wanted.rootfs)
        layers = means.paths.directory / f"layers-{new.container_id}"
        undo.enter_context(rootfs.mounted(mounts, root, layers, identity.host))
        for entry in () if stands_for_pod else guest.shared:
            undo.enter_context(rootfs.bound(entry, directory, identity.host))
    anchor, shown_pid = await means.anchors.make(str(root))
    undo.push_async_callback(anchor.end)
    await hooks.create(shown_pid)
    # The pod's network is as its client wants it from here on: CNI's was before `start`, the hooks' is now.
    # The guest has to have it first: sysctls may be those of an interface.
    if has_pods_users(wanted, siblings):  # to whom the network is to belong
        await machine.call(api.MAKE_USERS, users.request(wanted.id_mappings))
    resolv_conf = next((each.name for each in guest.shared if each.destination == RESOLV_CONF), "")
    await network_ready(directory / resolv_conf if resolv_conf else None)
    init = Process(new.container_id, "", new.terminal, new.stdin, new.stdout, new.stderr)
    undo.push_async_callback(init.close)
    if stands_for_pod:
        shm = shm_of(wanted) if new.gives is None else GUEST_SHM
        with trace.span(phases.GUEST_CREATE, phases.CREATE):
            await machine.call(api.MAKE_POD, pod_request(wanted, new.container_id, shm))
        if identity.host is not None:
            from shim.portforward import PortForward  # most pods are no sandbox of a kubelet's

            undo.push_async_callback(PortForward(machine, new.container_id, identity.host.net).close)
        init.in_guest = True
        container = Container(new.container_id, new.bundle, init, anchor, shown_pid, hooks, undo)
        container.is_sandbox, container.shm, container.gives, container.asked = True, shm, new.gives, asked
        return container
    undo.enter_context(means.oom_scores.asked(new.container_id, score, (machine.qemu, machine.files)))
    devices = means.devices.of_container(new.container_id, guest.devices, container_name(wanted))
    given = []
    for device in guest.disks:
        with trace.span(phases.DISK_PLUG, phases.CREATE):
            given.append(await means.disks.plug(machine, device))
        undo.push_async_callback(_give_up, means.disks, machine, device)
    undo.push_async_exit(partial(_forget_in_guest, machine, new.container_id))
    with trace.span(phases.GUEST_CREATE, phases.CREATE):
        await machine.call(
            api.CREATE_CONTAINER,
            api.CreateContainerRequest(
                container_id=new.container_id,
                spec_json=oci.encode(guest.document),
                terminal=new.terminal,
                stdin=bool(new.stdin),
                disks=given,
                devices=devices,
            ),
        )
    init.in_guest = True
    init.attach(machine, stdio)
    container = Container(new.container_id, new.bundle, init, anchor, shown_pid, hooks, undo)
    container.asked = asked
    return container


async def _give_up(disks: Disks, machine: Machine, device: BlockDevice) -> None:
    """Where the machine goes on without the container. A guest that does not let go keeps the device."""
    if machine.lost.done():
        return
    try:
        await disks.unplug(machine, device)
    except CasemateError as error:
        log.warning("the guest keeps its device for %s: %s", device.path, error)


async def _forget_in_guest(
    machine: Machine,
    container_id: str,
    kind: type[BaseException] | None,
    error: BaseException | None,
    _: object,
) -> None:
    """The way back from CREATE_CONTAINER. An error that the guest answered means that it has none."""
    if error is None or (isinstance(error, CasemateError) and not isinstance(error, DeadlineExceeded)):
        return
    try:
        await machine.call(api.DELETE, api.DeleteRequest(container_id=container_id, kill=True))
    except CasemateError as failure:
        log.info("container %s, given up while it was made: %s", container_id, failure)
