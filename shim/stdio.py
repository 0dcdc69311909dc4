"""The host's ends of a process's stdio: FIFOs, files, and logger programs, behind two small types.

A Sink takes bytes and makes the writer wait; a Source gives them. Neither knows where the other end of the
process is. Forms of the URIs: containerd's core/runtime/v2/README.md.
"""

import asyncio
import errno
import logging
import os
import signal
from urllib.parse import parse_qsl, unquote, urlsplit

from rpc.errors import DeadlineExceeded, InvalidArgument, NotFound
from shim.helper import Helper, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.record import Identity

READ_BYTES = 64 << 10
LOGGER_READY_S = 10.0
LOGGER_END_S = 12.0
NOT_CONTAINERDS = frozenset(("CASEMATE_POD", "DBUS_SYSTEM_BUS_ADDRESS"))  # set by daemon.py and vm/host.py

log = logging.getLogger("casemate")


class Sink:
    """Where output goes: a descriptor that is written to without blocking the event loop."""

    def __init__(self, fd: int, logger: "Logger | None" = None) -> None:
        self._fd = fd
        self._logger = logger
        self._lost = False

    async def write(self, data: bytes) -> None:
        """Returns when all of it is written. A reader that is gone, or a full disk, is no fault of the
        program's: what it prints from then on is dropped, and the log says so once."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await _writable(self._fd)
            except OSError as error:
                if not is_gone(error):
                    raise
                if not self._lost:
                    log.warning("output is dropped: %s", error.strerror)
                    self._lost = True
                return

    async def close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if self._logger is not None:
            await self._logger.release()


class Source:
    """Where input comes from. Its end is told by close_soon() alone: a FIFO that we hold open has none."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._closing = asyncio.Event()

    def close_soon(self) -> None:
        """What was written until now is still read, then comes the end."""
        self._closing.set()

    async def read(self) -> bytes:
        """b"" at the end."""
        while True:
            last = self._closing.is_set()
            try:
                return os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                if last:
                    return b""
            await _readable(self._fd, self._closing)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Logger:
    """A program that was handed the read ends of both pipes; released once both write ends are closed."""

    def __init__(self, process: Helper, sinks: int) -> None:
        self._process = process
        self._open = sinks

    async def release(self) -> None:
        """As containerd's own shims: SIGTERM when there is nothing more to log, SIGKILL 12 s later."""
        self._open -= 1
        if self._open > 0:
            return
        self._process.kill(signal.SIGTERM)
        try:
            async with asyncio.timeout(LOGGER_END_S):
                await self._process.exited.wait()
        except TimeoutError:
            await self._process.end()


class Stdio:
    """The three of one process; a terminal has no stderr of its own.

    ends_with_exit: its readers know of its end by the exit of the process. Those of FIFOs see an end of file.
    """

    def __init__(
        self,
        source: Source | None,
        stdout: Sink | None,
        stderr: Sink | None,
        *,
        ends_with_exit: bool = False,
    ) -> None:
        self.source = source
        self.stdout = stdout
        self.stderr = stderr
        self.ends_with_exit = ends_with_exit

    async def close(self) -> None:
        if self.source is not None:
            self.source.close()
        for sink in (self.stdout, self.stderr):
            if sink is not None:
                await sink.close()


async def open_stdio(
    stdin: str, stdout: str, stderr: str, terminal: bool, container_id: str, identity: "Identity"
) -> Stdio:
    """Raises InvalidArgument for a URI of another form, NotFound for a FIFO or a program that is not there.

    Nothing is left open after an error. identity: of the pod.
    """
    source: Source | None = None
    sinks: list[Sink | None] = []
    try:
        if stdin:
            source = Source(_open_fifo(stdin))
        if terminal:
            stderr = ""
        if stdout.startswith("binary://"):
            sinks = list(await _open_logger(stdout, not terminal, container_id, identity))
        else:
            for uri in (stdout, stderr):
                sinks.append(Sink(_open_sink(uri)) if uri else None)
        ends_with_exit = any("://" in uri and not uri.startswith("fifo://") for uri in (stdout, stderr))
        return Stdio(source, sinks[0], sinks[1], ends_with_exit=ends_with_exit)
    except BaseException:
        await Stdio(source, *[*sinks, None, None][:2]).close()
        raise


def _open_fifo(path: str) -> int:
    """For reading and writing both, so that it neither blocks nor ends while containerd restarts."""
    try:
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"stdio: {path} does not exist") from error
    except OSError as error:
        raise InvalidArgument(f"stdio: {path}: {error.strerror}") from error


def _open_sink(uri: str) -> int:
    scheme, path = _split(uri)
    if scheme == "fifo":
        return _open_fifo(path)
    if scheme == "file":
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InvalidArgument(f"stdio: {path}: {error.strerror}") from error
    raise InvalidArgument(f"stdio: {uri}: not a FIFO, file:// or binary://")


def _split(uri: str) -> tuple[str, str]:
    if "://" not in uri:
        return "fifo", uri
    parts = urlsplit(uri)
    return parts.scheme, unquote(parts.path)


async def _open_logger(
    uri: str, stderr: bool, container_id: str, identity: "Identity"
) -> tuple[Sink | None, Sink | None]:
    """Starts the program: descriptor 3 is stdout, 4 stderr, 5 is closed by it when it is ready.

    stderr: whether there is one; if not, descriptor 4 is at its end from the beginning.

    It is one of the host's, with the host's files and network, of which it may need any to log to. What it
    does not have is the host's PID namespace: it must not outlive the pod.
    """
    parts = urlsplit(uri)
    program = unquote(parts.path)
    arguments = [word for pair in parse_qsl(parts.query, keep_blank_values=True) for word in pair if word]
    if not os.access(program, os.X_OK):
        raise NotFound(f"stdio: logger {program} cannot be executed")
    pairs = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
    (out_read, out_write), (err_read, err_write), (ready_read, ready_write) = pairs
    try:
        process = spawn(
            "logger",
            [program, *arguments],
            fds={3: out_read, 4: err_read, 5: ready_write},
            env=logger_environment(container_id, identity.namespace),
            within=identity.host,
        )
    except BaseException:
        for fd in (fd for pair in pairs for fd in pair):
            os.close(fd)
        raise
    for fd in (out_read, err_read, ready_write):
        os.close(fd)
    writes = [out_write, err_write]
    if not stderr:
        os.close(writes.pop())
    for fd in (*writes, ready_read):
        os.set_blocking(fd, False)
    logger = Logger(process, len(writes))
    try:
        async with asyncio.timeout(LOGGER_READY_S):
            await _readable(ready_read)
    except BaseException as error:
        process.kill()
        for fd in writes:
            os.close(fd)
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"logger {program} was not ready within {LOGGER_READY_S:.0f} s") from error
        raise
    finally:
        os.close(ready_read)
    return Sink(out_write, logger), Sink(err_write, logger) if stderr else None


def logger_environment(container_id: str, namespace: str) -> dict[str, str]:
    """containerd's own, as with its own shims, and whose output it is."""
    own = {name: value for name, value in os.environ.items() if name not in NOT_CONTAINERDS}
    return {**own, "CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


async def _readable(fd: int, or_set: asyncio.Event | None = None) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _settle, ready)
    other = None if or_set is None else asyncio.create_task(or_set.wait())
    if other is not None:
        other.add_done_callback(lambda _: _settle(ready))
    try:
        await ready
    finally:
        loop.remove_reader(fd)
        if other is not None:
            other.cancel()


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def is_gone(error: OSError) -> bool:
    """Whether a sink's other end, or its file system's room, is what is missing."""
    return error.errno in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)
