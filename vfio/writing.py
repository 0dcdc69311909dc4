"""Writing to sysfs: one value, one write(2), and an end to waiting for a kernel that does not come back.

It must not know what a value means. Reading is sysfs.py's.
"""

import os
import threading

from rpc.errors import DeadlineExceeded


def write(path: str, value: str, timeout_s: float) -> None:
    """Raises OSError as the kernel answers, and DeadlineExceeded if it has not within timeout_s.

    A write to unbind, bind, or reset lasts as long as a driver or a device takes, and cannot be called back:
    the thread that waits for it then stays until the kernel is done.
    """
    failed: list[OSError] = []

    def work() -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            failed.append(OSError(error.errno, error.strerror, path))

    thread = threading.Thread(target=work, name="sysfs", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise DeadlineExceeded(
            f"{path}: the kernel was not done after {timeout_s:.0f} s", f"written: {value!r}"
        )
    if failed:
        raise failed[0]
