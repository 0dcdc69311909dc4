"""Where the shim's log goes: its own file (stderr, by then), and the FIFO that containerd reads.

containerd may be gone, or not reading: the FIFO takes what it can, the file is complete.
"""

import logging
import os
import sys
import time


def set_up_logging(level: str, bundle: str) -> None:
    """level: error, warning, info or debug. The FIFO is <bundle>/log."""
    root = logging.getLogger()
    root.handlers.clear()  # of a machine that was nobody's before
    root.setLevel(level.upper())
    own = logging.StreamHandler(sys.stderr)
    own.setFormatter(Logfmt())
    root.addHandler(own)
    try:
        fd = os.open(os.path.join(bundle, "log"), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # nobody reads it: a shim run by hand, or a containerd that is gone
    fifo = FifoHandler(fd)
    fifo.setFormatter(Logfmt())
    root.addHandler(fifo)


class FifoHandler(logging.Handler):
    """Drops what the other side does not take at once: a log must not stop a pod."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._fd, (self.format(record) + "\n").encode())
        except (BlockingIOError, BrokenPipeError):
            return


class Logfmt(logging.Formatter):
    """time=... level=... msg="...", as containerd's own lines are."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        # Names that a client or a guest chose end up in here, and on a terminal.
        quoted = "".join(_quoted(character) for character in text)
        level = record.levelname.lower()
        return f'time="{moment}.{int(record.msecs):03d}Z" level={level} msg="{quoted}" runtime=casemate'


def _quoted(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character == "\n":
        return "\\n"
    return character if character.isprintable() else f"\\u{ord(character):04x}"
