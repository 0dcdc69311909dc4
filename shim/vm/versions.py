"""Which version a program of the host is: asked of it once, remembered while its file stays the same.

It must not know what the versions mean, but for QEMU's, which has a least one.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from config.programs import QEMU_LEAST
from rpc.errors import FailedPrecondition
from shim.trace import write_json

ANSWER_S = 5.0
SINCE: "Mapping[str, Mapping[str, tuple[int, int]]]" = {
    # One object of the kernel's for all devices of a machine. QEMU 9.0: backends/iommufd.c; libvirt 12.1:
    # the driver element of a hostdev. What of it the kernel has is seen in /dev.
    "iommufd": {"QEMU": (9, 0), "libvirt": (12, 1)},
}
"""What is used where it is there: since which version of which program it is."""


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


def lacking(feature: str, found: "Mapping[str, tuple[int, int] | None]") -> str:
    """Why it is not to be had with these versions (None: not known); "" if it is."""
    for program, since in SINCE[feature].items():
        version = found[program]
        if version is None or version < since:
            said = "of a version that is not known" if version is None else "{}.{}".format(*version)
            return "{} is {}; {} is needed".format(program, said, "{}.{}".format(*since))
    return ""


def check_qemu(program: str, cache: Path) -> "tuple[int, int] | None":
    """Its version; None if it says none: that is left to libvirt. Raises FailedPrecondition if too old."""
    said = re.search(r"version (\d+)\.(\d+)", version_text(program, cache))
    if said is None:
        return None
    found = (int(said[1]), int(said[2]))
    if found < QEMU_LEAST:
        raise FailedPrecondition(
            f"QEMU {found[0]}.{found[1]} ({program}) is too old",
            details="{}.{} is the oldest that works".format(*QEMU_LEAST),
            hint="Debian 12 has QEMU 7.2",
        )
    return found
