"""Which version a program of the host is: asked of it once, remembered while its file stays the same.

It must not know what the versions mean, but for QEMU's, which has a least one.
"""

import json
import os
import re
import subprocess
from pathlib import Path

from config.programs import QEMU_LEAST
from rpc.errors import FailedPrecondition
from shim.trace import write_json

ANSWER_S = 5.0


def identity(program: str) -> str:
    """Changes when the file is replaced or written to. Raises OSError."""
    status = os.stat(program)
    return f"{program} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def version_text(program: str, cache: Path) -> str:
    """What `program --version` prints; empty if it prints nothing within ANSWER_S. Raises OSError."""
    key = identity(program)
    try:
        stored = json.loads(cache.read_text())
        if stored["key"] == key:
            return str(stored["text"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache is the ordinary first time
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    try:
        cache.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        write_json(cache, {"key": key, "text": answer.stdout[:1024]})
    except OSError:
        pass  # asked again next time
    return answer.stdout


def qemu_version(program: str, cache: Path) -> "tuple[int, int] | None":
    """None for one that does not say."""
    found = re.search(r"version (\d+)\.(\d+)", version_text(program, cache))
    return None if found is None else (int(found[1]), int(found[2]))


def check_qemu(program: str, cache: Path) -> None:
    """Raises FailedPrecondition for a QEMU that is too old. One that says nothing is left to libvirt."""
    found = qemu_version(program, cache)
    if found is not None and found < QEMU_LEAST:
        raise FailedPrecondition(
            f"QEMU {found[0]}.{found[1]} ({program}) is too old",
            details="{}.{} is the oldest that works".format(*QEMU_LEAST),
            hint="Debian 12 has QEMU 7.2",
        )
