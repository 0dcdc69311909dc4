"""Reading and writing the values of the protobuf wire format: varints, lengths, scalars, lists, maps.

The lower half of rpc/codec.py, which declares messages with it. Its input may come from a hostile guest:
what is malformed or beyond the limits is InvalidArgument, an IndexError means read past the end of the data.
"""

from __future__ import annotations

import struct

from rpc.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from rpc.codec import Field, Message

    Data: TypeAlias = bytes | bytearray | memoryview
    Chunks: TypeAlias = list[bytes | bytearray | memoryview]
    # (instance dict, data, position, end, limits) -> the position behind the value
    Reader: TypeAlias = Callable[[dict[str, Any], Data, int, int, list[int]], int]
    # (chunks to append to, value) -> the number of bytes appended
    Writer: TypeAlias = Callable[[Chunks, Any], int]

MAX_DEPTH = 100
"""Messages (and groups) nested deeper than this are refused, as protobuf's own libraries do."""
MAX_ELEMENTS = 1 << 16
"""Repeated elements, map entries and nested messages in one decode: two bytes of input can become an
object of several hundred, and the input may come from a hostile guest."""
MAX_FIELDS = 4 * MAX_ELEMENTS
"""Fields in one decode, declared or not: each costs time, if no memory."""

TAG_BYTES = 5
"""The longest encoding of a tag or a length; numbers may take ten bytes."""
_VARINT, _I64, LEN, _START, _END, _I32 = 0, 1, 2, 3, 4, 5
_MASK64 = (1 << 64) - 1
_BYTE = tuple(bytes((i,)) for i in range(0x80))


def malformed(what: str) -> InvalidArgument:
    return InvalidArgument(f"malformed protobuf message: {what}")


def varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTE[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: Data, pos: int, most: int = 10) -> tuple[int, int]:
    value = shift = 0
    for _ in range(most):
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK64, pos
        shift += 7
    raise malformed(f"an integer is longer than {most} bytes")


def read_length(data: Data, pos: int, end: int) -> tuple[int, int]:
    """The bounds (start, stop) of the length-delimited value at pos."""
    length = data[pos]
    pos += 1
    if length > 0x7F:
        length, pos = read_varint(data, pos - 1, TAG_BYTES)
    stop = pos + length
    if stop > end:
        raise malformed("truncated")
    return pos, stop


def spend(limits: list[int], count: int = 1) -> None:
    limits[1] -= count
    if limits[1] < 0:
        raise malformed(f"more than {MAX_ELEMENTS} elements")


def skip(data: Data, pos: int, end: int, tag: int, limits: list[int], inside: bool = False) -> int:
    """Step over a field that is not declared (or not with this wire type); inside: it is a group's."""
    wire = tag & 7
    limits[2] -= inside  # a field of a group; the others are counted where they are read
    if limits[2] < 0:
        raise malformed(f"more than {MAX_FIELDS} fields")
    if tag >> 32 or (tag < 8 and not inside):
        raise malformed(f"field number {tag >> 3}")
    if wire == _VARINT:
        return read_varint(data, pos)[1]
    if wire == LEN:
        return read_length(data, pos, end)[1]
    if wire in (_I64, _I32):
        return pos + (8 if wire == _I64 else 4)
    if wire != _START:
        raise malformed(f"wire type {wire}")
    limits[0] -= 1
    if limits[0] < 0:
        raise malformed(f"nested deeper than {MAX_DEPTH}")
    while pos < end:
        inner, pos = read_varint(data, pos, TAG_BYTES)
        if inner & 7 == _END:
            if inner >> 3 != tag >> 3:
                break
            limits[0] += 1
            return pos
        pos = skip(data, pos, end, inner, limits, inside=True)
    raise malformed("a group without its end")


class Kind:
    """One scalar type: how a value is written, read, and what it is when absent."""

    __slots__ = ("default", "name", "read", "wire", "write")

    def __init__(
        self,
        name: str,
        wire: int,
        default: Any,
        write: Callable[[Any], bytes],
        read: Callable[[Any], Any],
    ) -> None:
        self.name, self.wire, self.default, self.write, self.read = name, wire, default, write, read


def ranged(name: str, low: int, high: int, read: Callable[[int], int], zigzag: int = 0) -> Kind:
    def write(value: int) -> bytes:
        if not low <= value < high:
            raise InvalidArgument(f"{value} is no {name}")
        if zigzag:
            value = value << 1 ^ value >> zigzag
        return varint(value & _MASK64)

    return Kind(name, _VARINT, 0, write, read)


def fixed(name: str, code: str, default: float) -> Kind:
    packer = struct.Struct(code)
    unpack = packer.unpack_from

    def write(value: float) -> bytes:
        try:
            return packer.pack(value)
        except (struct.error, OverflowError):
            if isinstance(value, int | float):
                if code == "<f":  # out of range for a float: what a C cast makes of it
                    return packer.pack(float("inf") if value > 0 else float("-inf"))
                raise InvalidArgument(f"{value} is no {name}") from None
            raise

    def read(where: tuple[Data, int]) -> float:
        value: float = unpack(*where)[0]
        return value

    return Kind(name, _I64 if packer.size == 8 else _I32, default, write, read)


_INT32, _INT64 = 1 << 31, 1 << 63
_UINT32, _UINT64 = 1 << 32, 1 << 64
KINDS = {
    kind.name: kind
    for kind in (
        ranged("uint32", 0, _UINT32, lambda raw: raw & 0xFFFFFFFF),
        ranged("uint64", 0, _UINT64, lambda raw: raw),
        ranged("int32", -_INT32, _INT32, lambda raw: ((raw & 0xFFFFFFFF) ^ _INT32) - _INT32),
        ranged("int64", -_INT64, _INT64, lambda raw: (raw ^ _INT64) - _INT64),
        ranged("enum", -_INT32, _INT32, lambda raw: ((raw & 0xFFFFFFFF) ^ _INT32) - _INT32),
        ranged("sint32", -_INT32, _INT32, lambda raw: (raw & 0xFFFFFFFF) >> 1 ^ -(raw & 1), 31),
        ranged("sint64", -_INT64, _INT64, lambda raw: raw >> 1 ^ -(raw & 1), 63),
        Kind("bool", _VARINT, False, lambda value: b"\1" if value else b"\0", bool),
        fixed("fixed32", "<I", 0),
        fixed("fixed64", "<Q", 0),
        fixed("sfixed32", "<i", 0),
        fixed("sfixed64", "<q", 0),
        fixed("float", "<f", 0.0),
        fixed("double", "<d", 0.0),
        Kind("string", LEN, "", lambda value: value.encode(), lambda piece: str(piece, "utf-8")),
        Kind("bytes", LEN, b"", lambda value: value, bytes),
        Kind("buffer", LEN, b"", lambda value: value, memoryview),
    )
}


def scalar_io(field: Field, kind: Kind) -> tuple[Writer, Reader]:
    """Writer and reader of one value with its tag; also what a repeated field's elements are made of."""
    name, write, read = field.name, kind.write, kind.read
    tag = varint(field.number << 3 | kind.wire)

    if kind.wire == LEN:

        def write_piece(out: Chunks, value: Any) -> int:
            try:
                piece = write(value)
            except UnicodeEncodeError as error:
                raise InvalidArgument(f"{name} cannot be sent as UTF-8: {error.reason}") from None
            head = tag + varint(len(piece))
            out += (head, piece)
            return len(head) + len(piece)

        def read_piece(values: dict[str, Any], data: Data, pos: int, end: int, limits: list[int]) -> int:
            start, stop = read_length(data, pos, end)
            values[name] = read(data[start:stop])
            return stop

        return write_piece, read_piece

    def write_number(out: Chunks, value: Any) -> int:
        piece = tag + write(value)
        out.append(piece)
        return len(piece)

    if kind.wire == _VARINT:

        def read_number(values: dict[str, Any], data: Data, pos: int, end: int, limits: list[int]) -> int:
            raw = data[pos]
            pos += 1
            if raw > 0x7F:
                raw, pos = read_varint(data, pos - 1)
            values[name] = read(raw)
            return pos

        return write_number, read_number

    size = 8 if kind.wire == _I64 else 4

    def read_fixed(values: dict[str, Any], data: Data, pos: int, end: int, limits: list[int]) -> int:
        if pos + size > end:
            raise malformed("truncated")
        values[name] = read((data, pos))
        return pos + size

    return write_number, read_fixed


def message_io(field: Field, message: type[Message]) -> tuple[Writer, Reader]:
    name = field.name
    tag = varint(field.number << 3 | LEN)

    def write(out: Chunks, value: Message) -> int:
        body: Chunks = []
        size = value.encode_into(body)
        head = tag + varint(size)
        out.append(head)
        out += body
        return len(head) + size

    def read(values: dict[str, Any], data: Data, pos: int, end: int, limits: list[int]) -> int:
        start, stop = read_length(data, pos, end)
        limits[0] -= 1
        if limits[0] < 0:
            raise malformed(f"nested deeper than {MAX_DEPTH}")
        spend(limits)
        value = values.get(name)  # a second occurrence is merged into the first
        if value is None:
            value = values[name] = message()
        value._read(data, start, stop, limits)
        limits[0] += 1
        return stop

    return write, read


def repeated_io(name: str, element: tuple[Writer, Reader]) -> tuple[Writer, Reader]:
    write_one, read_one = element

    def write(out: Chunks, value: list[Any]) -> int:
        size = 0
        for one in value:
            size += write_one(out, one)
        return size

    def read(values: dict[str, Any], data: Data, pos: int, end: int, limits: list[int]) -> int:
        spend(limits)
        box: dict[str, Any] = {}
        pos = read_one(box, data, pos, end, limits)
        values[name].append(box[name])
        return pos

    return write, read


def packed_io(field: Field, kind: Kind, element: Reader) -> tuple[Writer, Reader]:
    name, write_value = field.name, kind.write
    tag = varint(field.number << 3 | LEN)

    def write(out: Chunks, value: list[Any]) -> int:
        piece = b"".join(map(write_value, value))
        head = tag + varint(len(piece))
        out += (head, piece)
        return len(head) + len(piece)

    def read(values: dict[str, Any], data: Data, pos: int, end: int, limits: list[int]) -> int:
        pos, stop = read_length(data, pos, end)
        append = values[name].append
        box: dict[str, Any] = {}
        while pos < stop:
            spend(limits)
            pos = element(box, data, pos, stop, limits)
            append(box[name])
        if pos != stop:
            raise malformed("truncated")
        return stop

    return write, read


def map_io(field: Field, entry: type[Message]) -> tuple[Writer, Reader]:
    name = field.name
    write_entry, read_entry = message_io(field, entry)
    to_message = field.message
    no_key = KINDS[field.key].default
    no_value = None if to_message else KINDS[field.kind].default

    def write(out: Chunks, value: dict[Any, Any]) -> int:
        size = 0
        for key, one in value.items():
            size += write_entry(out, entry(key=key, value=one))
        return size

    def read(values: dict[str, Any], data: Data, pos: int, end: int, limits: list[int]) -> int:
        box: dict[str, Any] = {}
        pos = read_entry(box, data, pos, end, limits)
        key, one = box[name].key, box[name].value
        if one is None:
            one = to_message() if to_message else no_value
        values[name][no_key if key is None else key] = one
        return pos

    return write, read
