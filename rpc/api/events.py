"""The events a shim tells containerd of, and the service that takes them:
containerd.services.events.ttrpc.v1.Events at $TTRPC_ADDRESS.

An event's topic belongs to its message: see TOPICS.
"""

from __future__ import annotations

from rpc.api.types import Any, Empty, Mount, Timestamp
from rpc.codec import Message, boolean, message, messages, string, uint32
from rpc.method import Method

SERVICE = "containerd.services.events.ttrpc.v1.Events"


class TaskIO(Message, name="containerd.events.TaskIO"):
    stdin: str = string(1)
    stdout: str = string(2)
    stderr: str = string(3)
    terminal: bool = boolean(4)


class TaskCreate(Message, name="containerd.events.TaskCreate"):
    container_id: str = string(1)
    bundle: str = string(2)
    rootfs: list[Mount] = messages(3, Mount)
    io: TaskIO | None = message(4, TaskIO)
    checkpoint: str = string(5)
    pid: int = uint32(6)


class TaskStart(Message, name="containerd.events.TaskStart"):
    container_id: str = string(1)
    pid: int = uint32(2)


class TaskDelete(Message, name="containerd.events.TaskDelete"):
    """id: the exec's, or empty for the container's init."""

    container_id: str = string(1)
    pid: int = uint32(2)
    exit_status: int = uint32(3)
    exited_at: Timestamp | None = message(4, Timestamp)
    id: str = string(5)


class TaskExit(Message, name="containerd.events.TaskExit"):
    """id: the exec's, or the container's own for its init."""

    container_id: str = string(1)
    id: str = string(2)
    pid: int = uint32(3)
    exit_status: int = uint32(4)
    exited_at: Timestamp | None = message(5, Timestamp)


class TaskOOM(Message, name="containerd.events.TaskOOM"):
    container_id: str = string(1)


class TaskExecAdded(Message, name="containerd.events.TaskExecAdded"):
    container_id: str = string(1)
    exec_id: str = string(2)


class TaskExecStarted(Message, name="containerd.events.TaskExecStarted"):
    container_id: str = string(1)
    exec_id: str = string(2)
    pid: int = uint32(3)


class TaskPaused(Message, name="containerd.events.TaskPaused"):
    container_id: str = string(1)


class TaskResumed(Message, name="containerd.events.TaskResumed"):
    container_id: str = string(1)


class Envelope(Message, name="containerd.types.Envelope"):
    timestamp: Timestamp | None = message(1, Timestamp)
    namespace: str = string(2)
    topic: str = string(3)
    event: Any | None = message(4, Any)


class ForwardRequest(Message, name="containerd.services.events.ttrpc.v1.ForwardRequest"):
    envelope: Envelope | None = message(1, Envelope)


TOPICS: dict[type[Message], str] = {
    TaskCreate: "/tasks/create",
    TaskStart: "/tasks/start",
    TaskExecAdded: "/tasks/exec-added",
    TaskExecStarted: "/tasks/exec-started",
    TaskExit: "/tasks/exit",
    TaskDelete: "/tasks/delete",
    TaskOOM: "/tasks/oom",
    TaskPaused: "/tasks/paused",
    TaskResumed: "/tasks/resumed",
}

FORWARD = Method(SERVICE, "Forward", ForwardRequest, Empty)

METHODS = (FORWARD,)
