"""A device plugin of a kubelet's, as v1beta1 of k8s.io/kubelet has them, with devices that are none.

python3 plugin.py DIRECTORY RESOURCE=ID,ID ...: registers with the kubelet whose directory of plugins that is,
prints a line, and serves until its stdin ends. What is allocated is in the container's environment.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]

from rpc.codec import Message, messages, string, string_map, strings

VERSION = "v1beta1"
SERVICE = f"/{VERSION}.DevicePlugin/"
REGISTER = f"/{VERSION}.Registration/Register"
VARIABLE = "ALLOCATED"


class Empty(Message):
    pass


class RegisterRequest(Message):
    version: str = string(1)
    endpoint: str = string(2)
    resource_name: str = string(3)


class Device(Message):
    id: str = string(1)
    health: str = string(2)


class ListAndWatchResponse(Message):
    devices: list[Device] = messages(1, Device)


class ContainerAllocateRequest(Message):
    devices_ids: list[str] = strings(1)


class AllocateRequest(Message):
    container_requests: list[ContainerAllocateRequest] = messages(1, ContainerAllocateRequest)


class ContainerAllocateResponse(Message):
    envs: dict[str, str] = string_map(1)


class AllocateResponse(Message):
    container_responses: list[ContainerAllocateResponse] = messages(1, ContainerAllocateResponse)


class Plugin(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Of one resource."""

    def __init__(self, ids: list[str]) -> None:
        self._ids = ids

    def service(self, details: Any) -> object:
        match details.method.removeprefix(SERVICE):
            case "ListAndWatch":
                return grpc.unary_stream_rpc_method_handler(self._list)
            case "Allocate":
                return grpc.unary_unary_rpc_method_handler(self._allocate)
            case "GetDevicePluginOptions":
                return grpc.unary_unary_rpc_method_handler(lambda request, context: Empty().encode())
        return None

    def _list(self, request: bytes, context: Any) -> Iterator[bytes]:
        """Once, as none of them changes; the kubelet takes the end of it for the plugin's."""
        gone = threading.Event()
        context.add_callback(gone.set)
        devices = [Device(id=each, health="Healthy") for each in self._ids]
        yield ListAndWatchResponse(devices=devices).encode()
        gone.wait()

    def _allocate(self, request: bytes, context: Any) -> bytes:
        answers = [
            ContainerAllocateResponse(envs={VARIABLE: " ".join(each.devices_ids)})
            for each in AllocateRequest.decode(request).container_requests
        ]
        return AllocateResponse(container_responses=answers).encode()


def serve(directory: Path, resource: str, ids: list[str]) -> Any:
    """A server that the kubelet has heard of."""
    endpoint = f"{resource.replace('/', '-')}.sock"
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Plugin(ids),))
    server.add_insecure_port(f"unix://{directory}/{endpoint}")
    server.start()
    about = RegisterRequest(version=VERSION, endpoint=endpoint, resource_name=resource)
    with grpc.insecure_channel(f"unix://{directory}/kubelet.sock") as channel:
        channel.unary_unary(REGISTER)(about.encode(), timeout=30)
    return server


if __name__ == "__main__":
    asked = (word.partition("=") for word in sys.argv[2:])
    servers = [serve(Path(sys.argv[1]), resource, ids.split(",")) for resource, _, ids in asked]
    print(flush=True)
    sys.stdin.read()
    for each in servers:
        each.stop(None)
