"""Speaks to a running shim as containerd does, for what `ctr` cannot ask."""

import asyncio
import json
from pathlib import Path
from typing import Any

from rpc.api import task
from rpc.api.types import Any as AnyMessage
from rpc.client import Client
from tests.vm.pods import Pods

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


def update(pods: Pods, name: str, resources: dict[str, Any]) -> None:
    async def ask() -> None:
        client = await Client.connect_unix(str(address(pods, name)))
        try:
            value = AnyMessage(type_url=RESOURCES, value=json.dumps(resources).encode())
            await client.call(task.UPDATE, task.UpdateTaskRequest(id=name, resources=value), timeout_s=10)
        finally:
            await client.close()

    asyncio.run(ask())
