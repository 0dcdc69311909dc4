"""Run in the bed by kill_cycles.sh and test_kill_cycles.py: pods with devices, killed at any moment.

Each cycle starts a pod that has devices and ends of itself, and kills QEMU, the shim or both at a moment
drawn from the whole time that such a pod takes. Then the ledger and sysfs are asked whether they agree.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config.load import load
from tests.testbed.inside import places
from tests.testbed.inside.given import GONE_S, PCI, SEEN, casemate, ctr, driver
from tests.testbed.inside.numa_pods import huge_pages, pool
from tests.testbed.inside.one_pod import timed
from vfio.ledger.ledger import Ledger

PROFILE = "killed"
SETTINGS = Path("/etc/casemate/config.d/zz-kill-cycles.toml")
MEMORY_MIB, PAGE_MIB = 128, 2
# What a cycle's pod has: a disk of a host's driver, a GPU, a card of two functions, one of each node, others.
SETS = (("nvme0",), ("gpu0",), ("a6000",), ("gpu1", "gpu2"), ("edu0",), ("nvme0", "gpu3"))
QEMU, SHIM = "qemu", "shim"
VICTIMS = ((QEMU,), (SHIM,), (QEMU, SHIM))
LIFE_S = 240.0  # at most, until a client has heard of the end
PODS = Path("/run/casemate/pods")


@dataclass(slots=True)
class Cycle:
    """of: what was to be killed; after_s: how long after ctr's start. killed: names of what was there.

    states: the ledger's, of its devices, as what was killed left them. code, words: ctr's. wrong: what is
    not as it was before the cycle, when `casemate gc` has been run; quarantined: reasons, by device.
    """

    devices: tuple[str, ...]
    of: tuple[str, ...]
    after_s: float
    killed: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    code: int = 0
    words: str = ""
    wrong: list[str] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)


def processes() -> Iterator[tuple[int, str]]:
    """The pods': pid and which of QEMU and SHIM it is. containerd's `delete` is a shim, too."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            comm = (path / "comm").read_text().strip()
            words = (path / "cmdline").read_bytes().split(b"\0")
            running = (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue  # it ended while we looked
        if running and comm.startswith("qemu-system"):
            yield int(path.name), QEMU
        elif running and (
            comm == "casemate-shim"
            or any(word.endswith(b"containerd-shim-casemate-v2") for word in words[:6])
        ):
            yield int(path.name), SHIM


def kill(of: tuple[str, ...]) -> list[str]:
    """SIGKILL to each that is there; their names."""
    killed = []
    for pid, name in processes():
        if name in of:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(name)
    return killed


def host(ledger: Ledger) -> dict[str, Any]:
    """All that a cycle must leave as it was."""
    where = places.addresses()
    override = {
        name: (PCI / "devices" / at / "driver_override").read_text().strip() for name, at in where.items()
    }
    return {
        "drivers": {name: driver(name) for name in where},
        "overrides": override,
        "claims": [str(claim.pod) for claim in ledger.claims()],
        "bindings": [str(binding.address) for binding in ledger.bindings()],
        "processes": [name for _, name in processes()],
        "pods": sorted(path.name for path in PODS.glob("*")),
        "nodes": sorted(path.name for path in Path("/dev/vfio").rglob("*") if path.is_char_device()),
        "huge pages": (pool(0) / "free_hugepages").read_text(),
    }


def until(ledger: Ledger, before: dict[str, Any]) -> dict[str, Any]:
    """How the host is once it is as it was, or time is over. A bounded poll: nobody is told of most of it."""
    deadline = time.monotonic() + GONE_S
    while (after := host(ledger)) != before and time.monotonic() < deadline:
        time.sleep(0.5)
    return after


def run(name: str, devices: tuple[str, ...]) -> list[str]:
    where = places.addresses()
    wish = ",".join(where[device] for device in devices)
    return ctr(name, "true", wish=wish, options=("--annotation", f"dev.casemate.profile={PROFILE}"))


def cycle(ledger: Ledger, number: int, before: dict[str, Any], choice: Cycle) -> None:
    """Do it, and write down what was seen."""
    name = f"killed{number}"
    start = time.monotonic()
    client = subprocess.Popen(
        run(name, choice.devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):  # the moment has come
        client.wait(choice.after_s)
    choice.after_s = time.monotonic() - start
    choice.killed = kill(choice.of)
    names = {str(at): device for device, at in places.addresses().items()}
    choice.states = sorted(
        {device.state.value for device in ledger.devices() if names[str(device.address)] in choice.devices}
    )
    choice.words, _ = client.communicate(timeout=LIFE_S)
    choice.code = client.returncode
    subprocess.run(["ctr", "task", "delete", "--force", name], capture_output=True, check=False)
    subprocess.run(["ctr", "container", "delete", name], capture_output=True, check=False)
    collected = timed(["casemate", "gc"])
    if collected["code"]:
        choice.wrong.append(f"gc: {collected}")
    for device in ledger.devices():
        if device.state.value == "quarantined":
            choice.quarantined[names[str(device.address)]] = device.reason
            subprocess.run(["casemate", "gpu", "clear", str(device.address)], capture_output=True, check=True)
        elif device.state.value != "free":
            choice.wrong.append(f"{names[str(device.address)]} is {device.state.value}")
    after = until(ledger, before)
    choice.wrong += [
        f"{what}: {after[what]}, was {before[what]}" for what in before if after[what] != before[what]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)  # noqa: S311 (to be had again by its seed, not secret)
    done: list[Cycle] = []
    lines = (
        f"[profiles.{PROFILE}]",
        'image = "cloud"',
        f'memory = "{MEMORY_MIB}MiB"',
        'template = "off"',
        "",
    )
    SETTINGS.write_text("\n".join(lines))
    print(f"seed {arguments.seed}", flush=True)
    with Ledger(Path(load().ledger_dir)) as ledger, huge_pages(0, each=MEMORY_MIB // PAGE_MIB):
        lives = {devices: timed(run("whole", devices)) for devices in SETS}
        failed = {devices: life for devices, life in lives.items() if life["code"]}
        if failed:
            print(f"nothing was killed, and yet: {failed}", flush=True)
            return 1
        before = host(ledger)
        for number in range(arguments.cycles):
            devices = SETS[number % len(SETS)]
            moment = chance.uniform(0.0, float(str(lives[devices]["seconds"])))
            done.append(Cycle(devices, VICTIMS[number // len(SETS) % len(VICTIMS)], moment))
            cycle(ledger, number, before, done[-1])
            print(f"{number}: {done[-1]}", flush=True)
    SETTINGS.unlink()
    points = Counter(f"{' and '.join(each.killed) or 'nobody'} ({', '.join(each.states)})" for each in done)
    for point, count in points.most_common():
        print(f"{count:4} {point}")
    print(f"{sum(bool(each.wrong) for each in done)} of {len(done)} left something", flush=True)
    if SEEN.parent.is_mount():
        seen = {"cycles": [asdict(each) for each in done], "end": {"pods": casemate("ps")}}
        SEEN.write_text(json.dumps(seen))
    return int(any(each.wrong for each in done))


if __name__ == "__main__":
    sys.exit(main())
