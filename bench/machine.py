"""What machine this is and which versions of what run on it: written into every file of samples.

Facts only, each read from the kernel or from the program itself.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.instance import CHECKOUT
from bench.ways import SEARCH_PATH, Way

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


def versions(ways: Sequence[Way], containerd: str, qemu: str) -> dict[str, str]:
    """Of everything that takes part in a run of these ways."""
    found = {"containerd": containerd, "Python": platform.python_version()}
    for way in ways:
        for program in way.programs:
            found[program] = program_version([program, "--version"])
    if any(way.is_casemate for way in ways):
        found["QEMU"] = program_version([qemu, "--version"])
        found["casemate"] = commit(CHECKOUT)
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


def commit(checkout: Path) -> str:
    """The commit of a checkout, with a + if files differ from it; for an installed casemate its version."""
    if not (checkout / ".git").exists():
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("casemate")
        except PackageNotFoundError:
            return "unknown"
    argv = ["git", "-c", "safe.directory=*", "-C", str(checkout), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
