"""What casemated does for this host, if it runs."""

import os
import socket
from collections.abc import Iterator

from cli.checks.result import CheckContext, Result, ok, warning
from shim import forkserver

_TIMEOUT_S = 1.0


def fork_server(context: CheckContext) -> Iterator[Result]:
    """Pods do without; they start slower then, and take more memory."""
    name = "casemated"
    if not context.settings.node.fork_server:
        yield ok(name, "not asked for shims: node.fork_server is false")
        return
    path = forkserver.server_path()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.connect(path)
            pid, uid = forkserver.peer(connection)
        except OSError as error:
            yield warning(
                name,
                f"does not serve {path} ({error.strerror or error}): every shim imports its code anew",
                "systemctl start casemated, or run `casemated` in the foreground",
            )
            return
    if uid != os.geteuid():
        yield warning(name, f"{path} is served by user {uid}, and not used", "sudo casemate check")
    else:
        yield ok(name, f"process {pid} forks shims")
