"""A kubelet for tests of the shim: a gRPC server in a process of its own (tests/kubelet_peer.py)."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rpc.api import podresources as api
from rpc.codec import Message
from tests import kubelet_peer

NAMESPACE, NAME = "red", "training"
Ids = Mapping[str, list[str]]  # by resource


def pod(containers: Mapping[str, Ids], namespace: str = NAMESPACE, name: str = NAME) -> api.PodResources:
    return api.PodResources(
        name=name,
        namespace=namespace,
        containers=[
            api.ContainerResources(
                name=container,
                devices=[
                    api.ContainerDevices(resource_name=resource, device_ids=ids)
                    for resource, ids in devices.items()
                ],
            )
            for container, devices in containers.items()
        ],
    )


def says(message: Message) -> dict[str, str]:
    return {"hex": message.encode().hex()}


def got(containers: Mapping[str, Ids]) -> dict[str, Any]:
    """As a kubelet that answers Get."""
    return {"Get": says(api.GetPodResourcesResponse(pod_resources=pod(containers)))}


class Kubelet:
    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "kubelet.sock")
        self._answers = directory / "answers.json"
        self._said: IO[bytes] | None = None
        self.answers({})

    def answers(self, by_method: Mapping[str, Any]) -> None:
        """By the methods' names; see kubelet_peer.py."""
        self._answers.write_text(json.dumps(by_method))

    def wait_asked(self) -> None:
        """Until it is asked the next time."""
        assert self._said is not None
        self._said.readline()

    @property
    def asked(self) -> list[str]:
        """The methods' names, in order."""
        path = self._answers.with_suffix(".asked")
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    @contextmanager
    def running(self) -> Iterator["Kubelet"]:
        argv = [sys.executable, kubelet_peer.__file__, self.socket, str(self._answers)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            self._said = process.stdout
            yield self
            process.communicate()
