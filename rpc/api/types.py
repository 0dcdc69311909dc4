"""Messages that several protocols share: protobuf's well-known types, google.rpc.Status, containerd.types.

Re-declared in our own words, wire-compatible (tests/interop compares them with containerd's).
"""

from __future__ import annotations

from rpc.codec import (
    Message,
    bytes_,
    int32,
    int64,
    message,
    message_map,
    messages,
    string,
    string_map,
    strings,
    uint32,
)


class Empty(Message, name="google.protobuf.Empty"):
    pass


class Any(Message, name="google.protobuf.Any"):
    """A message with its name. containerd's type_urls are bare names, without a host before them."""

    type_url: str = string(1)
    value: bytes = bytes_(2)

    @classmethod
    def pack(cls, content: Message) -> Any:
        return cls(type_url=content.NAME, value=content.encode())


class Timestamp(Message, name="google.protobuf.Timestamp"):
    """A point in time since the epoch; nanos is always 0..999999999, also before 1970."""

    seconds: int = int64(1)
    nanos: int = int32(2)

    @classmethod
    def from_ns(cls, ns: int) -> Timestamp:
        seconds, nanos = divmod(ns, 1_000_000_000)
        return cls(seconds=seconds, nanos=nanos)

    @property
    def ns(self) -> int:
        return self.seconds * 1_000_000_000 + self.nanos


class Status(Message, name="google.rpc.Status"):
    code: int = int32(1)
    message: str = string(2)
    details: list[Any] = messages(3, Any)


class Mount(Message, name="containerd.types.Mount"):
    type: str = string(1)
    source: str = string(2)
    target: str = string(3)
    options: list[str] = strings(4)


class MountCapabilities(Message, name="containerd.types.MountCapabilities"):
    types: list[str] = strings(1)
    transforms: list[str] = strings(2)


class Platform(Message, name="containerd.types.Platform"):
    os: str = string(1)
    architecture: str = string(2)
    variant: str = string(3)
    os_version: str = string(4)
    os_features: list[str] = strings(5)


class Metric(Message, name="containerd.types.Metric"):
    timestamp: Timestamp | None = message(1, Timestamp)
    id: str = string(2)
    data: Any | None = message(3, Any)


class ProcessInfo(Message, name="containerd.v1.types.ProcessInfo"):
    """One host pid of a task; info is an Any of runc's ProcessDetails for an exec."""

    pid: int = uint32(1)
    info: Any | None = message(2, Any)


class RuntimeVersion(Message, name="containerd.types.RuntimeVersion"):
    version: str = string(1)
    revision: str = string(2)


class RuntimeRequest(Message, name="containerd.types.RuntimeRequest"):
    runtime_path: str = string(1)
    options: Any | None = message(2, Any)


class RuntimeInfo(Message, name="containerd.types.RuntimeInfo"):
    """What `containerd-shim-casemate-v2 -info` prints."""

    name: str = string(1)
    version: RuntimeVersion | None = message(2, RuntimeVersion)
    options: Any | None = message(3, Any)
    features: Any | None = message(4, Any)
    annotations: dict[str, str] = string_map(5)


class SandboxRuntime(Message, name="containerd.types.Sandbox.Runtime"):
    name: str = string(1)
    options: Any | None = message(2, Any)


class Sandbox(Message, name="containerd.types.Sandbox"):
    """containerd's own record of a sandbox, as UpdateSandbox hands it over."""

    sandbox_id: str = string(1)
    runtime: SandboxRuntime | None = message(2, SandboxRuntime)
    spec: Any | None = message(3, Any)
    labels: dict[str, str] = string_map(4)
    created_at: Timestamp | None = message(5, Timestamp)
    updated_at: Timestamp | None = message(6, Timestamp)
    extensions: dict[str, Any] = message_map(7, Any)
    sandboxer: str = string(10)
