"""Our client and our server with each other: calls, streams, deadlines, cancellation, closing."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rpc.api.types import Empty
from rpc.client import Client
from rpc.errors import (
    AlreadyExists,
    CasemateError,
    Code,
    DeadlineExceeded,
    Disconnected,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    from_code,
)
from rpc.method import Method
from rpc.server import Context, Receive, Send, Server
from rpc.ttrpc import MAX_BODY_BYTES, encode_request
from tests.unit.rpc.wires import (
    CHAT,
    COUNT,
    ECHO,
    HANG,
    SERVICE,
    SUM,
    Service,
    Text,
    connected,
    ends,
    run,
    until,
)


def serving(handler: Callable[[Text, Context], Awaitable[Text]]) -> Server:
    server = Server()
    server.add(ECHO, handler)
    return server


def test_a_call_is_answered() -> None:
    async def test() -> None:
        async with connected(Service().server) as client:
            request = Text(text="hello", blob=b"\0" * 1000, number=-1)
            assert await client.call(ECHO, request) == request

    run(test())


@pytest.mark.parametrize("size", [0, 1, 65535, 1 << 20, MAX_BODY_BYTES - 100])
def test_large_messages_arrive_byte_exact(size: int) -> None:
    async def test() -> None:
        blob = os.urandom(size)
        async with connected(Service().server) as client:
            assert (await client.call(ECHO, Text(blob=blob))).blob == blob

    run(test())


def test_calls_are_answered_out_of_order() -> None:
    async def test() -> None:
        service = Service()
        async with connected(service.server) as client:
            waiting = asyncio.create_task(client.call(HANG, Empty()))
            await service.hanging.wait()
            answers = await asyncio.gather(*(client.call(ECHO, Text(number=n)) for n in range(500)))
            assert [answer.number for answer in answers] == list(range(500))
            assert not waiting.done()
        with pytest.raises(Unavailable, match="peer: the connection was closed here"):
            await waiting

    run(test())


@pytest.mark.parametrize("kind", CasemateError.__subclasses__(), ids=lambda kind: str(kind.__name__))
def test_a_handlers_error_is_the_callers_error(kind: type[CasemateError]) -> None:
    async def handler(request: Text, context: Context) -> Text:
        raise kind("pod x: broken", "what was seen", "what to do")

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(kind) as caught:
                await client.call(ECHO, Text())
            assert type(caught.value) is kind
            assert caught.value.brief == "pod x: broken: what was seen (hint: what to do)"

    run(test())


def test_an_answered_unavailable_is_not_a_lost_connection() -> None:
    async def handler(request: Text, context: Context) -> Text:
        if request.number == 1:
            raise Disconnected("the handler lost a connection of its own")
        raise Unavailable("something else is")

    async def test() -> None:
        async with connected(serving(handler)) as client:
            for number in (0, 1):
                with pytest.raises(Unavailable) as caught:
                    await client.call(ECHO, Text(number=number))
                assert type(caught.value) is Unavailable
            await client.close()
            with pytest.raises(Disconnected):
                await client.call(ECHO, Text())

    run(test())


@pytest.mark.parametrize("text", ["no such file: \udcff\udcfe", "x" * (5 << 20), "\U0001f600" * (2 << 20)])
def test_an_errors_text_may_be_long_and_not_unicode(text: str) -> None:
    async def handler(request: Text, context: Context) -> Text:
        raise NotFound(text)

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(NotFound) as caught:
                await client.call(ECHO, Text())
            assert caught.value.brief[:3] == text[:3]
            with pytest.raises(NotFound):
                await client.call(ECHO, Text())

    run(test())


def test_a_code_that_nobody_declared_is_unknown() -> None:
    assert (from_code(4711, "x").code, str(from_code(-1, "x"))) == (Code.UNKNOWN, "x")


@pytest.mark.parametrize("code", [Code.UNKNOWN, Code.ABORTED, Code.OUT_OF_RANGE, Code.UNAUTHENTICATED])
def test_a_code_without_a_type_of_its_own_is_kept(code: Code) -> None:
    async def handler(request: Text, context: Context) -> Text:
        raise CasemateError("broken", code=code)

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(CasemateError) as caught:
                await client.call(ECHO, Text())
            assert caught.value.code is code

    run(test())


def test_a_bug_in_a_handler_is_unknown_to_the_caller_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Text, context: Context) -> Text:
        raise ZeroDivisionError("bug")

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(CasemateError, match=r"^bug$") as caught:
                await client.call(ECHO, Text())
            assert caught.value.code is Code.UNKNOWN

    with caplog.at_level(logging.ERROR):
        run(test())
    assert "ZeroDivisionError: bug" in caplog.text
    assert "casemate.test.Echo/Echo failed" in caplog.text


@pytest.mark.parametrize("answer", [None, Empty(), "text"])
def test_a_handler_that_answers_something_else_is_a_bug(answer: Any) -> None:
    async def handler(request: Text, context: Context) -> Text:
        return answer  # type: ignore[no-any-return]

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(CasemateError, match="Echo answers Text, not"):
                await client.call(ECHO, Text())

    run(test())


def test_a_handler_whose_own_wait_is_cancelled_still_answers() -> None:
    async def handler(request: Text, context: Context) -> Text:
        future: asyncio.Future[Text] = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(CasemateError, match="was cancelled") as caught:
                await client.call(ECHO, Text())
            assert caught.value.code is Code.CANCELLED

    run(test())


def test_unknown_services_and_methods_are_unimplemented() -> None:
    async def test() -> None:
        async with connected(Service().server) as client:
            with pytest.raises(Unimplemented, match="service nope is not implemented here"):
                await client.call(Method("nope", "Echo", Text, Text), Text())
            with pytest.raises(Unimplemented, match=r"method Nope of casemate.test.Echo is not implemented"):
                await client.call(Method(SERVICE, "Nope", Text, Text), Text())

    run(test())


def test_a_service_may_be_loaded_when_it_is_asked_for_first() -> None:
    async def test() -> None:
        loads: list[Server] = []

        def load(server: Server) -> None:
            loads.append(server)
            server.add(ECHO, service.echo, service="casemate.test.Late")

        service = Service()
        service.server.add_late("casemate.test.Late", load)
        async with connected(service.server) as client:
            await client.call(ECHO, Text())
            assert loads == []
            for _ in range(2):
                late = Method("casemate.test.Late", "Echo", Text, Text)
                assert (await client.call(late, Text(text="x"))).text == "x"
            with pytest.raises(Unimplemented, match=r"method Nope of casemate.test.Late is not implemented"):
                await client.call(Method("casemate.test.Late", "Nope", Text, Text), Text())
            assert loads == [service.server]

    run(test())


def test_a_method_is_served_under_another_services_name() -> None:
    async def test() -> None:
        service = Service()
        service.server.add(ECHO, service.echo, service="casemate.test.v3.Echo")
        async with connected(service.server) as client:
            await client.call(Method("casemate.test.v3.Echo", "Echo", Text, Text), Text())
            await client.call(ECHO, Text())
        assert [c.service for c in service.contexts] == ["casemate.test.v3.Echo", SERVICE]
        assert service.contexts[0].method == "Echo"

    run(test())


def test_metadata_reaches_the_handler_with_lower_case_keys() -> None:
    async def test() -> None:
        service = Service()
        async with connected(service.server) as client:
            await client.call(ECHO, Text(), metadata={"Containerd-Namespace-TTRPC": "k8s.io", "b": ""})
            await client.call(ECHO, Text())
        assert [c.metadata for c in service.contexts] == [
            {"containerd-namespace-ttrpc": "k8s.io", "b": ""},
            {},
        ]

    run(test())


def test_a_late_answer_is_deadline_exceeded_on_both_sides_and_the_connection_lives() -> None:
    async def test() -> None:
        service = Service()
        async with connected(service.server) as client:
            with pytest.raises(
                DeadlineExceeded, match=r"peer: no answer to casemate.test.Echo/Hang within 0.05 s"
            ):
                await client.call(HANG, Empty(), timeout_s=0.05)
            await service.cancelled.wait()
            await client.call(ECHO, Text(), timeout_s=10.0)
        deadline = service.contexts[0].deadline
        assert deadline is not None
        assert 0 < deadline - asyncio.get_running_loop().time() <= 10

    run(test())


def test_the_server_says_deadline_exceeded_by_itself() -> None:
    """The caller's clock is not asked: its own time limit is longer than the one it sends."""

    async def test() -> None:
        async with connected(Service().server) as client:
            client_says = client._open

            async def lie(
                call: Any, method: Any, request: Any, flags: int, timeout_s: Any, metadata: Any
            ) -> None:
                await client_says(call, method, request, flags, 0.01, metadata)

            client._open = lie  # type: ignore[method-assign]
            with pytest.raises(DeadlineExceeded, match="Hang was not done in time"):
                await client.call(HANG, Empty(), timeout_s=20)

    run(test())


def test_a_timeout_of_the_handlers_own_is_not_the_callers_deadline() -> None:
    async def handler(request: Text, context: Context) -> Text:
        raise TimeoutError("something else took too long")

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(CasemateError, match="something else took too long") as caught:
                await client.call(ECHO, Text(), timeout_s=10)
            assert caught.value.code is Code.UNKNOWN

    run(test())


def test_a_cancelled_callers_answer_is_dropped() -> None:
    async def test() -> None:
        release = asyncio.Event()
        entered = asyncio.Event()

        async def handler(request: Text, context: Context) -> Text:
            if request.text == "slow":
                entered.set()
                await release.wait()
            return request

        async with connected(serving(handler)) as client:
            slow = asyncio.create_task(client.call(ECHO, Text(text="slow")))
            await entered.wait()
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            assert client._calls == {}
            release.set()
            assert (await client.call(ECHO, Text(text="next"))).text == "next"

    run(test())


def test_requests_and_answers_beyond_the_limit_are_resource_exhausted() -> None:
    async def handler(request: Text, context: Context) -> Text:
        return Text(blob=bytes(request.number))

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(ResourceExhausted, match="exceeds the limit of 4194304"):
                await client.call(ECHO, Text(blob=bytes(MAX_BODY_BYTES)))
            with pytest.raises(ResourceExhausted, match="exceeds the limit of 4194304"):
                await client.call(ECHO, Text(number=MAX_BODY_BYTES))
            assert len((await client.call(ECHO, Text(number=10))).blob) == 10

    run(test())


def test_a_message_that_cannot_be_encoded_is_the_callers_error_and_sends_nothing() -> None:
    async def test() -> None:
        async with connected(Service().server) as client:
            with pytest.raises(InvalidArgument):
                await client.call(ECHO, Text(number=1 << 63))
            assert await client.call(ECHO, Text(number=1)) == Text(number=1)

    run(test())


def test_a_server_streams() -> None:
    async def test() -> None:
        async with (
            connected(Service().server) as client,
            client.stream(COUNT, Text(text="n", number=1000)) as s,
        ):
            assert [m.number async for m in s] == list(range(1000))
            assert await s.receive() is None

    run(test())


def test_a_client_streams() -> None:
    async def test() -> None:
        async with connected(Service().server) as client, client.stream(SUM) as s:
            for number in range(1000):
                await s.send(Text(number=number))
            await s.close_send()
            await s.close_send()
            assert await s.receive() == Text(number=499500)
            assert await s.receive() is None

    run(test())


def test_both_stream_and_each_half_closes_by_itself() -> None:
    async def test() -> None:
        async with connected(Service().server) as client, client.stream(CHAT) as s:
            for word in ("a", "b"):
                await s.send(Text(text=word))
                assert await s.receive() == Text(text=word.upper())
            await s.send(Text(text="c"))
            await s.close_send()
            with pytest.raises(FailedPrecondition, match="after close_send"):
                await s.send(Text())
            assert [m.text async for m in s] == ["C"]

    run(test())


def test_empty_messages_are_messages() -> None:
    async def test() -> None:
        async with connected(Service().server) as client, client.stream(CHAT) as s:
            await s.send(Text())
            assert await s.receive() == Text()
            await s.close_send()
            assert await s.receive() is None

    run(test())


def test_streams_and_calls_share_a_connection() -> None:
    async def test() -> None:
        async with connected(Service().server) as client:

            async def chat(text: str) -> list[str]:
                async with client.stream(CHAT) as s:
                    for _ in range(20):
                        await s.send(Text(text=text))
                    await s.close_send()
                    return [m.text async for m in s]

            async with asyncio.TaskGroup() as group:
                chats = [group.create_task(chat(f"x{n}")) for n in range(20)]
                calls = [group.create_task(client.call(ECHO, Text(number=n))) for n in range(20)]
            assert [t.result() for t in chats] == [[f"X{n}"] * 20 for n in range(20)]
            assert [t.result().number for t in calls] == list(range(20))

    run(test())


@pytest.mark.parametrize("method", [COUNT, SUM, CHAT], ids=str)
def test_a_streams_error_reaches_the_caller_after_what_came_before_it(method: Method[Text, Text]) -> None:
    async def count(request: Text, context: Context, send: Send[Text]) -> None:
        await send(Text(text="before"))
        raise AlreadyExists("twice")

    async def collect(context: Context, receive: Receive[Text]) -> Text:
        await receive.receive()
        raise AlreadyExists("twice")

    async def chat(context: Context, receive: Receive[Text], send: Send[Text]) -> None:
        await receive.receive()
        await count(Text(), context, send)

    async def test() -> None:
        server = Server()
        server.add(COUNT, count)
        server.add(SUM, collect)
        server.add(CHAT, chat)
        request = None if method.client_streams else Text()
        async with connected(server) as client, client.stream(method, request) as s:
            if method.client_streams:
                await s.send(Text())
            if method.server_streams:
                assert await s.receive() == Text(text="before")
            for _ in range(2):
                with pytest.raises(AlreadyExists, match="twice"):
                    await s.receive()
            if method.client_streams:
                with pytest.raises(AlreadyExists, match="twice"):
                    await s.send(Text())

    run(test())


def test_sending_to_a_stream_that_the_server_has_ended_is_unavailable() -> None:
    async def chat(context: Context, receive: Receive[Text], send: Send[Text]) -> None:
        return

    async def test() -> None:
        server = Server()
        server.add(CHAT, chat)
        async with connected(server) as client, client.stream(CHAT) as s:
            assert await s.receive() is None
            with pytest.raises(Unavailable, match="was ended by the server"):
                await s.send(Text())

    run(test())


def test_a_handler_that_streams_something_else_is_a_bug() -> None:
    async def count(request: Text, context: Context, send: Send[Any]) -> None:
        await send(Empty())

    async def test() -> None:
        server = Server()
        server.add(COUNT, count)
        async with connected(server) as client, client.stream(COUNT, Text()) as s:
            with pytest.raises(CasemateError, match="Count answers Text, not Empty"):
                await s.receive()

    run(test())


def test_leaving_a_stream_early_tells_the_handler_and_drops_the_rest() -> None:
    async def test() -> None:
        ended = asyncio.Event()

        async def chat(context: Context, receive: Receive[Text], send: Send[Text]) -> None:
            async for message in receive:
                await send(message)
            ended.set()

        service = Service()
        service.server.add(CHAT, chat)
        async with connected(service.server) as client:
            async with client.stream(CHAT) as s:
                await s.send(Text(text="x"))
            await ended.wait()
            async with client.stream(COUNT, Text(number=5)) as s:
                assert (await s.receive()) == Text()
            assert await client.call(ECHO, Text(text="still here")) == Text(text="still here")
            assert client._calls == {}

    run(test())


def test_a_streams_time_limit_holds_for_receiving_and_is_known_to_the_handler() -> None:
    async def test() -> None:
        stopped = asyncio.Event()

        async def chat(context: Context, receive: Receive[Text], send: Send[Text]) -> None:
            try:
                await receive.receive()
            finally:
                stopped.set()

        server = Server()
        server.add(CHAT, chat)
        async with connected(server) as client:
            async with client.stream(CHAT, timeout_s=0.05) as s:
                with pytest.raises(DeadlineExceeded):
                    await s.receive()
            await stopped.wait()

    run(test())


def test_a_stream_is_asked_for_as_its_method_is_declared() -> None:
    async def test() -> None:
        async with connected(Service().server) as client:
            with pytest.raises(TypeError, match="is unary"):
                client.stream(ECHO, Text())
            with pytest.raises(TypeError, match="pass the request"):
                client.stream(COUNT)
            with pytest.raises(TypeError, match="send the messages"):
                client.stream(SUM, Text())

    run(test())


def test_a_slow_receiver_gets_everything_and_the_sender_waits() -> None:
    """More than an inbox holds, in one stream that nobody reads for a while."""

    async def test() -> None:
        sent = 0
        started = asyncio.Event()

        async def count(request: Text, context: Context, send: Send[Text]) -> None:
            nonlocal sent
            for number in range(64):
                await send(Text(number=number, blob=bytes(1 << 20)))
                sent += 1
                started.set()

        server = Server()
        server.add(COUNT, count)
        async with connected(server) as client, client.stream(COUNT, Text()) as s:
            await started.wait()
            await until(lambda: s._inbox.full)
            assert sent < 32
            assert [m.number async for m in s] == list(range(64))

    run(test())


def test_a_server_that_goes_away_fails_everything_that_waits() -> None:
    async def test() -> None:
        service = Service()
        async with connected(service.server) as client:
            call = asyncio.create_task(client.call(HANG, Empty()))
            async with client.stream(CHAT) as s:
                waiting = asyncio.create_task(s.receive())
                await service.hanging.wait()
                await service.server.close()
                with pytest.raises(Unavailable, match="peer: connection closed"):
                    await call
                with pytest.raises(Unavailable, match="peer: connection closed"):
                    await waiting
                with pytest.raises(Unavailable):
                    await s.send(Text())
            await client.closed()
            assert client.is_closed
            with pytest.raises(Unavailable, match="peer: connection closed"):
                await client.call(ECHO, Text())
        assert service.cancelled.is_set()

    run(test())


def test_a_client_that_goes_away_cancels_its_handlers() -> None:
    async def test() -> None:
        service = Service()
        async with connected(service.server) as client:
            task = asyncio.create_task(client.call(HANG, Empty()))
            await service.hanging.wait()
            await client.close()
            await service.cancelled.wait()
            with pytest.raises(Unavailable):
                await task
            await client.close()
            assert client.is_closed

    run(test())


def test_closed_before_anything_ran_is_closed() -> None:
    async def test() -> None:
        async with connected(Service().server) as client:
            await client.close()
            await client.closed()
            with pytest.raises(Unavailable, match="closed here"):
                await client.call(ECHO, Text())

    run(test())


def test_the_answer_to_shutdown_is_flushed_before_the_server_ends() -> None:
    async def test() -> None:
        stop = asyncio.Event()

        async def handler(request: Text, context: Context) -> Text:
            stop.set()
            return Text(blob=bytes(3 << 20))

        server = serving(handler)

        async def ending() -> None:
            await stop.wait()
            await server.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(ending())
            async with connected(server) as client:
                assert len((await client.call(ECHO, Text())).blob) == 3 << 20
                await client.closed()

    run(test())


def test_close_returns_when_the_answers_are_written_and_not_before() -> None:
    async def test() -> None:
        answered = asyncio.Event()

        async def handler(request: Text, context: Context) -> Text:
            answered.set()
            return Text(blob=bytes(3 << 20))

        server = serving(handler)
        here, there = await ends()
        serve = asyncio.create_task(server.serve(*there))
        here[1].write(encode_request(1, ECHO, Text()))
        reading = asyncio.create_task(here[0].read(-1))
        await answered.wait()
        await server.close()
        assert there[1].transport.get_write_buffer_size() == 0
        await serve
        assert len(await reading) > 3 << 20
        here[1].close()

    run(test())


def test_handlers_may_finish_within_the_grace() -> None:
    async def test() -> None:
        entered, release = asyncio.Event(), asyncio.Event()

        async def handler(request: Text, context: Context) -> Text:
            entered.set()
            await release.wait()
            return request

        service = Service()
        service.server.add(ECHO, handler)
        async with asyncio.TaskGroup() as group, connected(service.server) as client:
            call = group.create_task(client.call(ECHO, Text(text="finished")))
            await entered.wait()
            closing = group.create_task(service.server.close(grace_s=20))
            asyncio.get_running_loop().call_soon(release.set)
            assert (await call).text == "finished"
            await closing

    run(test())


def test_a_closed_server_serves_no_new_connection() -> None:
    async def test() -> None:
        service = Service()
        await service.server.close()
        async with connected(service.server) as client:
            with pytest.raises(Unavailable):
                await client.call(ECHO, Text())

    run(test())


def test_cancelling_serve_cancels_its_handlers_and_closes() -> None:
    async def test() -> None:
        service = Service()
        here, there = await ends()
        serving = asyncio.create_task(service.server.serve(*there))
        async with Client(*here) as client:
            call = asyncio.create_task(client.call(HANG, Empty()))
            await service.hanging.wait()
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
            assert service.cancelled.is_set()
            with pytest.raises(Unavailable):
                await call

    run(test())


def test_unix_sockets(tmp_path: Path) -> None:
    async def test() -> None:
        path = str(tmp_path / "socket")
        with pytest.raises(Unavailable, match=f"cannot connect: {path}: No such file"):
            await Client.connect_unix(path)
        service = Service()
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        await service.server.listen_unix(sock)
        async with (
            await Client.connect_unix(path) as first,
            await Client.connect_unix(path, "agent") as second,
        ):
            await first.call(ECHO, Text())
            waiting = asyncio.create_task(second.call(HANG, Empty()))
            await service.hanging.wait()
            await service.server.close()
            with pytest.raises(Unavailable, match="agent: connection closed"):
                await waiting
            await first.closed()
        with pytest.raises(Unavailable):
            await Client.connect_unix(path)

    run(test())


def test_stream_ids_begin_anew_and_skip_those_in_use() -> None:
    async def test() -> None:
        service = Service()
        async with connected(service.server) as client:
            await client.call(ECHO, Text())  # the server has seen an id
            waiting = asyncio.create_task(client.call(HANG, Empty()))  # this one is 3
            await service.hanging.wait()
            for start in (0x7FFFFFFF, 0xFFFFFFF9):  # two jumps, as 2**31 calls would make many small steps
                client._next_id = start
                for number in range(4):
                    assert (await client.call(ECHO, Text(number=number))).number == number
            assert client._next_id == 1
            await client.call(ECHO, Text())
            await client.call(ECHO, Text())
            assert client._next_id == 7  # 3 was skipped
            waiting.cancel()

    run(test())


def test_the_client_reports_a_missing_message_and_words_that_are_not_fit_for_a_terminal() -> None:
    async def handler(request: Text, context: Context) -> Text:
        raise NotFound(request.text)

    async def test() -> None:
        async with connected(serving(handler)) as client:
            with pytest.raises(NotFound, match=r"casemate.test.Echo/Echo: failed without a message"):
                await client.call(ECHO, Text())
            with pytest.raises(NotFound) as caught:
                await client.call(ECHO, Text(text="a\x1b[31mred\u202e\nline\ttab" + "x" * 10_000))
            assert caught.value.brief.startswith("a?[31mred?\nline\ttabxxx")
            assert len(caught.value.brief) == 4096

    run(test())


def test_a_caller_that_waits_its_turn_to_write_learns_that_the_peer_is_gone() -> None:
    async def test() -> None:
        here, there = await ends()
        async with Client(*here, name="peer") as client, asyncio.TaskGroup() as group:
            calls = [group.create_task(lost(client.call(ECHO, Text(blob=bytes(3 << 20))))) for _ in range(5)]
            await until(client._channel.lock.locked)
            there[1].transport.abort()
            for call in calls:
                assert (await call).brief.startswith("peer: connection")

    async def lost(call: Awaitable[object]) -> Disconnected:
        with pytest.raises(Disconnected) as caught:
            await call
        return caught.value

    run(test())


def test_a_stream_that_cannot_be_opened_or_written_in_time_is_deadline_exceeded() -> None:
    async def test() -> None:
        here, there = await ends()
        async with Client(*here, name="peer") as client:
            async with client.stream(CHAT, timeout_s=0.05) as s:
                with pytest.raises(DeadlineExceeded, match="peer: no answer to"):
                    while True:
                        await s.send(Text(blob=bytes(1 << 20)))
            with pytest.raises(DeadlineExceeded, match="peer: no answer to"):
                async with client.stream(CHAT, timeout_s=0.01):
                    raise AssertionError("the peer takes nothing")
            assert client._calls == {}
        there[1].close()

    run(test())
