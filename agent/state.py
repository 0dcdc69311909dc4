"""Crun's state directory of a container, and the two commands of crun's that are little but a change to it.

`crun start` writes a byte into the FIFO on which the container's init waits; `crun delete`, of a container
that has ended, removes its cgroup and this directory (crun 1.8 to 1.29, libcrun/status.c and container.c).
Done here, neither takes a process, and 55 ms of an emulated guest. What is not as expected is left as it is,
for crun to be asked. Must not know of processes, streams or hooks.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from agent.files import remove, remove_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.cgroups import Cgroup

FIFO = "exec.fifo"


class NobodyWaitsError(Exception):
    """The container's init is gone: it has the FIFO open from before it exists until it runs its program."""


def let_go(directory: str) -> bool:
    """Has the init that waits run its program. False: nothing was done, as there is no such FIFO.

    Raises NobodyWaitsError.
    """
    path = f"{directory}/{FIFO}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise NobodyWaitsError from None
    try:
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            return False
        remove(path)  # before init goes on: while it is there, crun takes the container for one that waits
        os.write(fd, b"\0")
    except BrokenPipeError:
        raise NobodyWaitsError from None
    finally:
        os.close(fd)
    return True


def take_away(directory: str, cgroup: Cgroup) -> bool:
    """Removes what is left of a container in which nothing runs. False: there is more left than that."""
    try:
        cgroup.remove()
    except OSError as error:
        if error.errno not in (
            errno.EBUSY,
            errno.ENOTEMPTY,
        ):  # a process is on its way out, or a cgroup is new
            raise
        return False
    with suppress(IsADirectoryError):
        remove_directory(directory)
    return not os.path.exists(directory)
