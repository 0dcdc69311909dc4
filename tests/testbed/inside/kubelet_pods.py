"""Run in the bed by device_pods.py: a pod of two containers, to which a kubelet has allocated devices.

The kubelet is a gRPC server that says so (tests/kubelet_peer.py); the pod is one of CRI's, by its
annotations. What should be seen is the test's business.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from images.oci import DEMO
from rpc.api import podresources as api
from tests import kubelet_peer
from tests.testbed.inside import places
from tests.testbed.inside.given import CLOUD, GONE_S, LOOK, casemate, driver, states
from tests.testbed.inside.one_pod import RUNTIME, timed

SOCKET = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
POD, NAMESPACE, NAME = "kube", "red", "training"
RESOURCE = "casemate.example/pgpu"
DISKS = "casemate.example/disk"
START_S = 600.0
SHOW = ("sh", "-c", f"cd /dev; echo nodes nvme*; {LOOK}")
CRI = "io.kubernetes.cri."
OF_POD = {"sandbox-id": POD, "sandbox-name": NAME, "sandbox-namespace": NAMESPACE}


def ctr(annotations: Mapping[str, str], *words: str) -> list[str]:
    """annotations: of CRI's, without what all of them begin with. words: more options, image, id, program."""
    given = [f"--annotation={CRI}{name}={value}" for name, value in {**OF_POD, **annotations}.items()]
    return ["ctr", "run", "--rm", "--runtime", RUNTIME, *given, *CLOUD, *words]


def sandbox() -> list[str]:
    return ctr({"container-type": "sandbox"}, DEMO, POD, "pause")


def container(name: str, *options: str) -> list[str]:
    about = {"container-type": "container", "container-name": name}
    return ctr(about, *options, DEMO, f"{POD}-{name}", *SHOW)


def answer(containers: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    """ids by resource, by container."""
    pod = api.PodResources(name=NAME, namespace=NAMESPACE)
    for name, resources in containers.items():
        devices = [
            api.ContainerDevices(resource_name=resource, device_ids=ids)
            for resource, ids in resources.items()
        ]
        pod.containers.append(api.ContainerResources(name=name, devices=devices))
    return {"Get": {"hex": api.GetPodResourcesResponse(pod_resources=pod).encode().hex()}}


@contextmanager
def kubelet(answers: dict[str, Any]) -> Iterator[None]:
    SOCKET.parent.mkdir(parents=True, exist_ok=True)
    SOCKET.unlink(missing_ok=True)
    path = Path("/tmp/kubelet.json")
    path.write_text(json.dumps(answers))
    argv = [sys.executable, "-BEs", kubelet_peer.__file__, str(SOCKET), str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield
        process.communicate()
    SOCKET.unlink(missing_ok=True)  # gRPC does at its end, if it comes to it


class Sandbox:
    """CRI's way to a pod: its sandbox first, and then what it was made for."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(sandbox(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # A bounded poll: of a container without output, ctr says nothing while it runs.
        deadline = time.monotonic() + START_S
        while self._process.poll() is None and not self.runs and time.monotonic() < deadline:
            time.sleep(1)

    @property
    def runs(self) -> bool:
        listed = subprocess.run(["ctr", "task", "ls"], stdout=subprocess.PIPE, text=True, check=True).stdout
        return any(line.split()[::2] == [POD, "RUNNING"] for line in listed.splitlines())

    def end(self) -> list[Any]:
        subprocess.run(["ctr", "task", "kill", "--signal", "KILL", POD], check=False)
        _, words = self._process.communicate(timeout=GONE_S * 10)
        return [self._process.returncode, words]


def look() -> dict[str, Any]:
    """Two are bound ahead: the disk is the container main's, by its address, the GPU side's, by a CDI name.
    A third container has none. Then a kubelet that is out of order."""
    where = places.addresses()
    disk, gpu = where["nvme0"], where["gpu0"]
    seen: dict[str, Any] = {"bound": [casemate("gpu", "bind", each) for each in (disk, gpu)]}
    node = seen["bound"][0]["devices"][0]["device_node"]
    seen["cdi"] = casemate("cdi", "generate", "--kind", RESOURCE)
    containers = {"main": {DISKS: [disk]}, "side": {RESOURCE: [gpu], "example.org/fuse": ["0"]}, "bare": {}}
    with kubelet(answer(containers)):
        pod = Sandbox()
        seen["states"] = states()
        seen["record"] = next((each for each in casemate("ps") if each["id"] == POD), None)
        seen["containers"] = {
            "main": timed(container("main")),
            "named": timed(container("main", "--device", node)),
            "side": timed(container("side")),
            "bare": timed(container("bare")),
        }
        words = ["casemate", "logs", "--shim", POD]
        seen["log"] = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False).stdout
        seen["trace"] = [span["name"] for span in casemate("trace", POD)["spans"]]
        seen["ended"] = pod.end()
    seen["after"] = states(), driver("nvme0"), driver("gpu0")
    with kubelet({"Get": {"code": "INTERNAL", "details": "out of order"}}):
        seen["silent"] = timed(sandbox())
    seen["unbound"] = [casemate("gpu", "unbind", each) for each in (disk, gpu)]
    Path(seen["cdi"]["path"]).unlink()
    return seen
