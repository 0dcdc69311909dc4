"""The hook for what only a vendor's program can do to a device between two pods: clear its memory, say.

Runs the program that an operator named, with the device's address for its only argument. It must not know
what that program does.
"""

import os
import signal
import subprocess
from dataclasses import dataclass

from rpc.errors import FailedPrecondition
from vfio.address import PciAddress

_SHOWN_BYTES = 1000  # of what the program said last


class ScrubFailed(FailedPrecondition):
    """The program could not be run, or did not end well: nobody knows what is in the device's memory."""


@dataclass(frozen=True, slots=True)
class Scrub:
    """program: its path. timeout_s: for one device, after which it and what it started are killed."""

    program: str
    timeout_s: float

    def run(self, address: PciAddress) -> str:
        """What it said last, for the audit log. Exit status 0 means clean, or none of its business.

        Raises ScrubFailed with that for any other end.
        """
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        try:
            with subprocess.Popen(
                [self.program, str(address)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
                start_new_session=True,
            ) as process:
                try:
                    output, _ = process.communicate(timeout=self.timeout_s)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    output = _rest(process)
                    raise self._failed(address, f"did not end within {self.timeout_s:g} s", output) from None
                except BaseException:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise
        except OSError as error:
            raise self._failed(address, f"cannot be run: {error.strerror}", b"") from error
        if process.returncode:
            raise self._failed(address, _ended(process.returncode), output)
        return f"{self.program}: {_last(output)}" if output.strip() else f"{self.program} said nothing"

    def _failed(self, address: PciAddress, how: str, output: bytes) -> ScrubFailed:
        return ScrubFailed(f"device {address}: {self.program} {how}", _last(output) or None)


def _rest(process: "subprocess.Popen[bytes]") -> bytes:
    """What a killed program has said; not waiting for what it left in another session."""
    try:
        return process.communicate(timeout=1.0)[0]
    except subprocess.TimeoutExpired as error:
        return error.stdout or b""


def _ended(status: int) -> str:
    return f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"


def _last(output: bytes) -> str:
    return output.decode(errors="replace").strip()[-_SHOWN_BYTES:]
