"""Speaks to a running shim as containerd does, for what `ctr` cannot ask."""

import asyncio
import json
from pathlib import Path
from typing import TypeVar

from rpc.client import Client
from rpc.codec import Message
from rpc.method import Method
from tests.vm.pods import Pods

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


def address(pods: Pods, name: str) -> Path:
    """The shim's socket, from the bundle: containerd < 2 has its address there, >= 2 writes
    bootstrap.json.
    """
    bundle = pods.ctr.instance.path(
        f"/run/containerd/io.containerd.runtime.v2.task/{pods.ctr.namespace}/{name}"
    )
    bootstrap = bundle / "bootstrap.json"
    text = (
        json.loads(bootstrap.read_text())["address"]
        if bootstrap.exists()
        else (bundle / "address").read_text()
    )
    return pods.ctr.instance.path(text.removeprefix("unix://"))


def ask(pods: Pods, name: str, method: Method[Q, R], request: Q) -> R:
    """One call to the shim of a container. Raises what it answers."""
    return ask_at(address(pods, name), method, request)


def ask_at(socket: Path, method: Method[Q, R], request: Q) -> R:
    """As ask(), of the shim that listens there."""

    async def call() -> R:
        client = await Client.connect_unix(str(socket))
        try:
            return await client.call(method, request, timeout_s=10)
        finally:
            await client.close()

    return asyncio.run(call())
