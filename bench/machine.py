"""What machine this is and which versions of what run on it: written into every file of samples.

Facts only, each read from the kernel or from the program itself.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ways import SEARCH_PATH, Way
from images.image import GuestImage

VERSION = re.compile(r"\d+\.\d+(?:\.\d+)*(?:[-~+][\w.]+)*")
_CGROUPS = Path("/sys/fs/cgroup")


def facts() -> dict[str, Any]:
    """load is the one-minute load average at this moment."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_model": model[1] if model else platform.machine(),
        "memory_bytes": int(memory[1]) << 10 if memory else 0,
        "kernel": platform.release(),
        "cgroups": cgroups(_CGROUPS),
        "load": os.getloadavg()[0],
    }


def cgroups(root: Path) -> str:
    """v2, v1, or hybrid: v1 with a v2 hierarchy beside it."""
    if (root / "cgroup.controllers").exists():
        return "v2"
    return "hybrid" if (root / "unified/cgroup.procs").exists() else "v1"


def versions(
    ways: Sequence[Way], containerd: str, qemu: str, image: GuestImage | None, commit: str
) -> dict[str, str]:
    """Of everything that takes part in a run of these ways. image: casemate's guests'. commit: casemate's."""
    found = {"containerd": containerd, "Python": platform.python_version()}
    for way in ways:
        for program in way.programs:
            found[program] = program_version([program, "--version"])
    if any(way.is_casemate for way in ways):
        found["QEMU"] = program_version([qemu, "--version"])
        found["libvirt"] = libvirt_version()
        found["casemate"] = commit
        if image is not None:
            found["guests' kernel"] = str(image.manifest["kernel"])
    for way in ways:
        if "kata" in way.shim:
            found["kata"] = program_version([way.shim, "--version"])
    return found


def program_version(argv: Sequence[str]) -> str:
    """The first number with dots in what a program says of itself; "unknown" if there is none."""
    program = shutil.which(argv[0], path=f"{os.environ.get('PATH', '')}:{SEARCH_PATH}")
    if program is None:
        return "unknown"
    done = subprocess.run([program, *argv[1:]], check=False, capture_output=True, text=True, timeout=60)
    found = VERSION.search(done.stdout)
    return found[0] if found else "unknown"


def libvirt_version() -> str:
    """That of the library that a shim would load; "unknown" where there is none."""
    number = ctypes.c_ulong()
    try:
        failed = ctypes.CDLL("libvirt.so.0").virGetVersion(ctypes.byref(number), None, None)
    except OSError:
        return "unknown"
    major, rest = divmod(number.value, 1_000_000)
    return "unknown" if failed else f"{major}.{rest // 1000}.{rest % 1000}"


def commit(checkout: Path) -> str:
    """The commit of a checkout, with a + if files other than docs/ differ from it, which runs write.

    For an installed casemate its version.
    """
    if not (checkout / ".git").exists():
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("casemate")
        except PackageNotFoundError:
            return "unknown"
    head = _git(checkout, "rev-parse", "--short", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--", ".", ":(exclude)docs")
    return head + ("+" if changed else "") if head else "unknown"


def _git(checkout: Path, *argv: str) -> str:
    """What git says; empty where there is no git, and where it fails."""
    command = ["git", "-c", "safe.directory=*", "-C", str(checkout), *argv]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
