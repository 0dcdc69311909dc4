"""kubectl, and what a test says to have a pod. What should come of it is the test's business."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.ctr import CtrFailed, Result
from bench.instance import Instance
from images import oci
from tests.vm.calling import Calling

IMAGE = oci.DEMO
RUNTIME_CLASS = "casemate"
WAIT_S = 120.0
RUN_S = 120.0
FOREVER = ("sleep", "1000")
BOOT_ID = ("cat", "/proc/sys/kernel/random/boot_id")
GRACE_S = 1
"""What a pod is given for its end unless a test says more: `sleep` as PID 1 hears no SIGTERM."""
_numbers = itertools.count(1)


def container(*command: str, name: str = "main", **more: Any) -> dict[str, Any]:
    """A Container of a pod's spec, `more` being fields of it."""
    return {"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": list(command), **more}


class Kubectl(Calling):
    """kubectl where the API server is. config: a kubeconfig."""

    run_s, wait_s = RUN_S, WAIT_S

    def __init__(self, instance: Instance, program: Path, config: Path) -> None:
        super().__init__(instance)
        self._options = (str(program), f"--kubeconfig={config}", f"--cache-dir={config.parent}/cache")

    def command(self, *argv: str) -> list[str]:
        return self.instance.inside(*self._options, *argv)

    def json(self, *argv: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self(*argv, "--output=json").ok().out)
        return answer

    def create(self, item: Mapping[str, Any]) -> Result:
        return self("create", "-f", "-", stdin=json.dumps(item).encode())

    def wait_for(self, kind: str, name: str, what: str, timeout_s: float = WAIT_S) -> None:
        """what: as of `kubectl wait --for`."""
        self("wait", kind, name, f"--for={what}", f"--timeout={timeout_s}s", timeout_s=timeout_s + 30).ok()

    @contextlib.contextmanager
    def created(self, item: Mapping[str, Any]) -> Iterator[None]:
        """An object that is deleted at the end of the block."""
        self.create(item).ok()
        try:
            yield
        finally:
            self("delete", item["kind"], item["metadata"]["name"], "--wait").ok()

    @contextlib.contextmanager
    def asked(
        self, *containers: Mapping[str, Any], labels: Mapping[str, str] | None = None, **spec: Any
    ) -> Iterator["KubePod"]:
        """A pod that was asked for, with these fields of its spec; deleted at the end of the block."""
        name = f"pod{next(_numbers)}"
        item = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name, **(labels or {})}},
            "spec": {
                "runtimeClassName": RUNTIME_CLASS,
                "nodeName": "casemate-node",
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": GRACE_S,
                "containers": list(containers) or [container(*FOREVER)],
                **spec,
            },
        }
        with self.created(item):
            yield KubePod(self, name)

    @contextlib.contextmanager
    def pod(self, *containers: Mapping[str, Any], **spec: Any) -> Iterator["KubePod"]:
        """A pod that is ready."""
        with self.asked(*containers, **spec) as pod:
            pod.wait_ready()
            yield pod


class KubePod:
    def __init__(self, kubectl: Kubectl, name: str) -> None:
        self.kubectl = kubectl
        self.name = name

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.kubectl.json("get", "pod", self.name)["status"]
        return status

    def wait_ready(self) -> None:
        """Raises CtrFailed with the pod's events."""
        try:
            self.kubectl.wait_for("pod", self.name, "condition=Ready")
        except CtrFailed as error:
            raise CtrFailed(str(error), details="\n".join(self.events())) from None

    def wait_phase(self, phase: str) -> None:
        self.kubectl.wait_for("pod", self.name, f"jsonpath={{.status.phase}}={phase}")

    def of(self, name: str = "main", kind: str = "containerStatuses") -> dict[str, Any]:
        """The ContainerStatus of a container."""
        (found,) = [one for one in self.status.get(kind, []) if one["name"] == name]
        status: dict[str, Any] = found
        return status

    def exec(self, *command: str, container: str = "main", options: Sequence[str] = ()) -> Result:
        return self.kubectl("exec", *options, self.name, "--container", container, "--", *command)

    def sh(self, script: str, container: str = "main") -> str:
        """What a script says that goes well."""
        return self.exec("sh", "-c", script, container=container).ok().out

    def log(self, *options: str, container: str = "main") -> str:
        return self.kubectl("logs", self.name, "--container", container, *options).ok().out

    def wait_said(self, words: str, container: str = "main") -> None:
        """Until it has written these."""
        with self.kubectl.start("logs", "--follow", self.name, "--container", container) as log:
            log.read_until(words.encode(), WAIT_S)

    def events(self) -> list[str]:
        """Reason and message of each, oldest first."""
        options = (f"--field-selector=involvedObject.name={self.name}", "--sort-by=.lastTimestamp")
        items = self.kubectl.json("get", "events", *options)["items"]
        return [f"{event['reason']}: {event['message']}" for event in items]

    def wait_event(self, words: str) -> str:
        """The first event that has these words."""
        found: list[str] = []

        def has() -> bool:
            found[:] = [event for event in self.events() if words in event]
            return bool(found)

        self.kubectl.wait(has, f"an event of {self.name} says {words!r}")
        return found[0]
