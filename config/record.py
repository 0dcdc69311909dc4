"""Frozen records for the first milliseconds of a shim, without the import of dataclasses.

dataclasses and the inspect that it needs cost 7 ms there, and 0.5 ms more for each class; this
costs nothing to speak of. A type checker sees the same as for a frozen, keyword-only dataclass.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, NoReturn, Self, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """Base of classes that only declare typed fields; every field must be given by its name."""

    # Names and types, in the order of declaration.
    FIELDS: "ClassVar[tuple[tuple[str, Any], ...]]" = ()

    def __init_subclass__(cls) -> None:
        cls.FIELDS = tuple(cls.__annotations__.items())

    def __init__(self, **values: "Any") -> None:
        names = [name for name, _ in self.FIELDS]
        if values.keys() != set(names):
            wrong = ", ".join(sorted(values.keys() ^ set(names)))
            raise TypeError(f"{type(self).__name__}: missing or unknown: {wrong}")
        self.__dict__.update(values)

    def replace(self, **changes: "Any") -> "Self":
        """A copy with some fields changed."""
        return type(self)(**self.__dict__ | changes)

    def __setattr__(self, name: str, value: object) -> "NoReturn":
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __delattr__(self, name: str) -> "NoReturn":
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__[name] for name, _ in self.FIELDS))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={self.__dict__[name]!r}" for name, _ in self.FIELDS)
        return f"{type(self).__name__}({fields})"
