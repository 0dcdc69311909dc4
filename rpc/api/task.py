"""containerd's task API, which containerd drives a shim with: containerd.task.v2.Task.

v3 differs in the service's name only: serve METHODS under SERVICE_V3 too.
"""

from __future__ import annotations

from enum import IntEnum

from rpc.api.types import Any, Empty, Mount, ProcessInfo, Timestamp
from rpc.codec import Message, boolean, enum_, message, messages, string, string_map, uint32
from rpc.method import Method

SERVICE = "containerd.task.v2.Task"
SERVICE_V3 = "containerd.task.v3.Task"
_PACKAGE = "containerd.task.v2."


class Status(IntEnum):
    """containerd.v1.types.Status: the state of a process."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


class CreateTaskRequest(Message, name=_PACKAGE + "CreateTaskRequest"):
    id: str = string(1)
    bundle: str = string(2)
    rootfs: list[Mount] = messages(3, Mount)
    terminal: bool = boolean(4)
    stdin: str = string(5)
    stdout: str = string(6)
    stderr: str = string(7)
    checkpoint: str = string(8)
    parent_checkpoint: str = string(9)
    options: Any | None = message(10, Any)


class CreateTaskResponse(Message, name=_PACKAGE + "CreateTaskResponse"):
    pid: int = uint32(1)


class DeleteRequest(Message, name=_PACKAGE + "DeleteRequest"):
    id: str = string(1)
    exec_id: str = string(2)


class DeleteResponse(Message, name=_PACKAGE + "DeleteResponse"):
    """Also what the shim binary's `delete` prints."""

    pid: int = uint32(1)
    exit_status: int = uint32(2)
    exited_at: Timestamp | None = message(3, Timestamp)


class ExecProcessRequest(Message, name=_PACKAGE + "ExecProcessRequest"):
    """spec: an Any of JSON, an OCI Process."""

    id: str = string(1)
    exec_id: str = string(2)
    terminal: bool = boolean(3)
    stdin: str = string(4)
    stdout: str = string(5)
    stderr: str = string(6)
    spec: Any | None = message(7, Any)


class ResizePtyRequest(Message, name=_PACKAGE + "ResizePtyRequest"):
    id: str = string(1)
    exec_id: str = string(2)
    width: int = uint32(3)
    height: int = uint32(4)


class StateRequest(Message, name=_PACKAGE + "StateRequest"):
    id: str = string(1)
    exec_id: str = string(2)


class StateResponse(Message, name=_PACKAGE + "StateResponse"):
    """status: a Status."""

    id: str = string(1)
    bundle: str = string(2)
    pid: int = uint32(3)
    status: int = enum_(4)
    stdin: str = string(5)
    stdout: str = string(6)
    stderr: str = string(7)
    terminal: bool = boolean(8)
    exit_status: int = uint32(9)
    exited_at: Timestamp | None = message(10, Timestamp)
    exec_id: str = string(11)


class KillRequest(Message, name=_PACKAGE + "KillRequest"):
    id: str = string(1)
    exec_id: str = string(2)
    signal: int = uint32(3)
    all: bool = boolean(4)


class CloseIORequest(Message, name=_PACKAGE + "CloseIORequest"):
    id: str = string(1)
    exec_id: str = string(2)
    stdin: bool = boolean(3)


class PidsRequest(Message, name=_PACKAGE + "PidsRequest"):
    id: str = string(1)


class PidsResponse(Message, name=_PACKAGE + "PidsResponse"):
    processes: list[ProcessInfo] = messages(1, ProcessInfo)


class CheckpointTaskRequest(Message, name=_PACKAGE + "CheckpointTaskRequest"):
    id: str = string(1)
    path: str = string(2)
    options: Any | None = message(3, Any)


class UpdateTaskRequest(Message, name=_PACKAGE + "UpdateTaskRequest"):
    """resources: an Any of JSON, an OCI LinuxResources."""

    id: str = string(1)
    resources: Any | None = message(2, Any)
    annotations: dict[str, str] = string_map(3)


class StartRequest(Message, name=_PACKAGE + "StartRequest"):
    id: str = string(1)
    exec_id: str = string(2)


class StartResponse(Message, name=_PACKAGE + "StartResponse"):
    pid: int = uint32(1)


class WaitRequest(Message, name=_PACKAGE + "WaitRequest"):
    id: str = string(1)
    exec_id: str = string(2)


class WaitResponse(Message, name=_PACKAGE + "WaitResponse"):
    exit_status: int = uint32(1)
    exited_at: Timestamp | None = message(2, Timestamp)


class StatsRequest(Message, name=_PACKAGE + "StatsRequest"):
    id: str = string(1)


class StatsResponse(Message, name=_PACKAGE + "StatsResponse"):
    """stats: an Any of io.containerd.cgroups.v2.Metrics."""

    stats: Any | None = message(1, Any)


class ConnectRequest(Message, name=_PACKAGE + "ConnectRequest"):
    id: str = string(1)


class ConnectResponse(Message, name=_PACKAGE + "ConnectResponse"):
    shim_pid: int = uint32(1)
    task_pid: int = uint32(2)
    version: str = string(3)


class ShutdownRequest(Message, name=_PACKAGE + "ShutdownRequest"):
    id: str = string(1)
    now: bool = boolean(2)


class PauseRequest(Message, name=_PACKAGE + "PauseRequest"):
    id: str = string(1)


class ResumeRequest(Message, name=_PACKAGE + "ResumeRequest"):
    id: str = string(1)


STATE = Method(SERVICE, "State", StateRequest, StateResponse)
CREATE = Method(SERVICE, "Create", CreateTaskRequest, CreateTaskResponse)
START = Method(SERVICE, "Start", StartRequest, StartResponse)
DELETE = Method(SERVICE, "Delete", DeleteRequest, DeleteResponse)
PIDS = Method(SERVICE, "Pids", PidsRequest, PidsResponse)
PAUSE = Method(SERVICE, "Pause", PauseRequest, Empty)
RESUME = Method(SERVICE, "Resume", ResumeRequest, Empty)
CHECKPOINT = Method(SERVICE, "Checkpoint", CheckpointTaskRequest, Empty)
KILL = Method(SERVICE, "Kill", KillRequest, Empty)
EXEC = Method(SERVICE, "Exec", ExecProcessRequest, Empty)
RESIZE_PTY = Method(SERVICE, "ResizePty", ResizePtyRequest, Empty)
CLOSE_IO = Method(SERVICE, "CloseIO", CloseIORequest, Empty)
UPDATE = Method(SERVICE, "Update", UpdateTaskRequest, Empty)
WAIT = Method(SERVICE, "Wait", WaitRequest, WaitResponse)
STATS = Method(SERVICE, "Stats", StatsRequest, StatsResponse)
CONNECT = Method(SERVICE, "Connect", ConnectRequest, ConnectResponse)
SHUTDOWN = Method(SERVICE, "Shutdown", ShutdownRequest, Empty)

METHODS = (
    STATE,
    CREATE,
    START,
    DELETE,
    PIDS,
    PAUSE,
    RESUME,
    CHECKPOINT,
    KILL,
    EXEC,
    RESIZE_PTY,
    CLOSE_IO,
    UPDATE,
    WAIT,
    STATS,
    CONNECT,
    SHUTDOWN,
)
