"""Which of the host's devices a kubelet has allocated to a pod's containers: asked before it has a machine.

A device plugin's devices are allocated when the kubelet admits the pod, and CRI has no word of them about the
pod itself: the kubelet's PodResources API has them. Imported for pods of a kubelet alone. It must not know
how gRPC is spoken (podresources.py does, in a process of its own), nor how a device is given.
"""

import json
import logging
import os
import stat
import sys
from asyncio import timeout
from functools import partial

from config.settings import Settings
from rpc.errors import Internal, Unavailable, from_code
from shim.devicewishes import DEFAULT_MODE, SYSFS, Node
from shim.helper import PLAIN_ENVIRONMENT, in_thread, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.wants import Wants

VFIO = "/dev/vfio"
ANSWER_S = 20.0
MOST_BYTES = 4 << 20  # of the program's answer, whose bounds are its own
RUN_DIRECTORY = "/var/run/cdi"
"""Where device plugins put files of CDI; those of vfio.cdi_dir, the operator's, give way to these."""
_ANSWER_FD = 3
# gRPC's own remarks are not of use in a pod's log; its errors are.
_ENVIRONMENT = {**PLAIN_ENVIRONMENT, "GRPC_VERBOSITY": "ERROR"}
# Of the shim's own interpreter and code, whose paths are set by whoever started it.
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from shim import podresources; "
_PROGRAM += "podresources.main(sys.argv[1:])"

log = logging.getLogger("casemate")


def may_have(settings: Settings, wants: "Wants") -> bool:
    """Whether a kubelet has to be asked: there is one, this pod may be one of its pods, and the host has a
    device for it."""
    path = settings.vfio.pod_resources
    if wants.kubelet_pod is None or not path or not _has_devices(VFIO):
        return False
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _has_devices(vfio: str) -> bool:
    """Whether vfio-pci has any, of which it makes nodes."""
    try:
        if any(name not in ("vfio", "devices") for name in os.listdir(vfio)):
            return True
        return bool(os.listdir(f"{vfio}/devices"))
    except (FileNotFoundError, NotADirectoryError):
        return False


async def ask(settings: Settings, wants: "Wants", answer_s: float = ANSWER_S) -> dict[str, tuple[Node, ...]]:
    """By the names of the pod's containers, of a pod that may have some.

    Raises Unavailable if the kubelet does not say, and what is wrong with a device that it names: a pod that
    may have one does not start without it.
    """
    assert wants.kubelet_pod is not None  # may_have() said so
    namespace, name = wants.kubelet_pod
    socket = settings.vfio.pod_resources
    directories = dict.fromkeys((settings.vfio.cdi_dir, RUN_DIRECTORY))
    words = (str(_ANSWER_FD), str(answer_s), SYSFS, socket, namespace, name, *directories)
    answer = await _answer(words, answer_s + settings.timeouts.boot_s)
    try:
        found = json.loads(answer)
        if "error" in found:
            code, brief, details, hint = found["error"]
            error = from_code(code, brief)
            error.details, error.hint = details, hint
            raise error
        told: dict[str, tuple[Node, ...]] = {}
        for container, called, group, address in found.get("devices", ()):
            node = Node(group=group, address=address, path="", mode=DEFAULT_MODE, uid=0, gid=0)
            told[container] = (*told.get(container, ()), node)
            where = address if group is None else f"IOMMU group {group}"
            log.info("the kubelet has allocated %s to container %r: %s", called, container, where)
        for line in found["lines"]:
            log.info("%s", line)
    except (ValueError, KeyError, TypeError) as error:
        raise Internal(f"the program that asks the kubelet answers {answer[:200]!r}") from error
    return told


async def _answer(words: tuple[str, ...], limit_s: float) -> bytes:
    """What the program writes. limit_s: for it to begin and to end. Raises Unavailable, Internal."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reading, "rb") as answer:
        try:
            argv = [sys.executable, "-IBSs", "-c", _PROGRAM, json.dumps(sys.path), *words]
            # Its stderr is the pod's log.
            program = spawn("casemate-kubelet", argv, fds={_ANSWER_FD: writing, 2: 2}, env=_ENVIRONMENT)
        finally:
            os.close(writing)
        try:
            async with timeout(limit_s):
                found = await in_thread(partial(answer.read, MOST_BYTES))
                await program.exited.wait()
        except TimeoutError:
            raise Unavailable(
                "the kubelet was not asked which devices the pod has",
                f"the program that asks did not end within {limit_s:.0f} s",
            ) from None
        finally:
            await program.end()
    if program.status != 0:
        raise Internal(
            f"the program that asks the kubelet ended ({program.how()}); the pod's log has its words"
        )
    return found
