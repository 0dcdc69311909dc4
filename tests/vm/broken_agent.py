"""PID 1 of a guest that misbehaves as `broken=...` on its kernel command line says, or BROKEN=... in the
environment of the container that it makes (for a guest that was restored); else the real agent.

It stands in an image in place of agent/__main__.py, which it calls as agent.real. It runs in the guest.
"""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from agent import services
from rpc.api import agent as api
from rpc.api.types import Empty
from rpc.codec import Message

FLOOD = 2_000
ENVIRONMENT = "BROKEN="
chosen: dict[str, str] = {}
"""Behaviours by method."""
tellers: list[Callable[[Message], Awaitable[None]]] = []
"""How events are told."""


def main() -> None:
    with open("/proc/cmdline") as file:
        words = [word.partition("=")[2] for word in file.read().split() if word.startswith("broken=")]
    for word in words:
        behaviour, _, method = word.partition(":")
        if behaviour == "mute":  # never opens its port
            while True:
                signal.pause()
        if behaviour == "returns":  # PID 1 ends: the kernel panics
            return
        chosen[method] = behaviour
    for method in (name for name in vars(services.AgentService) if not name.startswith("_")):
        if method != "register":
            setattr(services.AgentService, method, misbehaving(method))
    from agent import real  # type: ignore[attr-defined]

    real.main()


def misbehaving(method: str) -> Callable[..., Awaitable[Any]]:
    honest = getattr(services.AgentService, method)

    async def answer(service: Any, request: Any, *rest: Any) -> Any:
        if method == "create_container":
            for word in json.loads(request.spec_json)["process"]["env"]:
                if word.startswith(ENVIRONMENT):
                    behaviour, _, name = word.removeprefix(ENVIRONMENT).partition(":")
                    chosen[name] = behaviour
        if method == "events":
            tellers.append(rest[-1])
        if method in chosen:
            behaviour = BEHAVIOURS[chosen[method]]
            if (answered := await behaviour(service, request)) is not None:
                return answered
        return await honest(service, request, *rest)

    return answer


async def silent(*_: Any) -> None:
    await asyncio.Event().wait()


async def dies(*_: Any) -> None:
    os._exit(3)


async def lies(*_: Any) -> Any:
    return api.HelloResponse(protocol=api.PROTOCOL + 41)


async def garbles(_: Any, request: Any) -> Any:
    """Bytes that no message is, sent as the one that is due."""
    answer: Any = (
        api.CreateContainerResponse() if isinstance(request, api.CreateContainerRequest) else Empty()
    )
    garbage = b"\xff" * 1000

    def encode_into(out: list[Any]) -> int:
        out.append(garbage)
        return len(garbage)

    answer.encode_into, answer.encode = encode_into, lambda: garbage
    return answer


async def brags(*_: Any) -> Any:
    """An error of megabytes, with what a terminal would obey."""
    from rpc.errors import InvalidArgument

    raise InvalidArgument("\x1b[2J" + "x" * (3 << 20))


async def floods(_: Any, request: Any) -> None:
    """Before it is honest it tells of what there is not, and of what there may be, again and again."""
    names = ("..", "../../../../etc/passwd", "/", "\0", "y" * 10_000, request.container_id)
    for number in range(FLOOD):
        await tellers[0](api.Event(kind=number % 5 + 2, container_id=names[number % len(names)]))


async def exaggerates(_: Any, request: Any) -> None:
    """An end with numbers that no program's can have, of every process there might be."""
    for exec_id in ("..", "\x1b[2J", ""):
        await tellers[0](
            api.Event(
                kind=api.EventKind.EXIT,
                container_id=request.container_id,
                exec_id=exec_id,
                exit_status=(1 << 32) - 1,
                exited_at_ns=-(1 << 63),
            )
        )


BEHAVIOURS: dict[str, Callable[..., Awaitable[Any]]] = {
    "silent": silent,
    "dies": dies,
    "lies": lies,
    "garbles": garbles,
    "brags": brags,
    "floods": floods,
    "exaggerates": exaggerates,
}

if __name__ == "__main__":
    main()
