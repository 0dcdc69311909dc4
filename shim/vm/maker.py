"""Makes a template: boots a machine of a pod's shape that is nobody's pod, and saves it.

It must not know who wants the template, nor in what process it runs.
"""

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from rpc.api import agent as api
from rpc.api.types import Empty
from rpc.errors import CasemateError, DeadlineExceeded, ResourceExhausted
from shim.helper import in_thread
from shim.trace import Trace
from shim.vm import designer, ram
from shim.vm.console import Console
from shim.vm.designer import Way
from shim.vm.hello import greet
from shim.vm.setting import (
    AgentLine,
    MachineRequest,
    Setting,
    make_setting,
    open_console,
    open_libvirt,
    run_qemu,
)
from shim.vm.sources import unless_ended
from shim.vm.template import RAM, STATE, Template
from shim.vm.template_key import template_key
from shim.vm.versions import identity

SAVE_S = 30.0
UNUSED_S = 3600.0
log = logging.getLogger("casemate")


async def make_template(request: MachineRequest, trace: Trace, most: int | None = None) -> Template | None:
    """The template of a request's shape, made now. None if it is there, or another process makes it.

    most: how many there may be then, as tenants may choose shapes: one that was not used for an hour makes
    room. Raises a CasemateError that says which part failed and in whose words, or an OSError. What is left
    then is a note of it, so that pods do not try again at once.
    """
    async with AsyncExitStack() as undo:
        setting = make_setting(request, trace, undo)
        key = template_key(setting)
        begun_s = time.monotonic()
        try:
            staging = undo.enter_context(setting.templates.making(key))
            if staging is None or setting.templates.version(key):
                return None
            if most is not None and not setting.templates.make_room(most, UNUSED_S):
                raise ResourceExhausted(
                    f"there are {most} templates (templates_kept) or more, all used within the hour",
                    hint="a larger templates_kept; `casemate template build` makes one all the same",
                )
            about = await _save_booted(setting, trace, staging)
            template = setting.templates.publish(staging, about)
        except (CasemateError, OSError):
            setting.templates.note_failure(key)
            raise
        log.info("template %s made in %.1f s", key, time.monotonic() - begun_s)
        return template


async def _save_booted(setting: Setting, trace: Trace, staging: Path) -> "dict[str, Any]":
    """Boots, has the agent wait for another shim, and writes RAM and state. Returns what it was made of."""
    limit_s = SAVE_S * setting.factor
    memory_bytes = setting.request.profile.memory_bytes
    async with AsyncExitStack() as undo:
        console = open_console(setting, undo)
        line = AgentLine(setting, console, undo)
        undo.enter_context(ram.ram_directory(setting.ram, memory_bytes + ram.SLACK_BYTES))
        memory = ram.make_ram(setting.ram_file, memory_bytes, setting.user.uid)
        undo.callback(os.close, memory)
        process = await run_qemu(setting, partial(_create, setting, trace), None, undo)
        greeting = greet("", "casemate", line.connect(), setting.boot_s)
        client, hello = await unless_ended(greeting, process, None, console, setting.words, setting.boot_s)
        console.agent_waits.clear()
        try:
            await client.call(api.PREPARE, Empty(), timeout_s=limit_s)
        finally:
            await client.close()
        await _until_it_waits(console, limit_s)
        state = os.open(staging / STATE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, state)
        await in_thread(partial(setting.host.save_state, state, limit_s))
        target = os.open(staging / RAM, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, target)
        os.fchmod(target, 0o444)  # a QEMU that maps it has a user of its own; the directory is root's
        ram_bytes = await in_thread(partial(ram.copy_without_zeros, memory, target))
        return {
            "image": setting.image.digest,
            "profile": setting.request.profile.name,
            "tenant": setting.request.tenant,
            "accel": setting.accel.kind,
            "files": setting.files.value,
            "qemu": identity(setting.qemu),
            "kernel": hello.kernel_release,
            "vcpus": setting.request.profile.vcpus,
            "memory_bytes": memory_bytes,
            "ram_bytes": ram_bytes,
            "created_at": time.time(),
        }


async def _until_it_waits(console: Console, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await console.agent_waits.wait()
    except TimeoutError:
        raise DeadlineExceeded(
            f"the agent did not wait for another shim within {limit_s:.0f} s", details=console.words()
        ) from None


def _create(setting: Setting, trace: Trace) -> int:
    """In a thread: libvirt's calls block."""
    open_libvirt(setting.host, trace)
    return setting.host.create(setting.design(Way.TEMPLATE).xml(), designer.NAME)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
