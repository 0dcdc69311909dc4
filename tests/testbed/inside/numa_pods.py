"""Run in the bed by device_pods.py: a pod with devices of two NUMA nodes and of none, on huge pages of both.

What should be seen is the test's business.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.testbed.inside import places
from tests.testbed.inside.given import Long, casemate, ctr, record, until_free
from tests.testbed.inside.one_pod import timed

SETTINGS = Path("/etc/casemate/config.d/zz-numa.toml")
PROFILE = "numa"
MEMORY_MIB, PAGE_MIB = 256, 2
EACH = MEMORY_MIB // PAGE_MIB // 2 + 16  # of a node: enough for one such pod, and not for two
DEVICES = ("gpu0", "gpu2", "edu0")
MORE = """\
at=/sys/devices/system/node
for node in $at/node[0-9]*; do echo node ${node##*/node} cpus $(cat $node/cpulist); done
grep -h MemTotal $at/node*/meminfo
"""


def setting(*lines: str, profile: str = PROFILE) -> str:
    head = (f"[profiles.{profile}]", 'image = "cloud"', f'memory = "{MEMORY_MIB}MiB"', "vcpus = 2")
    return "\n".join((*head, *lines, ""))


def pool(node: int) -> Path:
    return Path(f"/sys/devices/system/node/node{node}/hugepages/hugepages-{PAGE_MIB << 10}kB")


@contextmanager
def huge_pages(*nodes: int, each: int) -> Iterator[None]:
    """The host has so many on these nodes."""
    for node in nodes:
        (pool(node) / "nr_hugepages").write_text(f"{each}\n")
        assert int((pool(node) / "nr_hugepages").read_text()) == each
    try:
        yield
    finally:
        for node in nodes:
            (pool(node) / "nr_hugepages").write_text("0\n")


def free() -> list[int]:
    return [int((pool(node) / "free_hugepages").read_text()) for node in (0, 1)]


def _huge_of(pid: int) -> dict[str, int]:
    """Pages of QEMU's by node, where they are huge ones of a file in memory."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines():
        if " huge " in line:
            for node, count in re.findall(r"N(\d+)=(\d+)", line):
                found[node] = found.get(node, 0) + int(count)
    return found


def _near(pid: int) -> dict[str, str]:
    """On which of the host's CPUs each of its own may run, by QEMU's names of their threads ("CPU 0/KVM")."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (name := (task / "comm").read_text().strip()).startswith("CPU "):
            status = (task / "status").read_text()
            found[name] = re.findall(r"^Cpus_allowed_list:\t(.*)$", status, re.MULTILINE)[0]
    return found


def look() -> dict[str, Any]:
    SETTINGS.write_text(setting('hugepages = "required"'))
    where = places.addresses()
    wish = ",".join(where[name] for name in DEVICES)
    options = ("--annotation", f"dev.casemate.profile={PROFILE}")
    try:
        with huge_pages(0, 1, each=EACH):
            seen: dict[str, Any] = {"before": free()}
            pod = Long("numa", wish, options, MORE)
            seen["sees"] = pod.sees()
            seen["record"] = record("numa")
            spans = casemate("trace", "numa")["spans"]
            seen["created"] = next(each["detail"] for each in spans if each["name"] == "libvirt.create")
            qemu = seen["record"]["qemu_pid"]
            seen |= {"during": free(), "huge": _huge_of(qemu), "near": _near(qemu)}
            others = f"{where['gpu1']},{where['gpu3']}"
            seen["other"] = timed(ctr("other", "true", wish=others, options=options))
            seen["ps"] = subprocess.run(["casemate", "ps"], capture_output=True, text=True, check=True).stdout
            seen["ended"] = pod.end()
            seen["states"] = until_free(DEVICES)
            seen["after"] = free()
    finally:
        SETTINGS.unlink()
    return seen
