"""Work that is finished although whoever began it is killed meanwhile.

containerd gives `delete` 5 seconds (io.containerd.timeout.shim.cleanup) and then kills it. On a host with
far too much to do that is too little: the shim, which would have cleaned up itself, was killed by then, and
the rest stayed. It must not know what the work is.
"""

import json
import os
from collections.abc import Callable
from typing import NoReturn

from rpc.errors import FailedPrecondition, Unavailable


def finish(work: Callable[[], list[str]]) -> list[str]:
    """What work() returns, from a process that nobody but the kernel ends.

    It has none of the caller's standard streams: who reads those must not wait for it. Raises
    FailedPrecondition with the text of what work() raises.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(work, writing)
    os.close(writing)
    with open(reading, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise Unavailable("the process that cleans up has ended before it was done")
    said = json.loads(text)
    if "failed" in said:
        raise FailedPrecondition(said["failed"])
    return list(said["done"])


def _work(work: Callable[[], list[str]], writing: int) -> NoReturn:
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        try:
            said: dict[str, object] = {"done": work()}
        except Exception as error:  # noqa: BLE001 - raised by finish()
            said = {"failed": f"{error}" or type(error).__name__}
        with open(writing, "wb") as answer:
            answer.write(json.dumps(said).encode())
    finally:
        os._exit(0)  # also where nobody reads any more
