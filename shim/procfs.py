"""Who a process is: its pid as the host counts it, and its start time, which with the pid names it for ever.

Apart from system.py, for `start`: ctypes costs 2 ms. Knows nothing of pods.
"""

import os
from collections.abc import Iterator


def host_pid(host_proc: int) -> int:
    """The caller's pid as the host counts it. host_proc is a directory fd of the host's /proc."""
    return int(os.readlink("self", dir_fd=host_proc))


def host_pid_of(pidfd: int, host_proc: int) -> int:
    """Another process's pid as the host counts it: what the host's procfs says of a pidfd (fdinfo, Pid:)."""
    path = f"self/fdinfo/{pidfd}"
    with open(path, opener=lambda name, flags: os.open(name, flags, dir_fd=host_proc)) as file:
        for line in file:
            if line.startswith("Pid:"):
                return max(int(line[4:]), 0)
    return 0


def start_time(pid: int | str, proc: int | None = None) -> int:
    """Clock ticks after boot at which a process started: with its pid, an identity that is never reused.

    proc(5), /proc/PID/stat field 22. Raises FileNotFoundError or ProcessLookupError when there is none.
    """
    opener = (lambda path, flags: os.open(path, flags, dir_fd=proc)) if proc is not None else None
    path = f"{pid}/stat" if proc is not None else f"/proc/{pid}/stat"
    with open(path, "rb", opener=opener) as file:
        return int(_after_name(file.read())[19])


def processes() -> Iterator[tuple[int, list[bytes]]]:
    """Each pid of /proc, zombies' too, with the fields of its stat from the state on (proc(5))."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    yield int(name), _after_name(file.read())
            except (FileNotFoundError, ProcessLookupError):
                continue


def _after_name(stat: bytes) -> list[bytes]:
    """A name may have spaces and brackets of its own."""
    return stat[stat.rindex(b")") + 2 :].split()


def open_process(pid: int, started: int) -> int | None:
    """A pidfd of the process that had this pid and start time, or None if it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if start_time(pid) == started:
            return fd
    except (FileNotFoundError, ProcessLookupError):
        pass
    os.close(fd)
    return None
