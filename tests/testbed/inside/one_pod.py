"""Run in the bed by test_pod.py: a container in a pod, looked at while it runs and after its end.

Writes what it saw to /share/seen.json; what that should be is the test's business.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from images.oci import DEMO

RUNTIME = "io.containerd.casemate.v2"
SEEN = Path("/share/seen.json")
# What an ended pod leaves on purpose: its traces, what can be found out again, locks on users.
KEPT = ("/run/casemate/ended", "/run/casemate/cache", "/run/casemate/users", "/run/libvirt")
WATCHED = ("/run", "/tmp", "/var/lib/casemate", "/var/lib/libvirt", "/etc", "/dev")
NOT_OURS = ("/run/casemate-containerd", "/run/containerd", "/run/udev", "/var/lib/casemate/containerd")
CALM_S = 60.0  # for containerd and the kernel to finish what they announce to nobody


def ctr_run(name: str, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    return ["ctr", "run", "--rm", "--runtime", RUNTIME, *options, DEMO, name, *words]


def left() -> set[str]:
    """Everything there is that a pod could leave behind."""
    names = set(Path("/proc/self/mountinfo").read_text().splitlines())
    names |= {f"process {comm}" for comm in _processes()}
    names |= {f"link {path.name}" for path in Path("/sys/class/net").iterdir()}
    names |= {f"cgroup {path}" for path in Path("/sys/fs/cgroup").rglob("*") if path.is_dir()}
    for top in WATCHED:
        names |= {str(path) for path in Path(top).rglob("*") if not str(path).startswith((*KEPT, *NOT_OURS))}
    return names


def _processes() -> Iterator[str]:
    """Those with an executable (the kernel's own have none), and zombies."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = path.joinpath("stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z" or os.readlink(path / "exe"):
                yield f"{path.name} {path.joinpath('comm').read_text().strip()}"
        except OSError:
            continue  # a kernel thread, or it ended while we looked


def timed(argv: list[str]) -> dict[str, object]:
    start = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr, "seconds": seconds}


def main() -> int:
    first = timed(ctr_run("first", "true"))
    before = left()
    facts = timed(ctr_run("second", "sh", "-c", "uname -r; cat /proc/1/comm; exit 7"))
    long = subprocess.Popen(
        ctr_run("third", "sh", "-c", "echo up; exec sleep infinity"), stdout=subprocess.PIPE
    )
    assert long.stdout is not None
    said = long.stdout.readline().decode()
    pods = json.loads(subprocess.run(["casemate", "ps", "--json"], capture_output=True, check=True).stdout)
    subprocess.run(["ctr", "task", "kill", "--signal", "KILL", "third"], check=True)
    long.communicate()
    deadline = time.monotonic() + CALM_S
    while (remains := left() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    SEEN.write_text(
        json.dumps(
            {
                "first": first,
                "facts": facts,
                "said": said,
                "pods": pods,
                "killed": long.returncode,
                "left": sorted(remains),
                "kernel": os.uname().release,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
