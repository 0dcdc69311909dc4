"""The real protobuf library's view of our declared messages: descriptors are built from the declarations,
so that what one side writes the other must read. Used by tests of the codec only.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message as ProtoMessage
from hypothesis import strategies as st

from rpc.codec import Field, Message

_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "string": _FIELD.TYPE_STRING,
    "bytes": _FIELD.TYPE_BYTES,
    "buffer": _FIELD.TYPE_BYTES,
    "bool": _FIELD.TYPE_BOOL,
    "uint32": _FIELD.TYPE_UINT32,
    "uint64": _FIELD.TYPE_UINT64,
    "int32": _FIELD.TYPE_INT32,
    "int64": _FIELD.TYPE_INT64,
    "sint32": _FIELD.TYPE_SINT32,
    "sint64": _FIELD.TYPE_SINT64,
    "fixed32": _FIELD.TYPE_FIXED32,
    "fixed64": _FIELD.TYPE_FIXED64,
    "sfixed32": _FIELD.TYPE_SFIXED32,
    "sfixed64": _FIELD.TYPE_SFIXED64,
    "float": _FIELD.TYPE_FLOAT,
    "double": _FIELD.TYPE_DOUBLE,
    "enum": _FIELD.TYPE_ENUM,
    "message": _FIELD.TYPE_MESSAGE,
}


class Twins:
    """Protobuf classes for declared ones, and instances for instances."""

    def __init__(self, *classes: type[Message], packed: bool = True) -> None:
        self._packed = packed
        self._names: dict[type[Message], str] = {}
        self._file = descriptor_pb2.FileDescriptorProto(name="twin.proto", package="twin", syntax="proto3")
        kind = self._file.enum_type.add(name="AnyEnum")
        kind.value.add(name="ZERO", number=0)
        for cls in classes:
            self._declare(cls)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(self._file)
        self.classes: dict[type[Message], type[ProtoMessage]] = {
            cls: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"twin.{name}"))
            for cls, name in self._names.items()
        }

    def _declare(self, cls: type[Message]) -> str:
        if cls not in self._names:
            name = self._names[cls] = f"M{len(self._names)}"
            declared = descriptor_pb2.DescriptorProto(name=name)
            for field in cls.FIELDS:
                self._declare_field(declared, field)
            self._file.message_type.append(declared)
        return "." + "twin." + self._names[cls]

    def _declare_field(self, declared: Any, field: Field) -> None:
        made = declared.field.add(name=field.name, number=field.number)
        made.label = _FIELD.LABEL_REPEATED if field.repeated or field.key else _FIELD.LABEL_OPTIONAL
        if field.key:
            entry_name = "".join(part.capitalize() for part in field.name.split("_")) + "Entry"
            entry = declared.nested_type.add(name=entry_name)
            entry.options.map_entry = True
            self._declare_field(entry, named(Field(1, field.key), "key"))
            self._declare_field(entry, named(Field(2, field.kind, field.message), "value"))
            made.type, made.type_name = _FIELD.TYPE_MESSAGE, f".twin.{declared.name}.{entry_name}"
            return
        made.type = _TYPES[field.kind]
        if field.message is not None:
            made.type_name = self._declare(field.message)
        if field.kind == "enum":
            made.type_name = ".twin.AnyEnum"
        if field.repeated and made.type not in (_FIELD.TYPE_STRING, _FIELD.TYPE_BYTES, _FIELD.TYPE_MESSAGE):
            made.options.packed = self._packed
        if field.optional:
            made.proto3_optional = True
            made.oneof_index = len(declared.oneof_decl)
            declared.oneof_decl.add(name=f"_{field.name}")

    def of(self, ours: Message) -> Any:
        """A protobuf message with the same values, set field by field and not by way of any encoding."""
        theirs: Any = self.classes[type(ours)]()
        self._fill(theirs, ours)
        return theirs

    def _fill(self, theirs: Any, ours: Message) -> None:
        for field in ours.FIELDS:
            value = getattr(ours, field.name)
            slot = getattr(theirs, field.name)
            if value is None:
                continue
            if field.key and field.message:
                for key, one in value.items():
                    self._fill(slot[key], one)
                    slot.get_or_create(key)
            elif field.key:
                slot.update(value)
            elif field.repeated and field.message:
                for one in value:
                    self._fill(slot.add(), one)
            elif field.repeated:
                slot.extend(value)
            elif field.message:
                slot.SetInParent()
                self._fill(slot, value)
            else:
                setattr(theirs, field.name, bytes(value) if field.kind == "buffer" else value)


def named(field: Field, name: str) -> Field:
    field.name = name
    return field


def _integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return st.one_of(st.integers(low, high), st.sampled_from([low, high, 0, 1, 127, 128, 16383, 16384]))


_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    "bytes": st.binary(max_size=300),
    "buffer": st.binary(max_size=300),
    "bool": st.booleans(),
    "float": st.floats(width=32, allow_nan=False),
    "double": st.floats(allow_nan=False),
    "enum": _integers(32, True),
    **{
        f"{prefix}int{bits}": _integers(bits, prefix != "u") for prefix in ("", "u", "s") for bits in (32, 64)
    },
    **{f"{prefix}fixed{bits}": _integers(bits, prefix == "s") for prefix in ("", "s") for bits in (32, 64)},
}


def instances(cls: type[Message]) -> st.SearchStrategy[Any]:
    """Any instance of a declared message; every field may also be left out."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in cls.FIELDS:
        one = instances(field.message) if field.message else _VALUES[field.kind]
        if field.key:
            fields[field.name] = st.dictionaries(_VALUES[field.key], one, max_size=4)
        elif field.repeated:
            fields[field.name] = st.lists(one, max_size=6)
        else:
            fields[field.name] = one
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: cls(**values))
