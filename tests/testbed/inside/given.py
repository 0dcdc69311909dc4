"""Run in the bed: pods that are given devices, and what the host has to say of them.

Must not know what a test makes of it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from images.oci import DEMO
from tests.testbed.inside import places
from tests.testbed.inside.one_pod import RUNTIME

SEEN = Path("/share/seen.json")
PCI = Path("/sys/bus/pci")
# What a container sees: each function's ids, its address, its NUMA node, its resources; then it stays.
LOOK = """\
for at in /sys/bus/pci/devices/*; do
    case $(cat $at/vendor) in
    0x10de|0x1234)
        ids=$(cat $at/vendor $at/device) node=$(cat $at/numa_node)
        echo $ids ${at##*/} $node $(head -n 5 $at/resource | tr '\\n' ';') ;;
    esac
done
echo up
"""
GONE_S = 60.0
ENDED, LINES = Path("/run/casemate/ended"), 40
CLOUD = ("--annotation", "dev.casemate.profile=devices")


def ctr(name: str, *words: str, wish: str = "", options: tuple[str, ...] = CLOUD) -> list[str]:
    """wish: what the annotation says. CLOUD: the guest has the drivers of Debian's cloud kernel."""
    asked = ["--annotation", f"dev.casemate/devices={wish}"] if wish else []
    return ["ctr", "run", "--rm", "--runtime", RUNTIME, *asked, *options, DEMO, name, *words]


def casemate(*words: str) -> Any:
    done = subprocess.run(["casemate", *words, "--json"], stdout=subprocess.PIPE, check=False)
    return json.loads(done.stdout)


def states() -> dict[str, list[Any]]:
    """State and pod of every device that the ledger has not as free, by its name."""
    names = {address: name for name, address in places.addresses().items()}
    devices = casemate("gpu", "claims")["devices"]
    return {names[each["address"]]: [each["state"], each["pod"], each["reason"]] for each in devices}


def driver(name: str) -> str:
    link = PCI / "devices" / places.addresses()[name] / "driver"
    return link.readlink().name if link.is_symlink() else ""


class Long:
    """A pod that stays until it is ended. more: what its container does first."""

    def __init__(self, name: str, wish: str = "", options: tuple[str, ...] = CLOUD, more: str = "") -> None:
        self.name = name
        script = f"{more}{LOOK}exec sleep infinity"
        command = ctr(name, "sh", "-c", script, wish=wish, options=options)
        self._words: str | None = None
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def sees(self) -> list[str]:
        """Lines of LOOK, until it is up. Of one that has ended before, its words are told: whoever reads a
        failed run wants them."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            if line == "up\n":
                return lines
            lines.append(line.strip())
        print(
            f"pod {self.name} is not up: {self.ended()}",
            *_last_words(),
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
        return lines

    def end(self) -> list[Any]:
        subprocess.run(["ctr", "task", "kill", "--signal", "KILL", self.name], check=False)
        return self.ended()

    def ended(self) -> list[Any]:
        if self._words is None:
            _, self._words = self.process.communicate()
        return [self.process.returncode, self._words]


def _last_words() -> Iterator[str]:
    """Of the pod that ended last, its guest, and the kernel."""
    newest = max(ENDED.iterdir(), key=lambda path: path.stat().st_mtime, default=ENDED)
    for log in sorted(newest.glob("*.log")):
        yield from (f"{log}:", *log.read_text(errors="replace").splitlines()[-LINES:])
    kernel = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", check=False)
    yield from ("dmesg:", *kernel.stdout.splitlines()[-LINES:])


def record(name: str) -> Any:
    return next(pod for pod in casemate("ps") if pod.get("id") == name)


def qemu(name: str) -> dict[str, Any]:
    """What its process may do and see."""
    pid = record(name)["qemu_pid"]
    root = Path(f"/proc/{pid}/root/dev")
    limit = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "locked" in line)
    nodes = {}
    for path in sorted([*(root / "vfio").rglob("*"), root / "iommu"]):
        if path.exists() and path.is_char_device():
            status = path.stat()
            nodes[str(path.relative_to(root))] = [status.st_uid, status.st_mode & 0o777]
    uid = int(Path(f"/proc/{pid}/status").read_text().partition("Uid:")[2].split()[0])
    return {"uid": uid, "nodes": nodes, "locked": limit.split()[3:5], "open": _open_nodes(pid)}


def _open_nodes(pid: int) -> list[str]:
    targets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return sorted(target for target in targets if target.startswith(("/dev/vfio", "/dev/iommu")))


def until_free(names: tuple[str, ...]) -> dict[str, list[Any]]:
    """What is not, once these are or time is over. A bounded poll: the ledger tells nobody of a change."""
    deadline = time.monotonic() + GONE_S
    while (left := states()).keys() & set(names) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left
