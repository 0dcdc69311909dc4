"""ttrpc on the wire: frame headers, the two envelopes, and what a method is.

Frames are `length u32, stream u32, type u8, flags u8` and a body of at most 4 MiB
(containerd/ttrpc PROTOCOL.md). No input or output here, and no asyncio: see rpc/channel.py.
"""

from __future__ import annotations

from struct import Struct

from rpc.api.types import Status
from rpc.codec import Message, buffer, int64, message, messages, string
from rpc.errors import ResourceExhausted
from rpc.method import Method

__all__ = [
    "HEADER",
    "MAX_BODY_BYTES",
    "NO_DATA",
    "REMOTE_CLOSED",
    "REMOTE_OPEN",
    "TYPE_DATA",
    "TYPE_REQUEST",
    "TYPE_RESPONSE",
    "KeyValue",
    "Method",
    "Request",
    "Response",
    "encode_data",
    "encode_request",
    "encode_response",
    "frame",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rpc.wire import Chunks

HEADER = Struct(">IIBB")
MAX_BODY_BYTES = 4 << 20
TYPE_REQUEST, TYPE_RESPONSE, TYPE_DATA = 1, 2, 3
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4
"""Flags, from the sender's view: I send no more; I shall send more; the body means nothing."""


class KeyValue(Message, name="ttrpc.KeyValue"):
    key: str = string(1)
    value: str = string(2)


class Request(Message, name="ttrpc.Request"):
    service: str = string(1)
    method: str = string(2)
    payload: bytes | memoryview = buffer(3)
    timeout_nano: int = int64(4)
    metadata: list[KeyValue] = messages(5, KeyValue)


class Response(Message, name="ttrpc.Response"):
    """A success has no status."""

    status: Status | None = message(1, Status)
    payload: bytes | memoryview = buffer(2)


class _RequestOf(Message):
    """A Request around a message that is encoded in place, so that large payloads are not copied."""

    service: str = string(1)
    method: str = string(2)
    payload: Message | None = message(3, Message)
    timeout_nano: int = int64(4)
    metadata: list[KeyValue] = messages(5, KeyValue)


class _ResponseOf(Message):
    status: Status | None = message(1, Status)
    payload: Message | None = message(2, Message)


def frame(stream_id: int, kind: int, flags: int, size: int, chunks: Chunks) -> bytes:
    """One frame, ready to be written. ResourceExhausted: the body is larger than the protocol allows."""
    if size > MAX_BODY_BYTES:
        raise ResourceExhausted(f"message of {size} bytes exceeds the limit of {MAX_BODY_BYTES}")
    return b"".join((HEADER.pack(size, stream_id, kind, flags), *chunks))


def encode_request(
    stream_id: int,
    method: Method[Any, Any],
    payload: Message | None,
    flags: int = 0,
    timeout_nano: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    pairs = [KeyValue(key=key.lower(), value=value) for key, value in (metadata or {}).items()]
    request = _RequestOf(
        service=method.service,
        method=method.name,
        payload=payload,
        timeout_nano=timeout_nano,
        metadata=pairs,
    )
    chunks: Chunks = []
    return frame(stream_id, TYPE_REQUEST, flags, request.encode_into(chunks), chunks)


def encode_response(stream_id: int, payload: Message | None, status: Status | None = None) -> bytes:
    chunks: Chunks = []
    size = _ResponseOf(status=status, payload=payload).encode_into(chunks)
    return frame(stream_id, TYPE_RESPONSE, 0, size, chunks)


def encode_data(stream_id: int, payload: Message | None, flags: int = 0) -> bytes:
    chunks: Chunks = []
    size = payload.encode_into(chunks) if payload is not None else 0
    return frame(stream_id, TYPE_DATA, flags, size, chunks)
