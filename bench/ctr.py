"""Runs `ctr` against a private containerd, with a time limit on everything, and terminals of a given size.

It reports what ctr said and returned; what that should have been is the caller's business.
"""

import abc
import contextlib
import fcntl
import itertools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.instance import Instance
from rpc.errors import DeadlineExceeded, Unavailable

NAMESPACE = f"vm-{os.getpid()}"
"""Of this process alone: cgroups are named after it, and other tests may run on this machine."""
DEPRECATION = re.compile(rb'time="[^"]*" level=warning msg="DEPRECATION: .*\n')
"""What ctr 2.x has to say about a host's cgroups v1, on the stderr that is also the container's."""

_numbers = itertools.count(1)


class CtrFailed(Unavailable):
    """ctr did not do what it was asked; the text is its own."""


class CtrTimeout(DeadlineExceeded):
    """ctr did not return in time; it was killed."""


@dataclass(frozen=True, slots=True)
class Result:
    argv: tuple[str, ...]
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def out(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.decode(errors="replace")

    def ok(self) -> "Result":
        """Itself, if ctr returned 0."""
        if self.code != 0:
            raise CtrFailed(self._brief(), details=self._details())
        return self

    def _brief(self) -> str:
        return f"ctr {' '.join(self.argv)} returned {self.code} after {self.seconds:.2f} s"

    def _details(self) -> str:
        return f"stdout: {self.stdout[-2000:]!r}\nstderr: {self.err[-4000:]}"

    def __str__(self) -> str:
        return f"{self._brief()}\n{self._details()}"


class Running:
    """A ctr that has not returned yet, with pipes."""

    def __init__(self, argv: tuple[str, ...], process: subprocess.Popen[bytes]) -> None:
        self.argv = argv
        self.process = process
        self.began = time.monotonic()

    def read_until(self, wanted: bytes, timeout_s: float) -> bytes:
        """stdout up to and including `wanted`."""
        assert self.process.stdout is not None
        return read_until(self.process.stdout.fileno(), wanted, timeout_s, str(self.argv))

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def finish(self, timeout_s: float) -> Result:
        """Close stdin and wait for the end."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            result = Result(self.argv, -1, out, err, time.monotonic() - self.began)
            raise CtrTimeout(f"did not return within {timeout_s} s: {result}") from None
        err = DEPRECATION.sub(b"", err)
        return Result(self.argv, self.process.returncode, out, err, time.monotonic() - self.began)


class Terminal:
    """A ctr whose stdin, stdout and stderr are a terminal of ours."""

    def __init__(self, argv: list[str], env: dict[str, str], columns: int, rows: int) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            try:
                # The parent sets the size before ctr can look at it: wait for its word.
                os.read(0, 1)
                os.execvpe(argv[0], argv, env)
            finally:
                os._exit(127)
        self.pid = pid
        self.argv = argv
        self.seen = b""
        attributes = termios.tcgetattr(self.fd)
        attributes[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(self.fd, termios.TCSANOW, attributes)
        self.resize(columns, rows)
        os.write(self.fd, b"\n")

    def resize(self, columns: int, rows: int) -> None:
        """The kernel sends ctr SIGWINCH."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize_until(self, columns: int, rows: int, pattern: bytes, timeout_s: float) -> None:
        """As expect(), once it has this size. Clients do not say when they begin to heed SIGWINCH, and lose
        one that comes before: hence another one each second."""
        deadline = time.monotonic() + timeout_s
        self.resize(columns, rows)
        while True:
            try:
                self.expect(pattern, min(max(deadline - time.monotonic(), 0), 1.0))
                return
            except CtrTimeout:
                if time.monotonic() >= deadline:
                    raise
                os.kill(self.pid, signal.SIGWINCH)

    def write(self, data: bytes) -> None:
        os.write(self.fd, data)

    def expect(self, pattern: bytes, timeout_s: float) -> re.Match[bytes]:
        """The first match of `pattern` in what came since the last match."""
        deadline = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.seen)) is None:
            readable, _, _ = select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise CtrTimeout(f"no {pattern!r} within {timeout_s} s in {self.seen!r} of {self.argv}")
            if not self._read():
                raise CtrFailed(f"the terminal ended before {pattern!r}: {self.seen!r} of {self.argv}")
        self.seen = self.seen[match.end() :]
        return match

    def collect(self, end: bytes, timeout_s: float) -> bytes:
        """What comes before `end`; for much output, which expect() would search again with every piece."""
        deadline = time.monotonic() + timeout_s
        while end not in self.seen[-len(end) - 65536 :]:
            if not select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise CtrTimeout(f"no {end!r} within {timeout_s} s in {self.seen[-200:]!r} of {self.argv}")
            if not self._read():
                raise CtrFailed(f"the terminal ended before {end!r}: {self.seen[-200:]!r} of {self.argv}")
        before, self.seen = self.seen.split(end, 1)
        return before

    def _read(self) -> bool:
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.seen += data
        return bool(data)

    def finish(self, timeout_s: float) -> tuple[int, bytes]:
        """Exit code of ctr and the output not matched so far."""
        deadline = time.monotonic() + timeout_s
        while True:
            readable, _, _ = select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise CtrTimeout(f"did not end within {timeout_s} s: {self.seen!r} of {self.argv}")
            if not self._read():
                break
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status), self.seen

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


class Client(abc.ABC):
    """A client's program, run where an instance is."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    @abc.abstractmethod
    def command(self, *argv: str) -> list[str]:
        """With what comes before these arguments, the program itself included."""

    @contextlib.contextmanager
    def start(self, *argv: str) -> Iterator[Running]:
        """The program in the background, with pipes; killed at the end of the block if it still runs."""
        with self._started(self.command(*argv)) as running:
            yield running

    @contextlib.contextmanager
    def _started(self, command: list[str]) -> Iterator[Running]:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, env=self.instance.env(), stdin=pipe, stdout=pipe, stderr=pipe
        ) as process:
            try:
                yield Running(tuple(command), process)
            finally:
                process.kill()

    @contextlib.contextmanager
    def terminal(self, *argv: str, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
        terminal = Terminal(self.command(*argv), self.instance.env(), columns, rows)
        try:
            yield terminal
        finally:
            terminal.close()


class Ctr(Client):
    """`ctr` of one instance, in one containerd namespace. cgroups: the one that containers are below."""

    def __init__(self, instance: Instance, namespace: str = NAMESPACE, cgroups: str = "") -> None:
        super().__init__(instance)
        self.namespace = namespace
        self.cgroups = cgroups or namespace

    def command(self, *argv: str) -> list[str]:
        program = self.instance.binaries["ctr"]
        return self.instance.inside(program, "--namespace", self.namespace, *argv)

    def __call__(self, *argv: str, stdin: bytes | IO[bytes] | None = None, timeout_s: float = 60.0) -> Result:
        """Run ctr to its end. stdin is empty unless given."""
        began = time.monotonic()
        data = stdin if isinstance(stdin, bytes) else None
        source = subprocess.PIPE if isinstance(stdin, bytes) else (stdin or subprocess.DEVNULL)
        with subprocess.Popen(
            self.command(*argv),
            env=self.instance.env(),
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                out, err = process.communicate(data, timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                result = Result(argv, -1, out, err, time.monotonic() - began)
                raise CtrTimeout(f"did not return within {timeout_s} s: {result}") from None
        return Result(argv, process.returncode, out, DEPRECATION.sub(b"", err), time.monotonic() - began)

    def import_image(self, archive: Path) -> None:
        self("image", "import", "--local", "--no-unpack", str(archive), timeout_s=300)

    @staticmethod
    def new_id(prefix: str = "c") -> str:
        """A container id nobody used before in this process."""
        return f"{prefix}{next(_numbers)}"


def read_until(fd: int, wanted: bytes, timeout_s: float, what: str) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout_s
    while wanted not in seen:
        readable, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
        if not readable:
            raise CtrTimeout(f"no {wanted!r} within {timeout_s} s in {seen!r} of {what}")
        data = os.read(fd, 65536)
        if not data:
            raise CtrFailed(f"output ended before {wanted!r}: {seen!r} of {what}")
        seen += data
    return seen
