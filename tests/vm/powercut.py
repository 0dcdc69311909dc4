"""A host that loses all of its processes at once, or its power, as far as an instance of the tests goes.

What should come of it is the tests' business.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

from bench.ctr import Ctr
from bench.instance import Instance
from bench.netns import Namespace, connect, namespace
from tests.vm import census
from tests.vm.faults import inside, output

END_S = 60.0
NETWORK = "/run/netns/pod"
ADDRESS, PEER = "10.77.0.2", "10.77.0.1"


def kill_everything(instance: Instance) -> None:
    """SIGKILL to all below the supervisor. All of it stands still before the first process ends, so that none
    sees another's end and cleans up after it. Returns when the kernel has none of it any more.
    """
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in instance.descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    _wait(lambda: not instance.descendants(), "the end of every process")
    instance.wait_exit(instance.containerd_pid, END_S)
    instance.containerd_pid = 0


def forget_tasks(instance: Instance) -> None:
    """What containerd wrote down of its shims: the next containerd calls nobody's `delete`."""
    for path in instance.path("/run/containerd").glob("io.containerd.runtime.v2.task/*/*"):
        shutil.rmtree(path)


def cut_power(ctr: Ctr) -> None:
    """All processes, and what the kernel has in memory: /run with the mounts below it, cgroups, interfaces.

    What is on a disk stays: containerd's root, templates, images, settings.
    """
    instance = ctr.instance
    kill_everything(instance)
    inside(instance, "umount", "--recursive", "--lazy", "/run")
    inside(instance, "mount", "-t", "tmpfs", "-o", "nosuid,nodev,mode=0755", "tmpfs", "/run")
    _wait(lambda: _without_cgroups(ctr), "the end of the pods' cgroups")
    for line in output(instance, "ip", "-brief", "link").splitlines():
        name = line.split()[0].partition("@")[0]
        if name != "lo":  # the end of one is that of its peer, which may be among them
            subprocess.run(instance.inside("ip", "link", "delete", name), check=False, capture_output=True)
    links = output(instance, "ip", "-brief", "link").split("\n", 1)[1]
    assert not links, links


def _without_cgroups(ctr: Ctr) -> bool:
    """Removes those without a process. The kernel lets go of the dead a moment after they are no more."""
    left = sorted(census.cgroups(ctr), reverse=True)
    for directory in left:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not left


def _wait(condition: Callable[[], bool], what: str) -> None:
    """The kernel tells nobody but a parent: hence a bounded poll."""
    deadline = time.monotonic() + END_S
    while not condition():
        assert time.monotonic() < deadline, f"not so within {END_S} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def network(instance: Instance) -> Iterator[Namespace]:
    """What the pod's interface is connected to; the pod's namespace itself is a mount at NETWORK, as CNI
    leaves it. It is gone with its host's power.
    """
    with namespace() as outside:
        with namespace() as pod:
            connect(pod, "eth0", outside, "v0", (f"{ADDRESS}/24", f"{PEER}/24"))
            place = instance.path(NETWORK)
            place.parent.mkdir()
            place.touch()
            inside(instance, "mount", "--bind", pod.path, NETWORK)
        try:
            yield outside
        finally:
            if place.exists():
                inside(instance, "umount", "--lazy", NETWORK)
                place.unlink()
                place.parent.rmdir()
