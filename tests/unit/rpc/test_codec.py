"""The codec speaks as the real protobuf library does, in both directions, and refuses what it refuses."""

from __future__ import annotations

import importlib
import math
import pkgutil
import struct
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given, settings
from hypothesis import strategies as st

import rpc.api
from rpc import codec, ttrpc, wire
from rpc.codec import Message
from rpc.errors import InvalidArgument
from tests.unit.rpc.twin import Twins, instances


class Leaf(Message):
    name: str = codec.string(1)
    value: int = codec.sint64(1000)


class Node(Message):
    leaf: Leaf | None = codec.message(1, Leaf)
    leaves: list[Leaf] = codec.messages(2, Leaf)


class Everything(Message):
    """Every kind of field, with one- and two-byte tags."""

    a_string: str = codec.string(1)
    a_bytes: bytes = codec.bytes_(2)
    a_bool: bool = codec.boolean(3)
    a_uint32: int = codec.uint32(4)
    a_uint64: int = codec.uint64(5)
    an_int32: int = codec.int32(6)
    an_int64: int = codec.int64(7)
    a_sint32: int = codec.sint32(8)
    a_sint64: int = codec.sint64(9)
    a_fixed32: int = codec.fixed32(10)
    a_fixed64: int = codec.fixed64(11)
    a_sfixed32: int = codec.sfixed32(12)
    a_sfixed64: int = codec.sfixed64(13)
    a_float: float = codec.float32(14)
    a_double: float = codec.double(15)
    an_enum: int = codec.enum_(16)
    a_buffer: bytes | memoryview = codec.buffer(17)
    a_message: Leaf | None = codec.message(18, Leaf)
    a_node: Node | None = codec.message(19, Node)
    an_optional: str | None = codec.optional_string(20)
    some_strings: list[str] = codec.strings(101)
    some_bytes: list[bytes] = codec.byte_strings(102)
    some_bools: list[bool] = codec.booleans(103)
    some_uint32s: list[int] = codec.uint32s(104)
    some_uint64s: list[int] = codec.uint64s(105)
    some_int32s: list[int] = codec.int32s(106)
    some_int64s: list[int] = codec.int64s(107)
    some_sint32s: list[int] = codec.sint32s(108)
    some_sint64s: list[int] = codec.sint64s(109)
    some_enums: list[int] = codec.enums(110)
    some_fixed64s: list[int] = codec.fixed64s(111)
    some_doubles: list[float] = codec.doubles(112)
    some_messages: list[Node] = codec.messages(113, Node)
    a_map: dict[str, str] = codec.string_map(114)
    a_message_map: dict[str, Node] = codec.message_map(115, Node)


class Less(Message):
    """Everything, as an older peer knows it; the rest is unknown to it."""

    a_string: str = codec.string(1)
    a_message: Leaf | None = codec.message(18, Leaf)
    some_sint32s: list[int] = codec.sint32s(108)


PACKED, UNPACKED = Twins(Everything), Twins(Everything, packed=False)
EVERYTHING = instances(Everything)


def declared() -> list[type[Message]]:
    modules: list[Any] = [ttrpc]
    for module in pkgutil.iter_modules(rpc.api.__path__):
        modules.append(importlib.import_module(f"rpc.api.{module.name}"))
    found: dict[type[Message], None] = {}
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Message) and value.__module__ == module.__name__:
                found[value] = None
    return [cls for cls in found if not cls.__name__.startswith("_")]


DECLARED = declared()
API = Twins(*DECLARED)


@given(EVERYTHING)
def test_protobuf_reads_what_we_write(ours: Everything) -> None:
    theirs = PACKED.classes[Everything]()
    theirs.ParseFromString(ours.encode())
    assert theirs == PACKED.of(ours)


@given(EVERYTHING)
def test_we_write_as_few_bytes_as_protobuf(ours: Everything) -> None:
    assert len(ours.encode()) == len(PACKED.of(ours).SerializeToString())


@given(EVERYTHING, st.sampled_from([PACKED, UNPACKED]), st.sampled_from([bytes, bytearray, memoryview]))
def test_we_read_what_protobuf_writes(ours: Everything, twins: Twins, buffer: Any) -> None:
    assert Everything.decode(buffer(twins.of(ours).SerializeToString())) == ours


@given(EVERYTHING)
def test_we_read_what_we_write(ours: Everything) -> None:
    assert Everything.decode(ours.encode()) == ours


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.NAME)
def test_every_declared_message_is_held_to_protobuf(cls: type[Message]) -> None:
    @settings(max_examples=15)
    @given(instances(cls))
    def check(ours: Message) -> None:
        theirs = API.classes[cls]()
        theirs.ParseFromString(ours.encode())
        assert theirs == API.of(ours)
        assert cls.decode(API.of(ours).SerializeToString()) == ours

    check()


@given(EVERYTHING)
def test_unknown_fields_are_skipped(ours: Everything) -> None:
    less = Less.decode(ours.encode())
    assert (less.a_string, less.a_message, less.some_sint32s) == (
        ours.a_string,
        ours.a_message,
        ours.some_sint32s,
    )


@given(EVERYTHING, EVERYTHING)
def test_concatenated_messages_merge_as_in_protobuf(first: Everything, second: Everything) -> None:
    """The last scalar wins, lists grow, messages merge field by field."""
    data = first.encode() + second.encode()
    theirs = PACKED.classes[Everything]()
    theirs.ParseFromString(data)
    assert Everything.decode(data) == Everything.decode(theirs.SerializeToString())


def _protobuf_reads(data: bytes) -> Any:
    theirs: Any = PACKED.classes[Everything]()
    try:
        theirs.ParseFromString(data)
    except DecodeError:
        return None
    return theirs


@given(EVERYTHING, st.data())
def test_truncated_input_is_refused_exactly_when_protobuf_refuses_it(
    ours: Everything, data: st.DataObject
) -> None:
    encoded = ours.encode()
    cut = encoded[: data.draw(st.integers(0, len(encoded)))]
    theirs = _protobuf_reads(cut)
    if theirs is None:
        with pytest.raises(InvalidArgument):
            Everything.decode(cut)
    else:
        assert Everything.decode(cut) == Everything.decode(theirs.SerializeToString())


@settings(max_examples=500)
@given(EVERYTHING, st.data())
def test_mutated_input_is_read_or_refused_as_by_protobuf(ours: Everything, data: st.DataObject) -> None:
    encoded = bytearray(ours.encode() or b"\0")
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    _same(bytes(encoded))


# What goes wrong goes wrong with these: tags of groups, of fields 0 and 2**29-1, overlong numbers, lies
# about lengths. The first is the start of a group, the second its end.
PIECES = [
    *(b"\x23", b"\x24", b"\x03", b"\x04", b"\x2b\x2c", b"\xfb\xff\xff\xff\x0f", b"\xfc\xff\xff\xff\x0f"),
    *(b"\x08\x01", b"\x0a\x01k", b"\x12\x01v", b"\x0a\x00", b"\x01" + bytes(8), b"\x05" + bytes(4)),
    *(b"\x00\x00", b"\x02\x00", b"\x06", b"\x07", b"\x00", b"\x80", b"\xff", b"\xff\xff\xff\xff\x1f"),
    *(b"\x08\x80\x00", b"\x88\x80\x00\x01", b"\x88\x80\x80\x80\x80\x00\x01", b"\x80\x80\x80\x80\x80\x00"),
    *(b"\x92\x01\x02", b"\x92\x01\x04", b"\x9a\x01\x04", b"\x92\x07\x00", b"\x92\x07\x02", b"\xc2\x06\x02"),
]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map(b"".join))
def test_odd_pieces_are_read_or_refused_as_by_protobuf(data: bytes) -> None:
    _same(data)


@settings(max_examples=500)
@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused_as_by_protobuf(data: bytes) -> None:
    _same(data)


def _same(data: bytes) -> None:
    theirs = _protobuf_reads(data)
    try:
        ours = Everything.decode(data)
    except InvalidArgument:
        assert theirs is None, "we refuse what protobuf accepts"
        return
    assert theirs is not None, "protobuf refuses what we accept"
    again: Any = PACKED.classes[Everything]()
    again.ParseFromString(ours.encode())
    # A map's entry with a field besides key and value is an entry to Go and to us; this library sets the
    # whole entry aside.
    unknown: Any = UnknownFieldSet(theirs)
    if {field.field_number for field in unknown} & {114, 115}:
        for message in (again, theirs):
            message.ClearField("a_map")
            message.ClearField("a_message_map")
    theirs.DiscardUnknownFields()
    if math.isnan(theirs.a_float) and math.isnan(ours.a_float):  # which NaN does not survive C's conversions
        again.a_float = theirs.a_float = 0.0
    assert again.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x08", "truncated"),
        (b"\x0a\x05abc", "truncated"),
        (b"\x0a\xff\xff\xff\xff\x0f", "truncated"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "longer than 5 bytes"),
        (b"\x51" + b"\0" * 7, "truncated"),
        (b"\x92\x01\x03\x0a\x05a", "truncated"),
        (b"\xc0\x3e", "truncated"),
        (b"\x08" + b"\xff" * 10, "longer than 10 bytes"),
        (b"\x88\x80\x80\x80\x80\x00\x01", "longer than 5 bytes"),
        (b"\x00\x01", "field number 0"),
        (b"\xf8\xff\xff\xff\x1f\x01", "field number"),
        (b"\x0e", "wire type 6"),
        (b"\x0c", "wire type 4"),
        (b"\x0a\x02\xc3\x28", "not UTF-8"),
        (b"\x23", "group without its end"),
        (b"\x23\x2c", "group without its end"),
        (
            b"\xc2\x06\x04\x01\x02\x03\xff\x01",
            "truncated",
        ),  # a packed list whose last element runs over its end
    ],
)
def test_malformed_input_is_invalid_argument(data: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=f"malformed protobuf message.*{why}"):
        Everything.decode(data)


def test_a_group_is_skipped_with_what_is_in_it() -> None:
    group = b"\x23\x08\x01\x12\x02hi\x33\x34\x19" + bytes(8) + b"\x25" + bytes(4) + b"\x24"
    assert Less.decode(group + Less(a_string="x").encode()) == Less(a_string="x")


def test_messages_cannot_be_nested_without_bound() -> None:
    data = b""
    for _ in range(wire.MAX_DEPTH + 1):
        data = b"\x23" + data + b"\x24"
    with pytest.raises(InvalidArgument, match="nested deeper"):
        Less.decode(data)
    assert Less.decode(data[1:-1]) == Less()


class Deep(Message):
    pass


def test_declared_messages_cannot_be_nested_without_bound() -> None:
    Deep.FIELDS = (deeper := codec.Field(1, "message", Deep),)
    deeper.name = "deeper"
    Deep.deeper = None  # type: ignore[attr-defined]
    data = b""
    for _ in range(wire.MAX_DEPTH):
        data = b"\x0a" + wire.varint(len(data)) + data
    Deep.decode(data)
    with pytest.raises(InvalidArgument, match="nested deeper"):
        Deep.decode(b"\x0a" + wire.varint(len(data)) + data)


@pytest.mark.parametrize(
    "element",
    [b"\xca\x07\x00\x00", b"\x8a\x07\x00", b"\xaa\x06\x00", b"\x92\x07\x00", b"\xc0\x06\x01"],
    ids=["unknown", "message", "string", "map", "integer"],
)
def test_a_small_input_cannot_become_a_mountain_of_objects(element: bytes) -> None:
    if element.startswith(b"\xca"):
        assert Everything.decode(b"\xc8\x07\x00" * wire.MAX_FIELDS) == Everything()
        with pytest.raises(InvalidArgument, match="more than 262144 fields"):
            Everything.decode(b"\xc8\x07\x00" * (wire.MAX_FIELDS + 1))
        return
    Everything.decode(element * (wire.MAX_ELEMENTS // 2))
    with pytest.raises(InvalidArgument, match="more than 65536 elements"):
        Everything.decode(element * (wire.MAX_ELEMENTS + 1))


def test_a_packed_list_is_bounded() -> None:
    numbers = b"\x01" * (wire.MAX_ELEMENTS + 1)
    with pytest.raises(InvalidArgument, match="more than 65536 elements"):
        Everything.decode(b"\xc2\x06" + wire.varint(len(numbers)) + numbers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("a_uint32", -1),
        ("a_uint32", 1 << 32),
        ("a_uint64", 1 << 64),
        ("an_int32", 1 << 31),
        ("an_int64", -(1 << 63) - 1),
        ("a_sint32", 1 << 31),
        ("an_enum", 1 << 31),
        ("a_fixed32", -1),
        ("a_sfixed64", 1 << 63),
        ("a_string", "\ud800"),
        ("some_uint32s", [1, -1]),
        ("a_map", {"\ud800": ""}),
    ],
)
def test_a_value_that_does_not_fit_is_invalid_argument(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument):
        Everything(**{field: value}).encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [("a_uint32", "1"), ("a_string", 1), ("a_bytes", "text"), ("a_double", "1"), ("a_fixed32", "")],
)
def test_a_value_of_the_wrong_type_is_a_bug_and_raises(field: str, value: Any) -> None:
    message = Everything()
    setattr(message, field, value or "x")
    with pytest.raises((TypeError, AttributeError, struct.error)):
        message.encode()


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_a_float_out_of_range_becomes_infinite_as_in_protobuf(value: float) -> None:
    assert Everything.decode(Everything(a_float=value).encode()).a_float == value * 1e300


def test_negative_zero_is_sent() -> None:
    assert str(Everything.decode(Everything(a_double=-0.0, a_float=-0.0).encode()).a_double) == "-0.0"
    assert Everything(a_double=0.0, a_float=0.0).encode() == b""


def test_an_optional_field_knows_empty_from_absent() -> None:
    assert Everything().encode() == b""
    assert Everything.decode(Everything(an_optional="").encode()).an_optional == ""
    assert Everything.decode(b"").an_optional is None


def test_a_map_entry_may_lack_its_key_or_its_value() -> None:
    assert Everything.decode(b"\x92\x07\x00").a_map == {"": ""}
    assert Everything.decode(b"\x9a\x07\x03\x0a\x01k").a_message_map == {"k": Node()}


def test_fields_have_proto3_defaults() -> None:
    empty = Everything()
    assert (empty.a_string, empty.a_bytes, empty.a_bool, empty.a_double) == ("", b"", False, 0.0)
    assert (empty.a_message, empty.some_strings, empty.a_map) == (None, [], {})


def test_lists_and_maps_are_not_shared_between_instances() -> None:
    first = Everything()
    first.some_strings.append("x")
    first.a_map["k"] = "v"
    assert Everything() == Everything(some_strings=[], a_map={})
    assert Everything.decode(b"").some_strings == []


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="Leaf has no field nmae"):
        Leaf(nmae="x")  # type: ignore[call-arg]


def test_messages_compare_by_value_and_class() -> None:
    assert Leaf(name="a") == Leaf(name="a", value=0)
    assert Leaf(name="a") != Leaf(name="b")
    assert Leaf() != Less()
    assert Leaf() != "Leaf()"
    with pytest.raises(TypeError):
        hash(Leaf())


def test_repr_shows_what_is_set_and_no_long_bytes() -> None:
    shown = repr(Everything(a_string="x", a_bytes=b"a" * 100, an_optional="", a_message=Leaf(value=-1)))
    assert shown == "Everything(a_string='x', a_bytes=<100 bytes>, a_message=Leaf(value=-1), an_optional='')"


def test_large_bytes_are_not_copied_until_they_are_sent() -> None:
    chunk = bytes(1 << 20)
    pieces: wire.Chunks = []
    size = Everything(a_bytes=chunk).encode_into(pieces)
    assert any(piece is chunk for piece in pieces)
    assert size == sum(map(len, pieces))


def test_a_buffer_is_a_view_of_what_it_was_decoded_from() -> None:
    data = bytearray(Everything(a_buffer=b"abc").encode())
    buffer = Everything.decode(memoryview(data)).a_buffer
    data[-1] = ord("X")
    assert bytes(buffer) == b"abX"
