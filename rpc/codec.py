"""Messages declared in Python, spoken in the protobuf wire format, without a protobuf runtime.

Held to the real protobuf library by tests/unit/rpc. It must not know about ttrpc or any particular
message, and imports almost nothing: the guest pays for every import.
"""

from __future__ import annotations

from rpc import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

    M = TypeVar("M", bound="Message")
else:

    def dataclass_transform(**_):
        return lambda cls: cls


class Field:
    """One declared field; tests compare these with the descriptors of the real protocol."""

    __slots__ = ("key", "kind", "message", "name", "number", "optional", "repeated")

    def __init__(
        self,
        number: int,
        kind: str,
        message: type[Message] | None = None,
        repeated: bool = False,
        optional: bool = False,
        key: str = "",
    ) -> None:
        self.name = ""
        self.number, self.kind, self.message = number, kind, message
        self.repeated, self.optional, self.key = repeated, optional, key


def _entry_type(field: Field) -> type[Message]:
    """The hidden message {key = 1; value = 2} of which a map field is a list."""
    value = Field(2, field.kind, field.message, optional=True)  # written even when empty, as protobuf does
    key = Field(1, field.key, optional=True)
    return type("MapEntry", (Message,), {"key": key, "value": value})


def _compile(cls: type[Message]) -> None:
    """Build the writers and readers of a class, at its first use: most classes are never used."""
    writers: list[tuple[str, int, wire.Writer]] = []
    readers: dict[int, wire.Reader] = {}
    for field in cls.FIELDS:
        kind = wire.KINDS.get(field.kind)
        wire_type = kind.wire if kind and not field.key else wire.LEN
        if field.key:
            write, read = wire.map_io(field, _entry_type(field))
        else:
            one = wire.scalar_io(field, kind) if kind else wire.message_io(field, field.message or Message)
            write, read = wire.repeated_io(field.name, one) if field.repeated else one
            if field.repeated and kind and wire_type != wire.LEN:  # written packed, read either way
                write, readers[field.number << 3 | wire.LEN] = wire.packed_io(field, kind, one[1])
        readers[field.number << 3 | wire_type] = read
        presence = _WHEN_TRUE
        if field.optional:
            presence = _WHEN_SET
        elif field.kind in ("float", "double"):
            presence = _WHEN_SIGNED
        writers.append((field.name, presence, write))
    cls._writers, cls._readers = tuple(writers), readers


# When a field is written: when its value is true; when it is there at all; or also when it is -0.0, which is
# false and yet not a float's default.
_WHEN_TRUE, _WHEN_SET, _WHEN_SIGNED = 0, 1, 2


@dataclass_transform(kw_only_default=True, eq_default=False)
class Message:
    """Base of declared messages, e.g. `class Mount(Message, name="containerd.types.Mount")` with
    `source: str = string(2)` and so on in its body.

    Fields are keyword arguments of the constructor with proto3 defaults, and assignable attributes.
    """

    NAME: ClassVar[str] = ""
    """The full protobuf name, as an Any's type_url has it."""
    FIELDS: ClassVar[tuple[Field, ...]] = ()
    _containers: ClassVar[tuple[tuple[str, type], ...]] = ()
    _writers: ClassVar[tuple[tuple[str, int, wire.Writer], ...] | None] = None
    _readers: ClassVar[dict[int, wire.Reader]] = {}

    def __init_subclass__(cls, *, name: str = "") -> None:
        cls.NAME = name or cls.__name__
        fields = []
        containers: list[tuple[str, type]] = []
        for attribute, field in list(cls.__dict__.items()):
            if not isinstance(field, Field):
                continue
            field.name = attribute
            fields.append(field)
            if field.key or field.repeated:
                containers.append((attribute, dict if field.key else list))
                delattr(cls, attribute)  # made per instance
            else:
                kind = None if field.optional else wire.KINDS.get(field.kind)
                setattr(cls, attribute, kind.default if kind else None)
        fields.sort(key=lambda field: field.number)
        cls.FIELDS, cls._containers, cls._writers = tuple(fields), tuple(containers), None

    def __init__(self, **values: Any) -> None:
        mine = self.__dict__
        for name, make in self._containers:
            mine[name] = make()
        if values:
            mine.update(values)
            if not values.keys() <= {field.name for field in self.FIELDS}:
                unknown = sorted(values.keys() - {field.name for field in self.FIELDS})
                raise TypeError(f"{type(self).__name__} has no field {', '.join(unknown)}")

    def encode(self) -> bytes:
        """The message in the wire format. InvalidArgument: a value does not fit its field."""
        out: wire.Chunks = []
        self.encode_into(out)
        return b"".join(out)

    def encode_into(self, out: wire.Chunks) -> int:
        """Append the pieces of the wire format, large bytes uncopied; returns their total size."""
        writers = self._writers
        if writers is None:
            _compile(type(self))
            writers = self._writers or ()
        get = self.__dict__.get
        size = 0
        for name, presence, write in writers:
            value = get(name)
            if value or (presence and value is not None and (presence == _WHEN_SET or str(value) == "-0.0")):
                size += write(out, value)
        return size

    @classmethod
    def decode(cls, data: wire.Data) -> Self:
        """Read one message. Unknown fields are skipped. InvalidArgument: malformed, or beyond the limits."""
        message = cls()
        try:
            message._read(data, 0, len(data), [wire.MAX_DEPTH, wire.MAX_ELEMENTS, wire.MAX_FIELDS])
        except IndexError:  # read past the end of data
            raise wire.malformed("truncated") from None
        except UnicodeDecodeError as error:
            raise wire.malformed(f"a string is not UTF-8 ({error.reason})") from None
        return message

    def _read(self, data: wire.Data, pos: int, end: int, limits: list[int]) -> None:
        if self._writers is None:
            _compile(type(self))
        values = self.__dict__
        readers = self._readers
        while pos < end:
            tag = data[pos]
            pos += 1
            if tag > 0x7F:
                tag, pos = wire.read_varint(data, pos - 1, wire.TAG_BYTES)
            limits[2] -= 1
            if limits[2] < 0:
                raise wire.malformed(f"more than {wire.MAX_FIELDS} fields")
            read = readers.get(tag)
            pos = read(values, data, pos, end, limits) if read else wire.skip(data, pos, end, tag, limits)
        if pos != end:
            raise wire.malformed("truncated")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, field.name) == getattr(other, field.name) for field in self.FIELDS)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = []
        for field in self.FIELDS:
            value = self.__dict__.get(field.name)
            if value is None or (not value and not field.optional):
                continue
            if isinstance(value, bytes | bytearray | memoryview) and len(value) > 64:
                text = f"<{len(value)} bytes>"
            else:
                text = repr(value)
            parts.append(f"{field.name}={text}")
        return f"{type(self).__name__}({', '.join(parts)})"


# What follows declares fields: at run time a Field, to a type checker the type of the attribute.
if TYPE_CHECKING:

    def string(number: int) -> str: ...
    def bytes_(number: int) -> bytes: ...
    def boolean(number: int) -> bool: ...
    def uint32(number: int) -> int: ...
    def uint64(number: int) -> int: ...
    def int32(number: int) -> int: ...
    def int64(number: int) -> int: ...
    def sint32(number: int) -> int: ...
    def sint64(number: int) -> int: ...
    def fixed32(number: int) -> int: ...
    def fixed64(number: int) -> int: ...
    def sfixed32(number: int) -> int: ...
    def sfixed64(number: int) -> int: ...
    def enum_(number: int) -> int: ...
    def float32(number: int) -> float: ...
    def double(number: int) -> float: ...

    def buffer(number: int) -> bytes | memoryview: ...  # decoded from a memoryview: a view, not a copy

    def strings(number: int) -> list[str]: ...
    def byte_strings(number: int) -> list[bytes]: ...
    def booleans(number: int) -> list[bool]: ...
    def uint32s(number: int) -> list[int]: ...
    def uint64s(number: int) -> list[int]: ...
    def int32s(number: int) -> list[int]: ...
    def int64s(number: int) -> list[int]: ...
    def sint32s(number: int) -> list[int]: ...
    def sint64s(number: int) -> list[int]: ...
    def enums(number: int) -> list[int]: ...
    def fixed64s(number: int) -> list[int]: ...
    def doubles(number: int) -> list[float]: ...

    def optional_string(number: int) -> str | None: ...  # `optional`: an empty one differs from an absent one

    def message(number: int, of: type[M]) -> M | None: ...
    def messages(number: int, of: type[M]) -> list[M]: ...
    def string_map(number: int) -> dict[str, str]: ...
    def message_map(number: int, of: type[M]) -> dict[str, M]: ...
else:

    def _one(kind):
        return lambda number: Field(number, kind)

    def _many(kind):
        return lambda number: Field(number, kind, repeated=True)

    string, bytes_, boolean, buffer = _one("string"), _one("bytes"), _one("bool"), _one("buffer")
    uint32, uint64, int32, int64 = _one("uint32"), _one("uint64"), _one("int32"), _one("int64")
    sint32, sint64, enum_ = _one("sint32"), _one("sint64"), _one("enum")
    fixed32, fixed64 = _one("fixed32"), _one("fixed64")
    sfixed32, sfixed64 = _one("sfixed32"), _one("sfixed64")
    float32, double = _one("float"), _one("double")
    strings, byte_strings, booleans = _many("string"), _many("bytes"), _many("bool")
    uint32s, uint64s, int32s, int64s = _many("uint32"), _many("uint64"), _many("int32"), _many("int64")
    sint32s, sint64s, enums = _many("sint32"), _many("sint64"), _many("enum")
    fixed64s, doubles = _many("fixed64"), _many("double")

    def optional_string(number):
        return Field(number, "string", optional=True)

    def message(number, of):
        return Field(number, "message", of)

    def messages(number, of):
        return Field(number, "message", of, repeated=True)

    def string_map(number):
        return Field(number, "string", key="string")

    def message_map(number, of):
        return Field(number, "message", of, key="string")
