"""Run in the bed by test_files.py: what the programs and the host of two pods see of their files.

One has none but its own, the other was given a directory.

Writes what it saw to /share/seen.json; what that should be is the test's business.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from images.oci import DEMO
from scripts.host import CHECKOUT
from tests.testbed.inside.one_pod import RUNTIME

SEEN = Path("/share/seen.json")
GIVEN = Path("/root/given")
TEMPLATES = Path("/var/lib/casemate/templates")
TRIALS = CHECKOUT / "bench/trials.py"
TRIALS_S = 120


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else f"{done.returncode}: {done.stdout}{done.stderr}"


class Pod:
    def __init__(self, name: str, source: Path, target: str) -> None:
        self.name = name
        self._execs = 0
        mount = f"type=bind,src={source},dst={target},options=rbind:rw"
        command = ("sleep", "infinity")
        self.started = run(
            *("ctr", "run", "--detach", "--runtime", RUNTIME, "--mount", mount, DEMO, name, *command)
        )

    def __call__(self, *argv: str) -> str:
        self._execs += 1
        return run("ctr", "task", "exec", "--exec-id", f"{self.name}{self._execs}", self.name, *argv)

    def tried(self, directory: str) -> list[str]:
        return self("timeout", str(TRIALS_S), "python3", "-c", TRIALS.read_text(), directory).splitlines()

    def end(self) -> None:
        run("ctr", "task", "kill", "--signal", "KILL", self.name)
        run("ctr", "task", "delete", self.name)
        run("ctr", "container", "delete", self.name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def maps_of_rams() -> list[str]:
    """Of all QEMUs."""
    return [
        line
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"qemu-system" in path.read_bytes()
        for line in path.with_name("maps").read_text().splitlines()
        if "/ram" in line
    ]


def alone() -> dict[str, object]:
    file = GIVEN / "file"
    file.write_text("first\n")
    rams = list(TEMPLATES.glob("*/ram"))
    before = [digest(path) for path in rams]
    pod = Pod("alone", file, "/etc/given")
    seen: dict[str, object] = {
        "started": pod.started,
        "mounts": pod("cat", "/proc/mounts"),
        "tried": pod.tried("/tried"),
        "first": pod("cat", "/etc/given"),
        "maps": maps_of_rams(),
        "pods": json.loads(run("casemate", "ps", "--json")),
    }
    file.write_text("second, and longer\n")
    seen["second"] = pod("cat", "/etc/given")
    pod("sh", "-c", "echo from the guest > /etc/given")
    seen["host"] = file.read_text()
    pod.end()
    seen["template_changed"] = [digest(path) for path in rams] != before
    return seen


def shared() -> dict[str, object]:
    for version in ("one", "two"):
        (GIVEN / version).mkdir()
        (GIVEN / version / "key").write_text(version)
    (GIVEN / "current").symlink_to("one")
    pod = Pod("shared", GIVEN, "/volume")
    seen: dict[str, object] = {
        "started": pod.started,
        "tried": pod.tried("/volume/tried"),
        "first": pod("cat", "/volume/current/key"),
        "pods": json.loads(run("casemate", "ps", "--json")),
    }
    # As the kubelet changes a volume while it is used.
    (GIVEN / "next").symlink_to("two")
    (GIVEN / "next").rename(GIVEN / "current")
    seen["second"] = pod("cat", "/volume/current/key")
    pod.end()
    return seen


def main() -> int:
    GIVEN.mkdir()
    SEEN.write_text(json.dumps({"alone": alone(), "shared": shared()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
