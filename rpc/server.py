"""The answering side of ttrpc, on any asyncio byte stream.

One task per request, answers out of order, bounded in number and bytes. It must not know any particular
service. Handlers, by what their method streams:

    neither   async def handler(request, context) -> response
    server    async def handler(request, context, send) -> None        await send(response)
    client    async def handler(context, receive) -> response          async for request in receive
    both      async def handler(context, receive, send) -> None
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from rpc.api.types import Status
from rpc.channel import BUFFER_BYTES, Channel, Inbox
from rpc.errors import (
    CasemateError,
    Code,
    DeadlineExceeded,
    Disconnected,
    InvalidArgument,
    ResourceExhausted,
    Unimplemented,
)
from rpc.method import Generic, Q, R
from rpc.ttrpc import (
    MAX_BODY_BYTES,
    NO_DATA,
    REMOTE_CLOSED,
    TYPE_DATA,
    TYPE_REQUEST,
    Request,
    encode_data,
    encode_response,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable
    from typing import Any, Self, TypeAlias

    from rpc.method import Method

    Handler: TypeAlias = Callable[..., Awaitable[Any]]
    AnyHandler: TypeAlias = (
        Callable[[Q, "Context"], Awaitable[R]]
        | Callable[[Q, "Context", "Send[R]"], Awaitable[None]]
        | Callable[["Context", "Receive[Q]"], Awaitable[R]]
        | Callable[["Context", "Receive[Q]", "Send[R]"], Awaitable[None]]
    )

_log = logging.getLogger("casemate.rpc")
_FLUSH_S = 1.0
# Go's client may take the end of the connection for the end of a call whose answer it has already (ttrpc
# 1.2.10, Client.dispatch selects between the two): a peer that was just answered is let close first.
# containerd does so as soon as it has the answer; on a busy host that can be a while.
_LINGER_S = 0.5
_MAX_ERROR_CHARS = 1 << 14


class Context:
    """What a handler is told beside the request. deadline is a monotonic time in seconds, or None."""

    __slots__ = ("deadline", "metadata", "method", "service")

    def __init__(self, service: str, method: str, metadata: dict[str, str], deadline: float | None) -> None:
        self.service, self.method = service, method
        self.metadata, self.deadline = metadata, deadline


class Receive(Generic[Q]):
    """The messages of a streaming client: `async for`, or receive(), which gives None at the end."""

    def __init__(self, inbox: Inbox, request: type[Q]) -> None:
        self._inbox, self._request = inbox, request

    async def receive(self) -> Q | None:
        body = await self._inbox.take()
        return None if body is None else self._request.decode(body)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Q:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message


class Send(Generic[R]):
    """`await send(response)`: one message of a streaming server; waits while the peer does not read."""

    def __init__(self, channel: Channel, stream_id: int, method: Method[Any, R]) -> None:
        self._channel, self._stream_id, self._method = channel, stream_id, method

    async def __call__(self, message: R) -> None:
        await self._channel.send(encode_data(self._stream_id, _checked(self._method, message)))


def _checked(method: Method[Any, R], message: R) -> R:
    if type(message) is not method.response:
        raise TypeError(f"{method} answers {method.response.__name__}, not {type(message).__name__}")
    return message


class Server:
    """Methods and their handlers, served on any number of connections.

    max_requests and max_bytes bound, per connection, the requests that are being handled.
    """

    def __init__(self, max_requests: int = 1024, max_bytes: int = 64 << 20) -> None:
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self._methods: dict[tuple[str, str], tuple[Method[Any, Any], Handler]] = {}
        self._services: set[str] = set()
        self._late: dict[str, Callable[[Server], None]] = {}
        self._connections: set[_Connection] = set()
        self._listeners: list[asyncio.Server] = []
        self._closing = False

    def add(self, method: Method[Q, R], handler: AnyHandler[Q, R], service: str | None = None) -> None:
        """Serve a method, under another service's name if one is given (task v3 is task v2 renamed)."""
        name = service or method.service
        self._services.add(name)
        self._methods[name, method.name] = (method, handler)

    def add_late(self, service: str, load: Callable[[Server], None]) -> None:
        """load: is called at the first request to a service that most servers are never asked for, to add()
        its methods: what it needs is imported then."""
        self._late[service] = load

    def find(self, service: str, method: str) -> tuple[Method[Any, Any], Handler]:
        load = self._late.pop(service, None)
        if load is not None:
            load(self)
        found = self._methods.get((service, method))
        if found is None:
            missing = f"method {method} of {service}" if service in self._services else f"service {service}"
            raise Unimplemented(f"{missing} is not implemented here")
        return found

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection until the peer closes it, or close(); then its handlers are cancelled."""
        connection = _Connection(self, Channel(reader, writer))
        self._connections.add(connection)
        try:
            if not self._closing:
                await connection.run()
        finally:
            self._connections.discard(connection)
            await connection.channel.close(_FLUSH_S)
            connection.ended.set()

    async def listen_unix(self, sock: socket.socket) -> asyncio.Server:
        """Serve every connection that a bound unix socket takes."""
        listener = await asyncio.start_unix_server(self.serve, sock=sock, limit=BUFFER_BYTES)
        self._listeners.append(listener)
        return listener

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, let handlers go on for grace_s, cancel the others (their callers see the
        connection end), and give the peers every answer that was made. Not from within a handler: it would
        wait for itself; a Shutdown handler sets an event and returns."""
        self._closing = True
        for listener in self._listeners:
            listener.close()
        async with asyncio.TaskGroup() as group:
            for connection in self._connections:
                group.create_task(connection.stop(grace_s))


class _Connection:
    def __init__(self, server: Server, channel: Channel) -> None:
        self.channel = channel
        self._server = server
        self._inboxes: dict[int, Inbox] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answering: set[int] = set()
        self._bytes = 0
        self._last_id: int | None = None
        self._reading: asyncio.Task[None]
        self._grace_s = 0.0
        self._stopped = False
        self.ended = asyncio.Event()
        """Handlers are done, what they answered was written, the connection is closed."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._reading = group.create_task(self._read_requests(group))
            await asyncio.wait((self._reading,))
            await self._finish()

    async def stop(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._stopped = True
        self._reading.cancel()
        await self.ended.wait()

    async def _finish(self) -> None:
        """Nothing more is read: end the handlers, but let answers that are being written be written."""
        if self._grace_s and self._running:
            await asyncio.wait(list(self._running.values()), timeout=self._grace_s)
        for stream_id, task in self._running.items():
            if stream_id not in self._answering:
                task.cancel()
        answering = [task for stream_id, task in self._running.items() if stream_id in self._answering]
        if answering and (await asyncio.wait(answering, timeout=_FLUSH_S))[1]:
            self.channel.abort()  # the peer does not take its answers
        elif self._stopped:
            await self.channel.until_peer_closes(_LINGER_S)

    async def _read_requests(self, group: asyncio.TaskGroup) -> None:
        try:
            while True:
                stream_id, kind, flags, body = await self.channel.read()
                try:
                    if stream_id % 2 != 1:
                        raise InvalidArgument(f"stream id {stream_id} must be odd")
                    if body is None:
                        self._too_large(stream_id)
                    elif kind == TYPE_REQUEST:
                        self._accept(group, stream_id, flags, body)
                    elif kind == TYPE_DATA:
                        await self._data(stream_id, flags, body)
                    # frames of other types belong to a later version of the protocol
                except CasemateError as error:
                    await self._refuse(stream_id, error)
        except Disconnected:
            self._grace_s = 0.0  # the peer is gone: nobody waits for an answer

    def _too_large(self, stream_id: int) -> None:
        error = ResourceExhausted(f"message larger than {MAX_BODY_BYTES} bytes")
        if stream_id not in self._inboxes:
            raise error
        self._inboxes[stream_id].end(error)  # its handler answers

    async def _refuse(self, stream_id: int, error: CasemateError) -> None:
        await self.channel.send(_failure(stream_id, error))

    def _accept(self, group: asyncio.TaskGroup, stream_id: int, flags: int, body: bytes) -> None:
        # Ids rise, and begin anew after 2**31 calls, hence the comparison modulo 2**32.
        last = self._last_id
        rises = last is None or 0 < (stream_id - last) & 0xFFFFFFFF < 1 << 31
        if not rises or stream_id in self._running:
            raise InvalidArgument(f"stream id {stream_id} was used before")
        self._last_id = stream_id
        request = Request.decode(memoryview(body))
        method, handler = self._server.find(request.service, request.method)
        if len(self._running) >= self._server.max_requests or self._bytes > self._server.max_bytes:
            raise ResourceExhausted(f"{len(self._running)} requests are being handled already")
        metadata: dict[str, str] = {}
        for pair in request.metadata:
            metadata.setdefault(pair.key.lower(), pair.value)
        deadline = monotonic() + request.timeout_nano / 1e9 if request.timeout_nano else None
        context = Context(request.service, request.method, metadata, deadline)
        inbox: Inbox | None = None
        if method.client_streams:
            inbox = self._inboxes[stream_id] = Inbox()
            if request.payload:
                inbox.put(request.payload)
            if flags & REMOTE_CLOSED:
                inbox.end()
        self._bytes += len(body)
        task = group.create_task(self._handle(stream_id, method, handler, context, request.payload, inbox))
        self._running[stream_id] = task

        def done(_: object) -> None:
            self._bytes -= len(body)
            del self._running[stream_id]
            self._answering.discard(stream_id)
            left = self._inboxes.pop(stream_id, None)
            if left is not None:
                left.discard()

        task.add_done_callback(done)

    async def _data(self, stream_id: int, flags: int, body: bytes) -> None:
        inbox = self._inboxes.get(stream_id)
        if inbox is None or inbox.ended:
            raise InvalidArgument(f"stream {stream_id} takes no data (any more)")
        if not flags & NO_DATA:
            inbox.put(body)
        if flags & REMOTE_CLOSED:
            inbox.end()
        if inbox.full:
            await inbox.space()

    async def _handle(
        self,
        stream_id: int,
        method: Method[Any, Any],
        handler: Handler,
        context: Context,
        payload: bytes | memoryview,
        inbox: Inbox | None,
    ) -> None:
        try:
            answer = await self._run(stream_id, method, handler, context, payload, inbox)
            self._answering.add(stream_id)
            await self.channel.send(answer)
        except Disconnected:
            _log.debug("%s: the caller left before the answer", method)

    async def _run(
        self,
        stream_id: int,
        method: Method[Any, Any],
        handler: Handler,
        context: Context,
        payload: bytes | memoryview,
        inbox: Inbox | None,
    ) -> bytes:
        """Run a handler; the frame that ends its stream, whatever happens in it."""

        limit = asyncio.timeout_at(context.deadline)
        first: object
        second: object
        try:
            if inbox is not None:
                first, second = context, Receive(inbox, method.request)
            else:
                first, second = method.request.decode(payload), context
            async with limit:
                if method.server_streams:
                    await handler(first, second, Send(self.channel, stream_id, method))
                    return encode_data(stream_id, None, REMOTE_CLOSED | NO_DATA)
                response = _checked(method, await handler(first, second))
                return encode_response(stream_id, response)
        except CasemateError as error:
            return _failure(stream_id, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not us: something that the handler waited for was cancelled. Its caller must not wait for ever.
            return _failure(stream_id, CasemateError(f"{method} was cancelled", code=Code.CANCELLED))
        except Exception as error:  # noqa: BLE001 - a handler's bug is its caller's error, and is logged
            if limit.expired():
                return _failure(stream_id, DeadlineExceeded(f"{method} was not done in time"))
            _log.exception("%s failed", method)
            text = str(error) or type(error).__name__
            return _failure(stream_id, CasemateError(text, code=Code.UNKNOWN))


def _failure(stream_id: int, error: CasemateError) -> bytes:
    # Names of files may be in it, which need not be UTF-8; and whole logs.
    text = str(error)[:_MAX_ERROR_CHARS].encode(errors="backslashreplace").decode()
    return encode_response(stream_id, None, Status(code=int(error.code), message=text))
