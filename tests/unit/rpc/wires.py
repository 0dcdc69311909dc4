"""A small service that streams in every direction, and connections to try it on: real sockets, no mocks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from rpc import codec
from rpc.api.types import Empty
from rpc.channel import Channel
from rpc.client import Client
from rpc.codec import Message
from rpc.method import Method
from rpc.server import Context, Receive, Send, Server

T = TypeVar("T")
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Text(Message, name="casemate.test.Text"):
    text: str = codec.string(1)
    blob: bytes = codec.bytes_(2)
    number: int = codec.int64(3)


SERVICE = "casemate.test.Echo"
ECHO = Method(SERVICE, "Echo", Text, Text)
HANG = Method(SERVICE, "Hang", Empty, Empty)
COUNT = Method(SERVICE, "Count", Text, Text, server_streams=True)
SUM = Method(SERVICE, "Sum", Text, Text, client_streams=True)
CHAT = Method(SERVICE, "Chat", Text, Text, client_streams=True, server_streams=True)


class Service:
    """Handlers of every shape. hanging and cancelled say what the handlers of HANG saw."""

    def __init__(self) -> None:
        self.hanging = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.contexts: list[Context] = []
        self.server = Server()
        self.server.add(ECHO, self.echo)
        self.server.add(HANG, self.hang)
        self.server.add(COUNT, self.count)
        self.server.add(SUM, self.sum)
        self.server.add(CHAT, self.chat)

    async def echo(self, request: Text, context: Context) -> Text:
        self.contexts.append(context)
        return request

    async def hang(self, request: Empty, context: Context) -> Empty:
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Empty()

    async def count(self, request: Text, context: Context, send: Send[Text]) -> None:
        for number in range(request.number):
            await send(Text(text=request.text, number=number))

    async def sum(self, context: Context, receive: Receive[Text]) -> Text:
        total = 0
        async for message in receive:
            total += message.number
        return Text(number=total)

    async def chat(self, context: Context, receive: Receive[Text], send: Send[Text]) -> None:
        async for message in receive:
            await send(Text(text=message.text.upper(), blob=message.blob))


async def ends() -> tuple[Ends, Ends]:
    here, there = socket.socketpair()
    return await asyncio.open_connection(sock=here), await asyncio.open_connection(sock=there)


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Client]:
    """A client of a server, each on its end of a socket; both are closed at the end."""
    here, there = await ends()
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(*there))
        async with Client(*here, name="peer") as client:
            yield client
        await serving


class Liar:
    """A peer that sends what it wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.channel = Channel(reader, writer)

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hang_up(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@asynccontextmanager
async def client_of_liar() -> AsyncIterator[tuple[Client, Liar]]:
    here, there = await ends()
    liar = Liar(*there)
    async with Client(*here, name="peer") as client:
        yield client, liar
    await liar.hang_up()


@asynccontextmanager
async def server_of_liar(server: Server) -> AsyncIterator[Liar]:
    here, there = await ends()
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(*here))
        liar = Liar(*there)
        yield liar
        await liar.hang_up()
        await serving


async def until(true: Callable[[], bool]) -> None:
    """Let the loop turn until something is so that has no event of its own; run() bounds it."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0)


def pass_time(seconds: float) -> None:
    """As if so long had passed: what waits until then in this loop waits no longer, and what follows has all
    its time. run() allows for less than half a minute of it.
    """
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; one that hangs fails instead."""

    async def bounded() -> T:
        async with asyncio.timeout(30):
            return await test

    return asyncio.run(bounded())
