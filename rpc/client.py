"""The calling side of ttrpc, on any asyncio byte stream.

The peer may be a hostile guest: answers are matched, bounded and decoded with limits, its words are
cleaned, and only CasemateErrors leave this module. It must not know any particular service.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from rpc.channel import BUFFER_BYTES, Channel, Inbox
from rpc.errors import (
    CasemateError,
    DeadlineExceeded,
    Disconnected,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    Unavailable,
    from_code,
    printable,
)
from rpc.method import Generic, Q, R
from rpc.ttrpc import (
    MAX_BODY_BYTES,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    TYPE_DATA,
    TYPE_RESPONSE,
    Response,
    encode_data,
    encode_request,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Self

    from rpc.method import Method

_MAX_ERROR_CHARS = 4096
_FLUSH_S = 0.1
_MAX_TIMEOUT_NS = (1 << 63) - 1


def _answer_of(what: object, body: bytes) -> bytes | memoryview:
    """The payload of a Response, or the error that it carries."""
    try:
        response = Response.decode(memoryview(body))
    except CasemateError as error:
        raise Internal(f"{what}: malformed answer", str(error)) from None
    status = response.status
    if status is None or status.code == 0:
        return response.payload
    # The peer's words end up in logs and on terminals.
    words = printable(status.message, _MAX_ERROR_CHARS, keeping="\n\t")
    raise from_code(status.code, words or f"{what}: failed without a message")


def _decode(method: Method[Any, R], payload: bytes | memoryview) -> R:
    try:
        return method.response.decode(payload)
    except CasemateError as error:
        raise Internal(f"{method}: malformed answer", str(error)) from None


class Client:
    """A connection to a server. Owns one task, which reads the answers, until close() or the peer goes.

    name says in errors who the peer is.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = "server"
    ) -> None:
        self.name = name
        self._channel = Channel(reader, writer)
        self._next_id = 1
        self._calls: dict[int, _Call | Stream[Any, Any]] = {}
        self._gone = asyncio.Event()
        self._lost: tuple[str, str | None] | None = None
        self._reading = asyncio.get_running_loop().create_task(self._read_answers(), name=f"ttrpc {name}")

    @classmethod
    async def connect_unix(cls, path: str, name: str | None = None) -> Self:
        """Unavailable: nobody listens there."""
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=BUFFER_BYTES)
        except OSError as error:
            raise Unavailable(
                f"{name or path}: cannot connect", f"{path}: {error.strerror or error}"
            ) from None
        return cls(reader, writer, name or path)

    async def call(
        self,
        method: Method[Q, R],
        request: Q,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> R:
        """One request, one answer. Raises the error that the peer answered, Disconnected when it is or goes
        away, DeadlineExceeded after timeout_s (which the peer is told, too). When the awaiting task is
        cancelled, a later answer is dropped."""
        call = _Call(asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                await self._open(call, method, request, 0, timeout_s, metadata)
                body = await call.answer
        except TimeoutError:
            raise self._late(method, timeout_s) from None
        finally:
            self._forget(call)
        return _decode(method, _answer_of(method, body))

    def stream(
        self,
        method: Method[Q, R],
        request: Q | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Stream[Q, R]:
        """`async with client.stream(...) as s`. The request is sent at entry, unless the client streams.
        timeout_s is for the whole stream."""
        return Stream(self, method, request, timeout_s, metadata)

    @property
    def is_closed(self) -> bool:
        return self._gone.is_set()

    async def closed(self) -> None:
        """Wait until the connection is gone, whoever ended it."""
        await self._gone.wait()

    async def close(self) -> None:
        """End the connection; what waits for an answer gets Disconnected. May be called again."""
        self._reading.cancel()
        await asyncio.wait((self._reading,))
        self._end("the connection was closed here")  # if it had not even begun to read
        await self._channel.close(_FLUSH_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _late(self, method: object, timeout_s: float | None) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.name}: no answer to {method} within {timeout_s} s")

    async def _open(
        self,
        call: _Call | Stream[Any, Any],
        method: Method[Any, Any],
        request: Any,
        flags: int,
        timeout_s: float | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        """Send a request under a new stream id. Ids must rise on the wire, hence under the lock."""
        timeout_ns = 0 if timeout_s is None else max(1, min(int(timeout_s * 1e9), _MAX_TIMEOUT_NS))
        async with self._channel.lock:
            await self._drain()
            stream_id = self._next_id
            while stream_id in self._calls:  # after 2**31 calls the ids begin anew
                stream_id = (stream_id + 2) & 0xFFFFFFFF
            self._channel.put(encode_request(stream_id, method, request, flags, timeout_ns, metadata))
            self._next_id = (stream_id + 2) & 0xFFFFFFFF
            call.stream_id = stream_id
            self._calls[stream_id] = call

    async def _drain(self) -> None:
        """With the lock held, before something is put."""
        if self._lost is None:
            try:
                await self._channel.drain()
            except Disconnected as error:
                raise Disconnected(f"{self.name}: {error.brief}", error.details) from None
        if self._lost is not None:
            raise Disconnected(*self._lost)

    def _forget(self, call: _Call | Stream[Any, Any]) -> None:
        self._calls.pop(call.stream_id, None)

    async def _read_answers(self) -> None:
        lost, details = "the connection was closed here", None
        try:
            while True:
                stream_id, kind, flags, body = await self._channel.read()
                call = self._calls.get(stream_id)
                if call is None:
                    continue  # its caller has left
                if body is None:
                    call.fail(ResourceExhausted(f"{self.name}: answer larger than {MAX_BODY_BYTES} bytes"))
                elif call.deliver(kind, flags, body):
                    await call.space()
        except Disconnected as error:
            lost, details = error.brief, error.details
            self._channel.abort()  # nobody is there to take what is still to be written
        finally:
            self._end(lost, details)

    def _end(self, lost: str, details: str | None = None) -> None:
        if self._lost is None:
            self._lost = (f"{self.name}: {lost}", details)
            for call in list(self._calls.values()):
                call.fail(Disconnected(*self._lost))
            self._calls.clear()
            self._gone.set()


class _Call:
    """A unary call that waits for its answer."""

    __slots__ = ("answer", "stream_id")

    def __init__(self, answer: asyncio.Future[bytes]) -> None:
        self.answer = answer
        self.stream_id = 0

    def deliver(self, kind: int, flags: int, body: bytes) -> bool:
        if kind == TYPE_RESPONSE:
            if not self.answer.done():
                self.answer.set_result(body)
        elif kind == TYPE_DATA:
            self.fail(Internal("a stream's data came as the answer to a unary call"))
        return False

    async def space(self) -> None:
        """Never full."""

    def fail(self, error: CasemateError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Stream(Generic[Q, R]):
    """One streaming call. ttrpc cannot tell a server that its caller left: leaving the context early only
    drops what still arrives (and says that nothing more is sent, where the client streams)."""

    def __init__(
        self,
        client: Client,
        method: Method[Q, R],
        request: Q | None,
        timeout_s: float | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        if not method.streams:
            raise TypeError(f"{method} is unary: use call()")
        if (request is None) is not method.client_streams:
            raise TypeError(
                f"{method}: {'send the messages' if method.client_streams else 'pass the request'}"
            )
        self._client, self._method, self._request = client, method, request
        self._timeout_s, self._metadata = timeout_s, metadata
        self._deadline: float | None = None
        self._inbox = Inbox()
        self._sending = method.client_streams
        self.stream_id = 0

    async def __aenter__(self) -> Self:
        flags = REMOTE_OPEN if self._sending else REMOTE_CLOSED
        if self._timeout_s is not None:
            self._deadline = monotonic() + self._timeout_s
        client = self._client
        try:
            async with asyncio.timeout_at(self._deadline):
                await client._open(self, self._method, self._request, flags, self._timeout_s, self._metadata)
        except TimeoutError:
            raise client._late(self._method, self._timeout_s) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        unfinished = self._sending and not self._inbox.ended and not self._client.is_closed
        self._client._forget(self)
        self._inbox.discard()
        self._sending = False
        if unfinished:
            self._client._channel.put(encode_data(self.stream_id, None, REMOTE_CLOSED | NO_DATA))

    async def send(self, message: Q) -> None:
        """Send one message, waiting while the peer does not read. FailedPrecondition: after close_send().
        When the server has ended the stream: its error, or Unavailable."""
        await self._send(encode_data(self.stream_id, message))

    async def close_send(self) -> None:
        """Say that nothing more is sent; answers still come."""
        if self._sending:
            await self._send(encode_data(self.stream_id, None, REMOTE_CLOSED | NO_DATA))
            self._sending = False

    async def _send(self, data: bytes) -> None:
        if not self._sending:
            raise FailedPrecondition(f"{self._method}: nothing can be sent after close_send()")
        if self._inbox.ended:
            raise self._inbox.error or Unavailable(
                f"{self._client.name}: {self._method} was ended by the server"
            )
        try:
            async with asyncio.timeout_at(self._deadline), self._client._channel.lock:
                await self._client._drain()
                self._client._channel.put(data)
        except TimeoutError:
            raise self._client._late(self._method, self._timeout_s) from None

    async def receive(self) -> R | None:
        """The next message; None when the server has ended the stream well."""
        try:
            async with asyncio.timeout_at(self._deadline):
                body = await self._inbox.take()
        except TimeoutError:
            raise self._client._late(self._method, self._timeout_s) from None
        return None if body is None else _decode(self._method, body)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message

    def deliver(self, kind: int, flags: int, body: bytes) -> bool:
        """A frame of this stream arrived. True: the connection's reader must wait for space()."""
        if kind == TYPE_RESPONSE:
            try:
                self._inbox.put(_answer_of(self._method, body))
            except CasemateError as error:
                self._inbox.end(error)
            self._inbox.end()
        elif kind == TYPE_DATA:
            if not self._method.server_streams:
                self._inbox.end(Internal(f"{self._method}: the server must not stream"))
            if not flags & NO_DATA:
                self._inbox.put(body)
            if flags & REMOTE_CLOSED:
                self._inbox.end()
        return self._inbox.full

    async def space(self) -> None:
        await self._inbox.space()

    def fail(self, error: CasemateError) -> None:
        self._inbox.end(error)
