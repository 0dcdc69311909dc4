"""containerd with its CRI plugin, a network for pods, and crictl: what a kubelet has, as far as pods go.

It knows crictl's command line and the messages of CRI as crictl reads them (JSON); what should come of it is
the test's business. Source of the fields: k8s.io/cri-api, pkg/apis/runtime/v1/api.proto.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.ctr import NAMESPACE as CTR_NAMESPACE
from bench.ctr import Client, Ctr, CtrFailed, CtrTimeout, Result
from bench.instance import CHECKOUT, Instance
from images import oci
from shim.paths import PodPaths
from tests.vm import builds, census
from tests.vm.instances import Instances

IMAGE = oci.DEMO
NAMESPACE = "k8s.io"
SHIM_HANDLER = "casemate-sandboxer"
"""Pods by the Sandbox API, with containerd 2."""
HANDLER = os.environ.get("CASEMATE_TEST_HANDLER") or "casemate"
"""With the other one, all tests of pods are about that: `-k 'not v1'`."""
ENDPOINT = "unix:///run/containerd/containerd.sock"
CGROUPS = f"/{CTR_NAMESPACE}-pods"
"""Of this process alone, as there may be other tests on this machine."""
CNI_PROGRAMS = "/usr/lib/cni"
WAIT_S = 60.0

DROP_IN = (CHECKOUT / "config/containerd/casemate.toml").read_text().replace("version = 2\n", "", 1)
"""As an operator has it; the version is said where it is included."""

PLUGIN = f"""\
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{CNI_PROGRAMS}"
  conf_dir = "{{base}}/cni"
"""

TABLE = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.casemate'
SANDBOXER = f"""
{TABLE}-sandboxer]{DROP_IN.partition(f"{TABLE}]")[2].partition("# The same")[0]}
  sandboxer = "shim"
"""
"""The operator's table once more, under the other name."""

OWN_PIDS = {"security_context": {"namespace_options": {"pid": 1}}}
"""Of a pod and of a container: each container has process IDs of its own, as Kubernetes has it by default."""
POD_PIDS = {"security_context": {"namespace_options": {"pid": 0}}}

BOOT_ID = ("cat", "/proc/sys/kernel/random/boot_id")
FOREVER = ("sleep", "1000")
POD_FILE = "pod.json"
_numbers = itertools.count(1)


def start(name: str) -> Instance:
    """A containerd of that line with CRI. Raises NotHereError as builds.provide()."""
    plugin = PLUGIN + DROP_IN + (SANDBOXER if name == "v2" else "")
    instance = Instance(builds.provide(name), cri=plugin, prepared=write_network)
    return instance.__enter__()


def write_network(base: Path) -> None:
    """Each pod gets a veth and an address."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": "10.88.0.0/16"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(base / "cni-addresses"),
    }
    network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": addresses}]}
    (base / "cni").mkdir()
    (base / "cni" / "10-pods.conflist").write_text(json.dumps(network))


def metadata(name: str) -> dict[str, Any]:
    return {"name": name, "uid": f"{name}-{os.getpid()}", "namespace": "tests", "attempt": 0}


class Cri(Client):
    """crictl against one instance. work: a directory for what it is given as files."""

    def __init__(self, instance: Instance) -> None:
        super().__init__(instance)
        self.ctr = Ctr(instance, NAMESPACE, CGROUPS[1:])
        self.work = instance.work
        self.crictl = builds.crictl()
        self.settings = instance.base / "crictl.yaml"  # it warns of the lack of one
        self.settings.touch()

    def command(self, *argv: str) -> list[str]:
        options = (f"--config={self.settings}", f"--runtime-endpoint={ENDPOINT}", "--timeout=60s")
        return self.instance.inside(str(self.crictl), *options, *argv)

    def __call__(self, *argv: str, timeout_s: float = 90.0) -> Result:
        began = time.monotonic()
        with self.start(*argv) as running:
            done = running.finish(timeout_s)
        return Result(argv, done.code, done.stdout, done.stderr, time.monotonic() - began)

    def json(self, *argv: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self(*argv).ok().out)
        return answer

    def write(self, name: str, **config: Any) -> Path:
        """A PodSandboxConfig in a new directory of this name."""
        path = self.work / name / POD_FILE
        path.parent.mkdir()
        path.write_text(json.dumps(config))
        return path

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
        """CRI announces nothing to crictl: hence a bounded poll."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise CtrTimeout(f"not so within {timeout_s} s: {what}")
            time.sleep(0.1)

    def wait_ready(self) -> None:
        """After a restart of containerd, whose CRI has first to learn what there is."""
        self.wait(lambda: self("pods").code == 0, "CRI answers")

    @contextlib.contextmanager
    def pod(self, handler: str = HANDLER, **changes: Any) -> Iterator["CriPod"]:
        """A pod that runs, with `changes` to its PodSandboxConfig; stopped and removed at the end."""
        name = f"pod{next(_numbers)}"
        logs = self.work / name
        config = {
            "metadata": metadata(name),
            "hostname": f"{name}-host",
            "log_directory": str(logs),
            **changes,
        }
        config["linux"] = {"cgroup_parent": CGROUPS, **changes.get("linux", OWN_PIDS)}
        path = self.write(name, **config)
        pod_id = self("runp", f"--runtime={handler}", str(path)).ok().out.strip()
        try:
            yield CriPod(self, pod_id, config, logs)
        finally:
            self("stopp", pod_id).ok()
            self("rmp", pod_id).ok()


class CriPod:
    def __init__(self, cri: Cri, pod_id: str, config: Mapping[str, Any], logs: Path) -> None:
        self.cri = cri
        self.id = pod_id
        self.config = config
        self.logs = logs

    def create(self, *command: str, name: str = "", image: str = IMAGE, **changes: Any) -> str:
        """A container of the pod; its id. changes: to its ContainerConfig."""
        number = next(_numbers)
        name = name or f"c{number}"
        config = {
            "metadata": {"name": name, "attempt": number},
            "image": {"image": image},
            "command": list(command),
            "log_path": f"{name}-{number}.log",
            "linux": OWN_PIDS,
            **changes,
        }
        path = self.logs / f"container{number}.json"
        path.write_text(json.dumps(config))
        return self.cri("create", self.id, str(path), str(self.logs / POD_FILE)).ok().out.strip()

    def clear(self) -> None:
        """Its containers, those that run too, are removed: the sandbox stays."""
        there = self.cri("ps", "--all", "--quiet", "--pod", self.id).ok().out.split()
        if there:
            self.cri("rm", "--force", *there).ok()

    def run(self, *command: str, **changes: Any) -> str:
        """The id of a container that was started."""
        container = self.create(*command, **changes)
        self.cri("start", container).ok()
        return container

    def exec(self, container: str, *command: str) -> Result:
        """crictl ends each of the two streams with a line of its own."""
        result = self.cri("exec", "--sync", container, *command)
        return replace(result, stdout=result.stdout.removesuffix(b"\n\n"))

    def status(self, container: str) -> dict[str, Any]:
        status: dict[str, Any] = self.cri.json("inspect", container)["status"]
        return status

    def has_ended(self, container: str) -> bool:
        return bool(self.status(container)["state"] == "CONTAINER_EXITED")

    def ended(self, container: str) -> dict[str, Any]:
        """Its status once it has ended."""
        self.cri.wait(lambda: self.has_ended(container), f"container {container} has ended")
        return self.status(container)

    @property
    def is_ready(self) -> bool:
        return bool(self.cri.json("inspectp", self.id)["status"]["state"] == "SANDBOX_READY")

    def over(self) -> None:
        """Wait until CRI says that the pod is not ready any more."""
        self.cri.wait(lambda: not self.is_ready, f"pod {self.id} is over")

    def shows(self, container: str, names: list[str]) -> None:
        """Wait until ps in a container lists these programs, of which those that were just started may not
        have been executed yet."""
        wanted = sorted(names)
        self.cri.wait(
            lambda: sorted(self.exec(container, "ps", "-eo", "comm=").ok().out.split()) == wanted,
            f"container {container} sees {wanted}",
        )

    def log(self, container: str) -> str:
        return self.cri("logs", container).ok().out

    @property
    def paths(self) -> PodPaths:
        return PodPaths(NAMESPACE, self.id, self.cri.instance.path("/run/casemate"))

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.paths.state.read_text())
        return state


def mount(source: Path, target: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"host_path": str(source), "container_path": target, "readonly": read_only}


def failure(result: Result) -> str:
    """What crictl said of a call that failed."""
    if result.code == 0:
        raise CtrFailed(f"it did not fail: {result}")
    return result.err


def hierarchies() -> list[Path]:
    """Of cgroups: those of version 1, and the one of version 2 beside them or alone."""
    if (census.CGROUPS / "cgroup.procs").exists():
        return [census.CGROUPS]
    return [
        top for top in census.CGROUPS.iterdir() if (top / "cgroup.procs").exists() and not top.is_symlink()
    ]


class CriInstances(Instances):
    """containerd with its CRI."""

    def start(self, name: str) -> Instance:
        return start(name)

    def settle(self, instance: Instance) -> None:
        cri = Cri(instance)
        cri.ctr.import_image(self.demo)
        with cri.pod(
            "casemate"
        ) as pod:  # what containerd and its network open once in their lives is open then
            pod.run("true")
        if instance.binaries.name == "v2":
            with cri.pod(SHIM_HANDLER):
                pass

    def close(self) -> None:
        super().close()
        for top in hierarchies():
            with contextlib.suppress(FileNotFoundError):
                (top / CGROUPS[1:]).rmdir()
