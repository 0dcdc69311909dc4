"""What is asked of a container of the guest once it is made: to start, limits, statistics.

It must not know of the pod's other containers, nor how a client asked.
"""

import logging

from config.settings import Profile
from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.errors import FailedPrecondition
from shim import oci, resources
from shim.container import Container, Process
from shim.process import Running
from shim.vm.guest import Machine

log = logging.getLogger("casemate")


async def startable(process: Process, machine: Machine | None) -> Running:
    """Its next state. Raises FailedPrecondition for one that cannot be started, and why the machine is lost
    where that has ended it before."""
    try:
        return process.state.start()
    except FailedPrecondition:
        if machine is None or not machine.lost.done() or process.started_s:
            raise
        raise await machine.why_lost() from None


async def start(machine: Machine, container: Container) -> None:
    """Its program; a sandbox has none."""
    if not container.is_sandbox:
        await machine.call(api.START_CONTAINER, api.ContainerRequest(container_id=container.id))


async def update(machine: Machine, profile: Profile, container: Container, document: bytes) -> None:
    """document: OCI LinuxResources as JSON, applied in the guest as far as it can (resources.py)."""
    wanted = oci.decode(document, "linux.resources")
    given, lines = resources.for_guest(wanted)
    for line in (*lines, *resources.beyond(oci.limits(wanted), profile)):
        log.warning("container %s: %s", container.id, line)
    request = api.UpdateRequest(container_id=container.id, resources_json=oci.encode(given))
    await machine.call(api.UPDATE, request)


async def stats(machine: Machine, container: Container) -> bytes:
    """The container's cgroup in the guest: an io.containerd.cgroups.v2.Metrics; a sandbox's is empty."""
    if container.is_sandbox:
        return Metrics().encode()
    answer = await machine.call(api.STATS, api.ContainerRequest(container_id=container.id))
    return resources.made_anew(answer.metrics)
