"""Peers that lie: the client of a hostile guest, and a server of a hostile caller.

Whatever they send, memory is bounded, only CasemateErrors come out, and the next call works where the
connection is still there.
"""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpc.api.types import Empty
from rpc.channel import INBOX_MESSAGES
from rpc.errors import CasemateError, Code, DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from rpc.server import Context, Receive, Send, Server
from rpc.ttrpc import (
    MAX_BODY_BYTES,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    TYPE_DATA,
    TYPE_REQUEST,
    TYPE_RESPONSE,
    Request,
    Response,
    encode_data,
    encode_request,
    encode_response,
    frame,
)
from tests.unit.rpc.wires import (
    CHAT,
    COUNT,
    ECHO,
    HANG,
    SUM,
    Liar,
    Service,
    Text,
    client_of_liar,
    run,
    server_of_liar,
    until,
)


def raw(stream_id: int, kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    return frame(stream_id, kind, flags, len(body), [body])


async def refused(liar: Liar, stream_id: int) -> tuple[Code, str]:
    """The error in the next frame, which must belong to stream_id."""
    answered, kind, _, body = await liar.channel.read()
    assert (answered, kind) == (stream_id, TYPE_RESPONSE)
    status = Response.decode(body or b"").status
    assert status is not None
    return Code(status.code), status.message


# ------------------------------------------------------------------ the client of a lying server


@pytest.mark.parametrize(
    "answer",
    [
        raw(1, TYPE_RESPONSE, b"\xff"),
        raw(1, TYPE_RESPONSE, b"\x12\x02\x0a\xff"),
        raw(1, TYPE_RESPONSE, b"\x0a\x05\x08\x01"),
        raw(1, TYPE_DATA, b""),
    ],
    ids=["envelope", "message", "status", "data"],
)
def test_a_malformed_answer_is_internal_and_the_connection_lives(answer: bytes) -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar), asyncio.TaskGroup() as group:
            call = group.create_task(expect(client.call(ECHO, Text()), Internal))
            await liar.channel.read()
            await liar.say(answer)
            await call
            again = group.create_task(client.call(ECHO, Text()))
            await liar.channel.read()
            await liar.say(encode_response(3, Text(text="fine")))
            assert (await again).text == "fine"

    run(test())


async def expect(call: object, kind: type[CasemateError]) -> CasemateError:
    with pytest.raises(kind) as caught:
        await call  # type: ignore[misc]
    return caught.value


def test_answers_that_nobody_waits_for_are_dropped() -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar), asyncio.TaskGroup() as group:
            call = group.create_task(client.call(ECHO, Text()))
            await liar.channel.read()
            nonsense = [raw(i, kind, b"\xff" * 50) for i in (0, 2, 3, 99, 0xFFFFFFFF) for kind in range(5)]
            unknown_kinds = [raw(1, kind, b"\xff" * 50) for kind in (0, 1, 4, 255)]
            await liar.say(b"".join(nonsense + unknown_kinds))
            await liar.say(encode_response(1, Text(text="first")) + encode_response(1, Text(text="second")))
            assert (await call).text == "first"

    run(test())


def test_an_answer_larger_than_the_limit_fails_its_call_only() -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar), asyncio.TaskGroup() as group:
            call = group.create_task(expect(client.call(ECHO, Text()), ResourceExhausted))
            await liar.channel.read()
            await liar.say(struct.pack(">IIBB", MAX_BODY_BYTES + 1, 1, TYPE_RESPONSE, 0))
            for _ in range(4):
                await liar.say(bytes(1 << 20))
            await liar.say(b"x")
            assert "peer: answer larger than 4194304 bytes" in str(await call)
            again = group.create_task(client.call(ECHO, Text()))
            await liar.channel.read()
            await liar.say(encode_response(3, Text(text="fine")))
            assert (await again).text == "fine"

    run(test())


def test_a_peer_that_announces_4_gib_and_falls_silent_costs_no_memory_and_the_caller_its_time_limit() -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar):
            await liar.say(struct.pack(">IIBB", 0xFFFFFFFF, 1, TYPE_RESPONSE, 0) + b"x" * 100)
            with pytest.raises(DeadlineExceeded):
                await client.call(ECHO, Text(), timeout_s=0.05)

    run(test())


def test_a_peer_that_hangs_up_within_a_frame_is_unavailable() -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar), asyncio.TaskGroup() as group:
            call = group.create_task(expect(client.call(ECHO, Text()), Unavailable))
            await liar.channel.read()
            await liar.say(encode_response(1, Text(text="x" * 100))[:50])
            await liar.hang_up()
            assert str(await call) == "peer: connection closed in the middle of a message"
            await client.closed()

    run(test())


def test_a_peer_that_does_not_read_costs_the_caller_its_time_limit_and_one_message() -> None:
    async def test() -> None:
        async with client_of_liar() as (client, _):
            blob = bytes(3 << 20)
            for _ in range(20):
                with pytest.raises(DeadlineExceeded):
                    await client.call(ECHO, Text(blob=blob), timeout_s=0.01)
            transport = client._channel._writer.transport
            assert transport.get_write_buffer_size() < 2 * len(blob)

    run(test())


def test_a_flood_on_a_stream_is_held_back_and_nothing_is_lost() -> None:
    async def test() -> None:
        count = 20 * INBOX_MESSAGES

        async def flood(liar: Liar) -> None:
            for number in range(count):
                await liar.say(encode_data(1, Text(number=number, text="x" * 1000)))
            await liar.say(encode_data(1, None, REMOTE_CLOSED | NO_DATA))

        async with (
            client_of_liar() as (client, liar),
            asyncio.TaskGroup() as group,
            client.stream(COUNT, Text()) as s,
        ):
            flooding = group.create_task(flood(liar))
            await until(lambda: s._inbox.full)
            assert not flooding.done()
            assert len(s._inbox._waiting) == INBOX_MESSAGES
            assert [m.number async for m in s] == list(range(count))

    run(test())


def test_leaving_a_flooded_stream_frees_the_connection() -> None:
    async def test() -> None:
        async def flood(liar: Liar) -> None:
            for _ in range(4 * INBOX_MESSAGES):
                await liar.say(encode_data(1, Text(text="x" * 1000)))
            await liar.say(encode_response(3, Text(text="answer")))

        async with client_of_liar() as (client, liar), asyncio.TaskGroup() as group:
            async with client.stream(COUNT, Text()) as s:
                group.create_task(flood(liar))
                await until(lambda: s._inbox.full)
            assert (await client.call(ECHO, Text())).text == "answer"

    run(test())


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([raw(1, TYPE_DATA, b"\xff")], Internal),
        ([raw(1, TYPE_RESPONSE, b"\xff")], Internal),
        (
            [struct.pack(">IIBB", MAX_BODY_BYTES + 1, 1, TYPE_DATA, 0), bytes(MAX_BODY_BYTES + 1)],
            ResourceExhausted,
        ),
    ],
    ids=["message", "envelope", "size"],
)
def test_malformed_messages_on_a_stream_are_its_error(
    frames: list[bytes], error: type[CasemateError]
) -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar), client.stream(CHAT) as s, asyncio.TaskGroup() as group:
            receiving = group.create_task(expect(s.receive(), error))
            for piece in frames:
                await liar.say(piece)
            await receiving

    run(test())


def test_data_after_the_end_of_a_stream_is_dropped() -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar), client.stream(COUNT, Text()) as s:
            await liar.say(raw(1, 77, b"\xff"))
            await liar.say(
                encode_data(1, Text(text="last"), REMOTE_CLOSED) + encode_data(1, Text(text="late")) * 1000
            )
            assert [m.text async for m in s] == ["last"]

    run(test())


def test_a_server_that_must_not_stream_and_does_is_internal() -> None:
    async def test() -> None:
        async with client_of_liar() as (client, liar), client.stream(SUM) as s:
            await liar.say(encode_data(1, Text()))
            with pytest.raises(Internal, match="must not stream"):
                await s.receive()

    run(test())


@settings(max_examples=200)
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8), st.booleans())
def test_no_bytes_from_a_server_raise_anything_but_casemates_errors(
    pieces: list[bytes], framed: bool
) -> None:
    """Random bytes, and random bodies in frames of every type for the streams that wait."""

    async def test() -> None:
        async with client_of_liar() as (client, liar):

            async def call() -> None:
                with suppress(CasemateError):
                    await client.call(ECHO, Text())

            async def stream() -> None:
                with suppress(CasemateError):
                    async with client.stream(CHAT) as s:
                        async for _ in s:
                            pass

            async with asyncio.TaskGroup() as group:
                group.create_task(call())
                group.create_task(stream())
                for n, piece in enumerate(pieces):
                    if framed:
                        piece = raw(1 + n % 2 * 2, 2 + piece[0] % 2, piece[1:], piece[0] >> 5)
                    await liar.say(piece)
                await liar.hang_up()

    run(test())


# ------------------------------------------------------------------ the server of a lying client


def test_stream_ids_must_be_odd_and_rise() -> None:
    async def test() -> None:
        async with server_of_liar(Service().server) as liar:
            await liar.say(encode_request(2, ECHO, Text()))
            assert await refused(liar, 2) == (Code.INVALID_ARGUMENT, "stream id 2 must be odd")
            await liar.say(encode_request(5, ECHO, Text()))
            assert (await liar.channel.read())[0] == 5
            for stream_id in (5, 3, 1, 0xFFFFFFFF):
                await liar.say(encode_request(stream_id, ECHO, Text()))
                assert await refused(liar, stream_id) == (
                    Code.INVALID_ARGUMENT,
                    f"stream id {stream_id} was used before",
                )
            await liar.say(encode_request(7, ECHO, Text()))
            assert (await liar.channel.read())[0] == 7

    run(test())


def test_a_stream_id_in_use_is_not_taken_over_when_ids_begin_anew() -> None:
    async def test() -> None:
        service = Service()
        async with server_of_liar(service.server) as liar:
            await liar.say(encode_request(3, HANG, Empty()))
            await service.hanging.wait()
            for stream_id in (0x7FFFFFFF, 0xFFFFFFFD):
                await liar.say(encode_request(stream_id, ECHO, Text()))
                assert (await liar.channel.read())[0] == stream_id
            await liar.say(encode_request(3, ECHO, Text()))
            assert (await refused(liar, 3))[0] is Code.INVALID_ARGUMENT

    run(test())


def test_a_request_larger_than_the_limit_is_refused_and_the_next_is_answered() -> None:
    async def test() -> None:
        async with server_of_liar(Service().server) as liar:
            await liar.say(struct.pack(">IIBB", MAX_BODY_BYTES + 1, 1, TYPE_REQUEST, 0))
            await liar.say(bytes(MAX_BODY_BYTES + 1))
            assert await refused(liar, 1) == (Code.RESOURCE_EXHAUSTED, "message larger than 4194304 bytes")
            await liar.say(encode_request(3, ECHO, Text(text="x")))
            assert (await liar.channel.read())[:2] == (3, TYPE_RESPONSE)

    run(test())


@pytest.mark.parametrize(
    "body",
    [b"\xff", b"\x0a\xff", Request(service=ECHO.service, method=ECHO.name, payload=b"\xff").encode()],
    ids=["envelope", "cut", "message"],
)
def test_a_malformed_request_is_invalid_argument(body: bytes) -> None:
    async def test() -> None:
        async with server_of_liar(Service().server) as liar:
            await liar.say(raw(1, TYPE_REQUEST, body))
            code, text = await refused(liar, 1)
            assert code is Code.INVALID_ARGUMENT
            assert text.startswith("malformed protobuf message")

    run(test())


def test_a_malformed_message_on_a_stream_is_the_handlers_invalid_argument() -> None:
    async def test() -> None:
        async with server_of_liar(Service().server) as liar:
            await liar.say(encode_request(1, SUM, None, REMOTE_OPEN) + raw(1, TYPE_DATA, b"\xff"))
            assert (await refused(liar, 1))[0] is Code.INVALID_ARGUMENT

    run(test())


def test_an_oversized_message_on_a_stream_is_its_handlers_error() -> None:
    async def test() -> None:
        service = Service()
        async with server_of_liar(service.server) as liar:
            await liar.say(encode_request(1, SUM, None, REMOTE_OPEN))
            await liar.say(
                struct.pack(">IIBB", MAX_BODY_BYTES + 1, 1, TYPE_DATA, 0) + bytes(MAX_BODY_BYTES + 1)
            )
            assert await refused(liar, 1) == (Code.RESOURCE_EXHAUSTED, "message larger than 4194304 bytes")
            await until(lambda: not any(c._running for c in service.server._connections))

    run(test())


def test_frames_of_unknown_types_are_ignored() -> None:
    async def test() -> None:
        async with server_of_liar(Service().server) as liar:
            await liar.say(
                raw(1, 0, b"x") + raw(1, TYPE_RESPONSE, b"x") + raw(1, 77) + raw(1, 255, b"y" * 100)
            )
            await liar.say(encode_request(1, ECHO, Text()))
            assert (await liar.channel.read())[:2] == (1, TYPE_RESPONSE)

    run(test())


def test_data_for_no_stream_or_a_closed_one_is_refused() -> None:
    async def test() -> None:
        async with server_of_liar(Service().server) as liar:
            await liar.say(encode_data(9, Text()))
            assert (await refused(liar, 9))[0] is Code.INVALID_ARGUMENT
            await liar.say(encode_request(11, CHAT, None, REMOTE_OPEN))
            await liar.say(encode_data(11, Text(text="a"), REMOTE_CLOSED) + encode_data(11, Text(text="b")))
            answers = {(await liar.channel.read())[1:3] for _ in range(3)}
            assert answers == {(TYPE_DATA, 0), (TYPE_RESPONSE, 0), (TYPE_DATA, REMOTE_CLOSED | NO_DATA)}

    run(test())


def test_a_streaming_request_may_carry_the_first_message_and_be_closed_at_once() -> None:
    async def test() -> None:
        async with server_of_liar(Service().server) as liar:
            await liar.say(encode_request(1, SUM, Text(number=7), REMOTE_CLOSED))
            body = (await liar.channel.read())[3]
            assert Text.decode(Response.decode(body or b"").payload).number == 7

    run(test())


def test_a_deadline_in_the_past_is_exceeded_at_once() -> None:
    async def test() -> None:
        service = Service()
        async with server_of_liar(service.server) as liar:
            await liar.say(encode_request(1, HANG, Empty(), timeout_nano=-1))
            assert (await refused(liar, 1))[0] is Code.DEADLINE_EXCEEDED
            await liar.say(encode_request(3, ECHO, Text(), timeout_nano=(1 << 63) - 1))
            assert (await liar.channel.read())[0] == 3

    run(test())


def test_requests_being_handled_are_bounded_in_number() -> None:
    async def test() -> None:
        service = Service()
        service.server.max_requests = 10
        async with server_of_liar(service.server) as liar:
            for n in range(20):
                await liar.say(encode_request(2 * n + 1, HANG, Empty()))
            for n in range(10, 20):
                assert await refused(liar, 2 * n + 1) == (
                    Code.RESOURCE_EXHAUSTED,
                    "10 requests are being handled already",
                )

    run(test())


def test_requests_being_handled_are_bounded_in_bytes() -> None:
    async def test() -> None:
        unknown = Text(blob=bytes(3 << 20)).encode()  # to Empty
        service = Service()
        service.server.max_bytes = 5 << 20
        async with server_of_liar(service.server) as liar:
            for n in range(4):
                body = Request(service=HANG.service, method=HANG.name, payload=unknown).encode()
                await liar.say(raw(2 * n + 1, TYPE_REQUEST, body))
            for n in (2, 3):
                assert (await refused(liar, 2 * n + 1))[0] is Code.RESOURCE_EXHAUSTED
        async with server_of_liar(service.server) as liar:  # what is done is not counted any more
            for n in range(4):
                await liar.say(encode_request(2 * n + 1, ECHO, Text(blob=bytes(3 << 20))))
                answer = Response.decode((await liar.channel.read())[3] or b"")
                assert answer.status is None

    run(test())


def test_a_flood_on_a_stream_waits_for_its_handler() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def collect(context: Context, receive: Receive[Text]) -> Text:
            await release.wait()
            total = 0
            async for message in receive:
                total += message.number
            return Text(number=total)

        async def flood(liar: Liar) -> None:
            for _ in range(20 * INBOX_MESSAGES):
                await liar.say(encode_data(1, Text(number=1, text="x" * 1000)))
            await liar.say(encode_data(1, None, REMOTE_CLOSED | NO_DATA))

        server = Server()
        server.add(SUM, collect)
        async with server_of_liar(server) as liar, asyncio.TaskGroup() as group:
            await liar.say(encode_request(1, SUM, None, REMOTE_OPEN))
            flooding = group.create_task(flood(liar))
            await until(lambda: any(c._inboxes and c._inboxes[1].full for c in server._connections))
            assert not flooding.done()
            release.set()
            body = (await liar.channel.read())[3]
            assert Text.decode(Response.decode(body or b"").payload).number == 20 * INBOX_MESSAGES

    run(test())


def test_a_caller_that_does_not_read_stops_its_handlers_and_not_close() -> None:
    async def test() -> None:
        sent = 0

        async def count(request: Text, context: Context, send: Send[Text]) -> None:
            nonlocal sent
            while True:
                await send(Text(blob=bytes(1 << 20)))
                sent += 1

        service = Service()
        service.server.add(COUNT, count)
        async with server_of_liar(service.server) as liar:
            await liar.say(encode_request(1, COUNT, Text()))
            await until(lambda: sent > 0 or bool(service.server._connections))
            # An answer that waits behind the stream's data, when close() comes: it is given up after a while.
            await liar.say(encode_request(3, ECHO, Text()))
            await until(lambda: any(3 in c._answering for c in service.server._connections))
            await service.server.close()
            assert sent < 8

    run(test())


@settings(max_examples=200)
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8), st.booleans())
def test_no_bytes_from_a_client_break_a_server(pieces: list[bytes], framed: bool) -> None:
    async def test() -> None:
        service = Service()
        async with server_of_liar(service.server) as liar:
            await liar.say(encode_request(1, CHAT, None, REMOTE_OPEN))
            for n, piece in enumerate(pieces):
                if framed:
                    piece = raw(1 + n % 2 * 2, 1 + piece[0] % 4, piece[1:], piece[0] >> 5)
                await liar.say(piece)
        async with server_of_liar(service.server) as liar:
            await liar.say(encode_request(1, ECHO, Text()))
            assert (await liar.channel.read())[:2] == (1, TYPE_RESPONSE)

    run(test())
