"""The container's ends of standard input and output: pipes, or a terminal that crun hands over.

A pipe is never buffered: what is not asked for stays in the kernel, which is the back-pressure. A terminal
has to be, within a bound (TerminalOutput).
Must not know of containers or RPC types.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import stat
import termios
from struct import pack

from rpc.errors import FailedPrecondition, Internal, InvalidArgument

STDOUT = 1
STDERR = 2
READ_MAX_BYTES = 1024 * 1024
PIPE_BYTES = 256 * 1024
TERMINAL_BYTES = 1024 * 1024
_ENDED = b""
_HUNG_UP = (errno.EIO, errno.ECONNRESET)  # a terminal that nobody holds open any more; a connection


class _End:
    """Our end of a pipe or terminal: one waits for it at a time, and closing wakes who waits."""

    def __init__(self, fd: int, *, writing: bool) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._writing = writing
        self._waiting: asyncio.Event | None = None

    @property
    def closed(self) -> bool:
        return self.fd < 0

    async def ready(self) -> None:
        """Returns when the descriptor can be read (or written), or has been closed."""
        loop = asyncio.get_running_loop()
        self._waiting = asyncio.Event()
        (loop.add_writer if self._writing else loop.add_reader)(self.fd, self._waiting.set)
        try:
            await self._waiting.wait()
        finally:
            self._forget()
            self._waiting = None

    def close(self) -> None:
        if not self.closed:
            if self._waiting is not None:
                self._forget()
                self._waiting.set()
            os.close(self.fd)
            self.fd = -1

    def _forget(self) -> None:
        """Before the number can mean another descriptor."""
        if not self.closed:
            loop = asyncio.get_running_loop()
            (loop.remove_writer if self._writing else loop.remove_reader)(self.fd)


class Output:
    """One stream out of a process; one reader at a time."""

    def __init__(self, fd: int) -> None:
        self._end = _End(fd, writing=False)
        self._busy = False
        self._ended = False

    async def read(self, max_bytes: int) -> bytes:
        """Up to max_bytes as soon as there are any; empty at the end of the stream."""
        if self._busy:
            raise FailedPrecondition("this output is already being read")
        self._busy = True
        size = min(max_bytes or READ_MAX_BYTES, READ_MAX_BYTES)
        try:
            while not (self._ended or self._end.closed):
                try:
                    data = os.read(self._end.fd, size)
                except BlockingIOError:
                    await self._end.ready()
                    continue
                except OSError as error:
                    if error.errno not in _HUNG_UP:
                        raise
                    data = _ENDED
                if data:
                    return data
                self._ended = True
            return _ENDED
        finally:
            self._busy = False

    def close(self) -> None:
        """Whoever is reading is told that the stream has ended."""
        self._end.close()


class TerminalOutput:
    """What comes out of a terminal, read as soon as it is there; one reader at a time.

    When a session's leader exits, the kernel hangs the terminal up and drops what has not been read from
    its buffers yet (drivers/tty/pty.c, pty_flush_buffer): waiting for somebody to ask would lose last lines.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._held = bytearray()
        self._ended = False
        self._busy = False
        self._news = asyncio.Event()
        self._listen()

    async def read(self, max_bytes: int) -> bytes:
        """Up to max_bytes as soon as there are any; empty at the end of the stream."""
        if self._busy:
            raise FailedPrecondition("this output is already being read")
        self._busy = True
        try:
            while not self._held and not self._ended:
                self._news.clear()
                await self._news.wait()
            size = min(max_bytes or READ_MAX_BYTES, READ_MAX_BYTES)
            data = bytes(self._held[:size])
            del self._held[:size]
            if len(self._held) < TERMINAL_BYTES:
                self._listen()
            return data
        finally:
            self._busy = False

    def close(self) -> None:
        """Whoever is reading is told that the stream has ended."""
        self._finish()
        self._held.clear()

    def _listen(self) -> None:
        if not self._ended:
            asyncio.get_running_loop().add_reader(self._fd, self._take)

    def _take(self) -> None:
        """Everything that is there, up to the bound: then the terminal fills, and its program waits."""
        try:
            while len(self._held) < TERMINAL_BYTES:
                data = os.read(self._fd, READ_MAX_BYTES)
                if not data:
                    self._finish()
                    return
                self._held += data
                self._news.set()
            asyncio.get_running_loop().remove_reader(self._fd)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal nobody holds open any more
                raise
            self._finish()

    def _finish(self) -> None:
        if not self._ended:
            self._ended = True
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._news.set()


class Input:
    """The stream into a process; writers take turns."""

    def __init__(self, fd: int, *, terminal: bool) -> None:
        self._end = _End(fd, writing=True)
        self._terminal = terminal
        self._turn = asyncio.Lock()

    async def write(self, data: bytes) -> None:
        """Returns when the kernel has all of it. FailedPrecondition when nobody will ever read it."""
        view = memoryview(data)
        async with self._turn:
            while view:
                if self._end.closed:
                    raise FailedPrecondition("standard input is closed")
                try:
                    view = view[os.write(self._end.fd, view) :]
                except BlockingIOError:
                    await self._end.ready()
                except OSError as error:
                    if error.errno not in (errno.EPIPE, *_HUNG_UP):
                        raise
                    raise FailedPrecondition("standard input has no reader any more") from error

    async def finish(self) -> None:
        """End of file after what was written. A terminal has none: it ends with its process."""
        if not self._terminal:
            async with self._turn:
                self.close()

    def close(self) -> None:
        """Whoever is writing is told so."""
        self._end.close()


class Stdio:
    """A process's standard streams: our ends, and until it is started the ends it is to inherit."""

    def __init__(self) -> None:
        self.input: Input | None = None
        self.outputs: dict[int, Output | TerminalOutput] = {}
        self.inherited: list[int] = []
        self._master = -1
        self._terminal = False

    @classmethod
    def pipes(cls, *, stdin: bool) -> Stdio:
        made = cls()
        try:
            if stdin:
                theirs, ours = os.pipe2(os.O_CLOEXEC)
                made.inherited.append(theirs)
                made.input = Input(ours, terminal=False)
            else:
                made.inherited.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            for stream in (STDOUT, STDERR):
                ours, theirs = os.pipe2(os.O_CLOEXEC)
                made.inherited.append(theirs)
                made.outputs[stream] = Output(ours)
                fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def terminal(cls) -> Stdio:
        """Streams that come to life with adopt(); until then the process gets /dev/null."""
        made = cls()
        made._terminal = True
        made.inherited = [os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) for _ in range(3)]
        return made

    def give_to(self, uid: int, gid: int) -> None:
        """Pipes that are to be inherited are this user's, who may then open them by /dev/stdout and the like.

        crun sees to it where they are of the container's own user namespace, which they are not before.
        """
        for fd in self.inherited:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.fchown(fd, uid, gid)

    def adopt(self, master: int) -> None:
        """Takes over the master end of the terminal."""
        self._master = master
        self.outputs[STDOUT] = TerminalOutput(os.dup(master))
        self.input = Input(os.dup(master), terminal=True)

    def output(self, stream: int) -> Output | TerminalOutput:
        try:
            return self.outputs[stream]
        except KeyError:
            raise InvalidArgument(f"this process has no output stream {stream}") from None

    def resize(self, width: int, height: int) -> None:
        """A process without a terminal has no size: that is not an error (runc answers OK too)."""
        if self._master >= 0:
            size = pack("HHHH", min(height, 0xFFFF), min(width, 0xFFFF), 0, 0)
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def handed_over(self) -> None:
        """The process has its ends now; ours must not keep the pipes open."""
        for fd in self.inherited:
            os.close(fd)
        self.inherited = []

    def close(self) -> None:
        self.handed_over()
        for output in self.outputs.values():
            output.close()
        if self.input is not None:
            self.input.close()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1


class ConsoleSocket:
    """The unix socket on which crun sends the master end of a terminal."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(path)
            self._socket.listen(1)
        except BaseException:
            self._socket.close()
            raise

    def receive(self) -> int:
        """The descriptor, once crun has said that the process exists: it was sent before that."""
        self._socket.setblocking(False)
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            raise Internal("crun handed over no terminal") from None
        with connection:
            connection.setblocking(False)
            try:
                _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
            except BlockingIOError:
                raise Internal("crun connected to the console socket and sent no terminal") from None
        if not fds:
            raise Internal("crun sent no descriptor on the console socket")
        os.set_inheritable(fds[0], False)  # recv_fds ignores MSG_CMSG_CLOEXEC
        return fds[0]

    def close(self) -> None:
        self._socket.close()
        os.unlink(self.path)
