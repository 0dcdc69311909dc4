"""Running one more program in a container, and taking it away again: what the guest is asked for it.

It must not know of the pod's other processes, nor of whom the exec is told to.
"""

import logging

from rpc.api import agent as api
from rpc.errors import CasemateError, DeadlineExceeded, NotFound
from shim.container import Process
from shim.record import Identity
from shim.stdio import open_stdio
from shim.vm.guest import Machine

log = logging.getLogger("casemate")


async def start_exec(machine: Machine, process: Process, document: bytes, identity: Identity) -> None:
    """document: an OCI Process as JSON. Raises the program's own error; it does not run then, nor later."""
    if process.in_doubt:
        await forget_exec(machine, process)
    stdio = await open_stdio(
        process.stdin, process.stdout, process.stderr, process.terminal, process.container_id, identity
    )
    try:
        process.in_guest = process.in_doubt = True
        await machine.call(
            api.EXEC,
            api.ExecRequest(
                container_id=process.container_id,
                exec_id=process.exec_id,
                process_json=document,
                terminal=process.terminal,
                stdin=bool(process.stdin),
            ),
        )
    except BaseException as error:
        process.in_guest = False
        await stdio.close()
        # An error that the guest answered means that it has none; its silence means nothing.
        process.in_doubt = isinstance(error, DeadlineExceeded)
        if process.in_doubt:
            await _try_to_forget(machine, process)
        raise
    process.in_doubt = False
    process.attach(machine, stdio)


async def forget_exec(machine: Machine, process: Process) -> None:
    """The guest has no such exec any more. Raises what keeps it from that; it can be tried again."""
    if not (process.in_guest or process.in_doubt):
        return
    request = api.DeleteRequest(
        container_id=process.container_id, exec_id=process.exec_id, kill=process.in_doubt
    )
    try:
        await machine.call(api.DELETE, request)
    except NotFound:
        if not process.in_doubt:
            raise
    process.in_doubt = False


async def _try_to_forget(machine: Machine, process: Process) -> None:
    """On the way out of another error, which is the one to be told."""
    try:
        await forget_exec(machine, process)
    except CasemateError as error:
        log.error("exec %s may run in the guest until it is deleted: %s", process.exec_id, error)
