"""Imports asyncio without the modules that it imports and that agent or shim never use: half of the agent's
import time, and a MiB of each shim.

In place of each of them stands one with the few constants that asyncio reads while it is imported; whoever
asks it for anything else gets the real module, loaded then.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Deferred(ModuleType):
    """A module that is loaded when it is first asked for something that was not given here."""

    def __init__(self, name: str, **given: object) -> None:
        super().__init__(name)
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by the import system and the like, not by the module's users
            raise AttributeError(f"module {self.__name__!r} is not loaded yet and has no {name!r} until then")
        return getattr(self._load(), name)

    def _load(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        __import__(self.__name__)
        real = sys.modules[self.__name__]
        self.__dict__.update(real.__dict__)  # for those who hold on to the stand-in
        return real


def _real(name: str) -> Any:
    module = sys.modules[name]
    return module._load() if isinstance(module, Deferred) else module


class _Logger:
    """logging.getLogger() without logging until something is logged that logging would show: a warning."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        return getattr(_real("logging").getLogger(self._name), method)

    def debug(self, *arguments: object, **keywords: object) -> None:
        """Nobody lowers logging's level in a guest."""

    info = debug


class _Subscriptable:
    def __class_getitem__(cls, parameters: object) -> type[_Subscriptable]:
        return cls


def _same(decorated: object) -> object:
    return decorated


def _extract_stack(*arguments: Any) -> Any:
    return _real("traceback").extract_stack(*arguments)


FUTURES = {
    "FIRST_COMPLETED": "FIRST_COMPLETED",
    "FIRST_EXCEPTION": "FIRST_EXCEPTION",
    "ALL_COMPLETED": "ALL_COMPLETED",
}
DEBUG = 10
SUBPROCESS = {"PIPE": -1, "STDOUT": -2, "DEVNULL": -3}


def for_agent() -> None:
    """For a process that does not log but what went wrong."""
    _import_asyncio(
        Deferred("inspect"),
        Deferred("linecache"),
        Deferred("logging", getLogger=_Logger, DEBUG=DEBUG),
        Deferred("subprocess", **SUBPROCESS),
        Deferred("traceback", extract_stack=_extract_stack),
        Deferred("typing", final=_same, Optional=_Subscriptable, Type=_Subscriptable),
        Deferred("concurrent.futures", **FUTURES),
        Deferred("asyncio.sslproto"),
    )


def for_shim() -> None:
    """For a process that needs all but what it would talk to strangers or run programs by."""
    _import_asyncio(Deferred("subprocess", **SUBPROCESS), Deferred("asyncio.sslproto"))


def _import_asyncio(*stand_ins: Deferred) -> None:
    """With the stand-ins in place of what is not loaded yet."""
    import concurrent

    for stand_in in stand_ins:
        if stand_in.__name__ not in sys.modules:
            sys.modules[stand_in.__name__] = stand_in
            if stand_in.__name__ == "concurrent.futures":
                concurrent.futures = stand_in
    if "ssl" in sys.modules:
        import asyncio
    else:
        sys.modules["ssl"] = None  # type: ignore[assignment]  # asyncio does without
        import asyncio  # noqa: F401

        del sys.modules["ssl"]
