"""A machine of the pool: restored, met and paused before there is a pod, and made that pod's in one step.

It belongs to one pod at most. It must not know who keeps it, nor how a pod gets at it.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from images.store import ImageStore
from rpc.api import agent as api
from rpc.errors import DeadlineExceeded, FailedPrecondition
from shim import phases
from shim.helper import in_thread
from shim.trace import Trace
from shim.vm.guest import Machine
from shim.vm.hello import question
from shim.vm.setting import Setting
from shim.vm.versions import identity

POOL = "pool"
# A guest that runs already answers in a hundredth of a second; emulated, in four.
ANSWER_S = 2.0


class Spare:
    """machine: as yet nobody's. version: of the template with this key, from which it was restored.
    undo: takes away what surrounds the machine; the machine's from when it is taken.
    """

    def __init__(
        self, setting: Setting, key: str, version: str, machine: Machine, undo: AsyncExitStack
    ) -> None:
        """Raises OSError if QEMU's program is gone."""
        self.setting = setting
        self.machine = machine
        self.undo = undo
        self._key = key
        self._version = version
        self._qemu = identity(setting.qemu)

    def check(self) -> None:
        """Whether a pod that starts now would be given the same machine.

        Raises FailedPrecondition, or NotFound for an image that is no more.
        """
        setting = self.setting
        if self.machine.lost.done():
            raise FailedPrecondition("the machine has ended", str(self.machine.lost.result()))
        if setting.templates.version(self._key) != self._version:
            raise FailedPrecondition("its template was removed or replaced")
        store = ImageStore(Path(setting.request.settings.image_dir))
        if store.resolve(setting.request.profile.image).digest != setting.image.digest:
            raise FailedPrecondition("its guest image is another one now")
        if self._qemu != identity(setting.qemu):
            raise FailedPrecondition("QEMU was replaced")

    def setting_of(self, pod_id: str, hostname: str) -> Setting:
        """What surrounds it, as a pod's."""
        return replace(self.setting, request=replace(self.setting.request, pod_id=pod_id, hostname=hostname))

    async def take(self, pod_id: str, hostname: str, trace: Trace) -> Machine:
        """Its guest runs, with a host name, a clock and random numbers of its own. Raises a CasemateError if
        it does not answer."""
        setting = self.setting
        trace.accel = setting.accel.kind
        limit_s = ANSWER_S * setting.factor
        with trace.span(phases.POOL_RESUME, phases.POD_READY):
            try:
                async with asyncio.timeout(limit_s):  # libvirt itself waits for ever
                    await in_thread(setting.host.resume)
            except TimeoutError:
                raise DeadlineExceeded(f"QEMU did not go on within {limit_s:.0f} s") from None
        with trace.span(phases.POOL_GREET, phases.POD_READY):
            hello = await self.machine.call(api.HELLO, question(pod_id, hostname), timeout_s=limit_s)
        self.machine.facts = replace(
            self.machine.facts, source=POOL, memory_used_bytes=hello.memory_used_bytes
        )
        self.machine.adopt(self.undo)
        return self.machine

    async def stop(self) -> None:
        """Everything of it gone."""
        await self.machine.stop()
        await self.undo.aclose()


@dataclass(frozen=True, slots=True)
class Reserve:
    """A machine of the pool's, for one pod. placed: done when its processes are where the pod's are to be,
    or why they cannot be."""

    spare: Spare
    placed: "asyncio.Future[None]"
