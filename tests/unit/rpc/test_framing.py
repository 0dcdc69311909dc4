"""Frames survive any cut of the byte stream, and no bytes whatever break the reader."""

from __future__ import annotations

import asyncio
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.api.types import Empty, Status
from rpc.channel import INBOX_BYTES, INBOX_MESSAGES, Channel, Inbox
from rpc.errors import NotFound, ResourceExhausted, Unavailable
from rpc.ttrpc import MAX_BODY_BYTES, Request, Response, encode_data, encode_request, encode_response, frame
from tests.unit.rpc.wires import ECHO, Text, ends, run

Frame = tuple[int, int, int, bytes | None]


class Nowhere(asyncio.Transport):
    """A transport that only reads."""

    def is_closing(self) -> bool:
        return True


def channel_reading(*pieces: bytes) -> Channel:
    """Must be called in a running loop; the pieces arrive one by one, then the connection ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)

    def arrive(left: tuple[bytes, ...]) -> None:
        if left:
            reader.feed_data(left[0])
            loop.call_soon(arrive, left[1:])
        else:
            reader.feed_eof()

    loop.call_soon(arrive, pieces)
    return Channel(reader, asyncio.StreamWriter(Nowhere(), protocol, reader, loop))


async def read_all(channel: Channel) -> tuple[list[Frame], Unavailable]:
    frames: list[Frame] = []
    while True:
        try:
            frames.append(await channel.read())
        except Unavailable as error:
            return frames, error


FRAMES = st.lists(
    st.tuples(
        st.integers(0, (1 << 32) - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=100)
    ),
    max_size=20,
)


def cut(data: bytes, where: list[int]) -> list[bytes]:
    marks = [0, *sorted({mark % (len(data) + 1) for mark in where}), len(data)]
    return [data[a:b] for a, b in pairwise(marks)]


@given(FRAMES, st.lists(st.integers(0, 5000)))
def test_frames_are_read_whole_however_the_stream_is_cut(frames: list[Frame], where: list[int]) -> None:
    data = b"".join(frame(i, kind, flags, len(b or b""), [b or b""]) for i, kind, flags, b in frames)

    async def test() -> None:
        read, end = await read_all(channel_reading(*cut(data, where)))
        assert read == frames
        assert end.brief == "connection closed"

    run(test())


@given(FRAMES.filter(bool), st.data())
def test_a_stream_that_ends_within_a_frame_gives_the_whole_frames_before_it(
    frames: list[Frame], data: st.DataObject
) -> None:
    encoded = [frame(i, kind, flags, len(b or b""), [b or b""]) for i, kind, flags, b in frames]
    keep = data.draw(st.integers(1, len(encoded[-1]) - 1))

    async def test() -> None:
        read, end = await read_all(channel_reading(b"".join(encoded[:-1]) + encoded[-1][:keep]))
        assert read == frames[:-1]
        # after the header exactly, the length says that something is missing, too
        assert end.brief in ("connection closed in the middle of a message", "connection closed")

    run(test())


@given(st.lists(st.binary(max_size=300), max_size=10))
def test_any_bytes_are_frames_or_the_end(pieces: list[bytes]) -> None:
    async def test() -> None:
        await read_all(channel_reading(*pieces))

    run(test())


def test_a_body_of_exactly_the_limit_passes_and_one_more_byte_is_discarded() -> None:
    async def test() -> None:
        most = frame(1, 1, 0, MAX_BODY_BYTES, [bytes(MAX_BODY_BYTES)])
        header = struct.pack(">IIBB", MAX_BODY_BYTES + 1, 3, 1, 0)
        pieces = [
            most,
            header,
            bytes(MAX_BODY_BYTES // 2),
            bytes(MAX_BODY_BYTES // 2 + 1),
            frame(5, 1, 0, 0, []),
        ]
        read, _ = await read_all(channel_reading(*pieces))
        assert [(f[0], None if f[3] is None else len(f[3])) for f in read] == [
            (1, 4 << 20),
            (3, None),
            (5, 0),
        ]

    run(test())


def test_a_lie_about_the_length_ends_when_the_stream_ends() -> None:
    async def test() -> None:
        read, end = await read_all(channel_reading(struct.pack(">IIBB", 0xFFFFFFFF, 1, 1, 0) + bytes(1000)))
        assert read == []
        assert end.brief == "connection closed in the middle of a message"

    run(test())


def test_a_frame_larger_than_the_limit_is_never_made() -> None:
    with pytest.raises(ResourceExhausted, match=f"exceeds the limit of {MAX_BODY_BYTES}"):
        encode_data(1, Text(blob=bytes(MAX_BODY_BYTES)))


def test_envelopes_are_what_their_declarations_say() -> None:
    """Payloads are encoded in place; a reader of the declared envelopes must not notice."""
    payload = Text(text="x", blob=b"y" * 300)
    request = encode_request(7, ECHO, payload, 2, 5, {"Key": "value"})
    assert request[:10] == struct.pack(">IIBB", len(request) - 10, 7, 1, 2)
    read = Request.decode(request[10:])
    assert (read.service, read.method, read.timeout_nano) == (ECHO.service, ECHO.name, 5)
    assert [(pair.key, pair.value) for pair in read.metadata] == [("key", "value")]
    assert Text.decode(read.payload) == payload
    response = Response.decode(encode_response(7, payload)[10:])
    assert (response.status, Text.decode(response.payload)) == (None, payload)
    failure = Response.decode(encode_response(7, None, Status(code=5, message="m"))[10:])
    assert failure == Response(status=Status(code=5, message="m"))
    assert encode_data(9, None, 5) == struct.pack(">IIBB", 0, 9, 3, 5)
    assert Response.decode(encode_response(7, Empty())[10:]).payload == b""


def test_a_flood_of_small_frames_lets_other_tasks_run() -> None:
    async def test() -> None:
        channel = channel_reading(frame(1, 9, 0, 0, []) * 1000)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        read, _ = await read_all(channel)
        task.cancel()
        assert len(read) == 1000
        assert turns > 10

    run(test())


def test_writing_to_a_peer_that_left_is_unavailable() -> None:
    async def test() -> None:
        here, there = await ends()
        channel = Channel(*here)
        there[1].close()
        await there[1].wait_closed()
        with pytest.raises(Unavailable):
            while True:
                await channel.send(frame(1, 1, 0, 100_000, [bytes(100_000)]))
        await channel.close(1.0)
        with pytest.raises(Unavailable, match="connection closed"):
            channel.put(b"x")

    run(test())


def test_a_reset_connection_is_unavailable() -> None:
    async def test() -> None:
        reader = asyncio.StreamReader()
        reader.set_exception(ConnectionResetError("reset by a test"))
        channel = channel_reading()
        channel._reader = reader
        with pytest.raises(Unavailable, match="connection lost: reset by a test"):
            await channel.read()

    run(test())


def test_closing_gives_the_peer_what_was_written() -> None:
    async def test() -> None:
        here, there = await ends()
        data = frame(1, 1, 0, 3 << 20, [bytes(3 << 20)])
        Channel(*here).put(data)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(there[0].read(-1))
            await Channel(*here).close(10.0)
        assert reading.result() == data
        there[1].close()

    run(test())


def test_closing_does_not_wait_for_ever_for_a_peer_that_does_not_read() -> None:
    async def test() -> None:
        here, there = await ends()
        channel = Channel(*here)
        channel.put(bytes(20 << 20))
        await channel.close(0.05)
        there[1].close()

    run(test())


def test_an_inbox_gives_what_came_before_its_end_and_then_the_end_every_time() -> None:
    async def test() -> None:
        inbox = Inbox()
        inbox.put(b"a")
        inbox.end()
        inbox.put(b"late")
        assert [await inbox.take(), await inbox.take(), await inbox.take()] == [b"a", None, None]
        failed = Inbox()
        failed.put(b"a")
        failed.end(NotFound("gone"))
        failed.end()
        assert await failed.take() == b"a"
        for _ in range(2):
            with pytest.raises(NotFound, match="gone"):
                await failed.take()

    run(test())


@pytest.mark.parametrize(("messages", "size"), [(INBOX_MESSAGES, 1), (INBOX_BYTES // (1 << 20), 1 << 20)])
def test_an_inbox_is_full_at_its_bounds_and_has_space_when_half_is_taken(messages: int, size: int) -> None:
    async def test() -> None:
        inbox = Inbox()
        for _ in range(messages - 1):
            inbox.put(bytes(size))
        assert not inbox.full
        inbox.put(bytes(size))
        assert inbox.full
        while inbox.full:
            await inbox.take()
        await inbox.space()
        left = 0
        inbox.end()
        while await inbox.take() is not None:
            left += 1
        assert 0 < left < messages // 2 + 1

    run(test())
