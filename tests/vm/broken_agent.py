"""PID 1 of a guest that misbehaves as `broken=...` on its kernel command line says; else the real agent.

It stands in an image in place of agent/__main__.py, which it calls as agent.real. It runs in the guest.
"""

import asyncio
import os
import signal
from typing import Any

from agent import services


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
        setattr(services.AgentService, method, BEHAVIOURS[behaviour])
    from agent import real  # type: ignore[attr-defined]

    real.main()


async def silent(*_: Any) -> None:
    await asyncio.Event().wait()


async def dies(*_: Any) -> None:
    os._exit(3)


async def lies(*_: Any) -> Any:
    from rpc.api import agent as api

    return api.HelloResponse(protocol=api.PROTOCOL + 41)


BEHAVIOURS = {"silent": silent, "dies": dies, "lies": lies}

if __name__ == "__main__":
    main()
