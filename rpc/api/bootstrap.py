"""What containerd 2.3 and later gives a shim's `start` on stdin, and takes as its answer.

Loaded before anything else in `start`: it must import no more than the codec.
"""

from __future__ import annotations

from rpc.api.types import Any
from rpc.codec import (
    Message,
    enum_,
    enums,
    int32,
    message,
    messages,
    optional_string,
    string,
    string_map,
)

_PACKAGE = "containerd.runtime.bootstrap.v1."


class Extension(Message, name=_PACKAGE + "Extension"):
    value: Any | None = message(1, Any)


class BootstrapParams(Message, name=_PACKAGE + "BootstrapParams"):
    """Older containerds put an Any of runtime options on stdin, whose bytes decode as one of these:
    check instance_id and namespace before believing it. log_level: 0 is info, negative says more
    (-4 debug, -8 trace), positive less (4 warnings, 8 errors)."""

    instance_id: str = string(1)
    namespace: str = string(2)
    log_level: int = enum_(3)
    containerd_version: str = string(4)
    containerd_ttrpc_address: str = string(5)
    containerd_grpc_address: str = string(6)
    containerd_binary: str = string(7)
    extensions: list[Extension] = messages(8, Extension)
    socket_dir: str | None = optional_string(9)


class BootstrapResult(Message, name=_PACKAGE + "BootstrapResult"):
    """version: of the task API; protocol: "ttrpc"."""

    version: int = int32(1)
    address: str = string(2)
    protocol: str = string(3)
    capabilities: list[int] = enums(4)
    metadata: dict[str, str] = string_map(5)
    extensions: list[Extension] = messages(6, Extension)
