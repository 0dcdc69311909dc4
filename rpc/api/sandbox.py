"""containerd's sandbox API, by which containerd 2 drives a pod apart from its containers:
containerd.runtime.sandbox.v1.Sandbox.
"""

from __future__ import annotations

from rpc.api.types import Any, Metric, Mount, Platform, Sandbox, Timestamp
from rpc.codec import Message, boolean, message, messages, string, string_map, strings, uint32
from rpc.method import Method

SERVICE = "containerd.runtime.sandbox.v1.Sandbox"
_PACKAGE = "containerd.runtime.sandbox.v1."

READY = "SANDBOX_READY"
NOT_READY = "SANDBOX_NOTREADY"


class CreateSandboxRequest(Message, name=_PACKAGE + "CreateSandboxRequest"):
    """options: an Any of CRI's PodSandboxConfig."""

    sandbox_id: str = string(1)
    bundle_path: str = string(2)
    rootfs: list[Mount] = messages(3, Mount)
    options: Any | None = message(4, Any)
    netns_path: str = string(5)
    annotations: dict[str, str] = string_map(6)


class CreateSandboxResponse(Message, name=_PACKAGE + "CreateSandboxResponse"):
    pass


class StartSandboxRequest(Message, name=_PACKAGE + "StartSandboxRequest"):
    sandbox_id: str = string(1)


class StartSandboxResponse(Message, name=_PACKAGE + "StartSandboxResponse"):
    pid: int = uint32(1)
    created_at: Timestamp | None = message(2, Timestamp)
    spec: Any | None = message(3, Any)


class PlatformRequest(Message, name=_PACKAGE + "PlatformRequest"):
    sandbox_id: str = string(1)


class PlatformResponse(Message, name=_PACKAGE + "PlatformResponse"):
    platform: Platform | None = message(1, Platform)


class StopSandboxRequest(Message, name=_PACKAGE + "StopSandboxRequest"):
    sandbox_id: str = string(1)
    timeout_secs: int = uint32(2)


class StopSandboxResponse(Message, name=_PACKAGE + "StopSandboxResponse"):
    pass


class UpdateSandboxRequest(Message, name=_PACKAGE + "UpdateSandboxRequest"):
    """fields: which field paths of sandbox have changed; none means any. containerd sets resources and
    annotations no more."""

    sandbox_id: str = string(1)
    resources: Any | None = message(2, Any)
    annotations: dict[str, str] = string_map(3)
    sandbox: Sandbox | None = message(4, Sandbox)
    fields: list[str] = strings(5)


class UpdateSandboxResponse(Message, name=_PACKAGE + "UpdateSandboxResponse"):
    pass


class WaitSandboxRequest(Message, name=_PACKAGE + "WaitSandboxRequest"):
    sandbox_id: str = string(1)


class WaitSandboxResponse(Message, name=_PACKAGE + "WaitSandboxResponse"):
    exit_status: int = uint32(1)
    exited_at: Timestamp | None = message(2, Timestamp)


class SandboxStatusRequest(Message, name=_PACKAGE + "SandboxStatusRequest"):
    sandbox_id: str = string(1)
    verbose: bool = boolean(2)


class SandboxStatusResponse(Message, name=_PACKAGE + "SandboxStatusResponse"):
    """state: READY or NOT_READY."""

    sandbox_id: str = string(1)
    pid: int = uint32(2)
    state: str = string(3)
    info: dict[str, str] = string_map(4)
    created_at: Timestamp | None = message(5, Timestamp)
    exited_at: Timestamp | None = message(6, Timestamp)
    extra: Any | None = message(7, Any)


class PingRequest(Message, name=_PACKAGE + "PingRequest"):
    sandbox_id: str = string(1)


class PingResponse(Message, name=_PACKAGE + "PingResponse"):
    pass


class ShutdownSandboxRequest(Message, name=_PACKAGE + "ShutdownSandboxRequest"):
    sandbox_id: str = string(1)


class ShutdownSandboxResponse(Message, name=_PACKAGE + "ShutdownSandboxResponse"):
    pass


class SandboxMetricsRequest(Message, name=_PACKAGE + "SandboxMetricsRequest"):
    sandbox_id: str = string(1)


class SandboxMetricsResponse(Message, name=_PACKAGE + "SandboxMetricsResponse"):
    metrics: Metric | None = message(1, Metric)


CREATE = Method(SERVICE, "CreateSandbox", CreateSandboxRequest, CreateSandboxResponse)
START = Method(SERVICE, "StartSandbox", StartSandboxRequest, StartSandboxResponse)
PLATFORM = Method(SERVICE, "Platform", PlatformRequest, PlatformResponse)
STOP = Method(SERVICE, "StopSandbox", StopSandboxRequest, StopSandboxResponse)
WAIT = Method(SERVICE, "WaitSandbox", WaitSandboxRequest, WaitSandboxResponse)
STATUS = Method(SERVICE, "SandboxStatus", SandboxStatusRequest, SandboxStatusResponse)
PING = Method(SERVICE, "PingSandbox", PingRequest, PingResponse)
SHUTDOWN = Method(SERVICE, "ShutdownSandbox", ShutdownSandboxRequest, ShutdownSandboxResponse)
METRICS = Method(SERVICE, "SandboxMetrics", SandboxMetricsRequest, SandboxMetricsResponse)
UPDATE = Method(SERVICE, "UpdateSandbox", UpdateSandboxRequest, UpdateSandboxResponse)

METHODS = (CREATE, START, PLATFORM, STOP, WAIT, STATUS, PING, SHUTDOWN, METRICS, UPDATE)
