"""The text of docs/performance.md: what was measured, on what, with which targets; numbers of bench/runs.py.

It decides no number; it only refuses to compare what did not take turns (bench/measure.py).
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Series, ratio
from bench.pod import Waterfall, is_guests
from bench.runs import Idle, Measured
from images.image import GuestImage

MIB = 1 << 20
BAR = 40

TARGETS = {
    "outside": (0.6, "s"),
    "guest_boot": (3.0, "s"),
    "delete": (0.3, "s"),
    "host_memory": (120, "MiB"),
}
"""What this version is meant to reach under TCG."""


def report(measured: Measured, image: GuestImage, versions: dict[str, str], accel: tuple[str, str]) -> str:
    return "\n".join(_lines(measured, image, versions, accel)) + "\n"


def _lines(
    measured: Measured, image: GuestImage, versions: dict[str, str], accel: tuple[str, str]
) -> Iterator[str]:
    kind, reason = accel
    rounds = len(measured.run["casemate"].seconds)
    yield "# Performance"
    yield ""
    yield "Written by `make bench`; do not edit. Absolute numbers belong to the machine below."
    yield "A ratio compares two things that took turns in one run, never numbers of two runs."
    yield ""
    if kind == "tcg":
        yield f"**The guests ran under TCG**, QEMU's emulation, because {reason}."
        yield "Whatever a guest does takes 10 to 50 times longer than it would under KVM."
    else:
        yield f"The guests ran under {kind.upper()}."
    yield ""
    yield from _machine(versions)
    yield ""
    yield f"## Against runc (seconds; medians of {rounds}, least to most in brackets)"
    yield ""
    yield "| | runc | casemate | ratio |"
    yield "|---|---|---|---|"
    for what, pair in (
        ("`ctr run --rm` of `true`", measured.run),
        ("`ctr run` of `echo` to its first byte", measured.first_byte),
        ("`ctr task exec` of `true`", measured.execute),
        ("`ctr task delete` of a task that has ended", measured.delete),
        ("`ctr task delete --force` of one that runs", measured.kill),
    ):
        yield f"| {what} | {_spread(pair['runc'])} | {_spread(pair['casemate'])} | {_ratio(pair)} |"
    yield ""
    yield from _targets(measured)
    yield ""
    yield from _waterfall(_typical(measured))
    yield ""
    yield from _idle(measured.idle)
    yield ""
    yield from _image(image)


def _machine(versions: dict[str, str]) -> Iterator[str]:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    load = Path("/proc/loadavg").read_text().split()[0]
    yield f"Machine: {len(os.sched_getaffinity(0))} CPUs ({model[1] if model else platform.machine()}),"
    yield f"Linux {platform.release()}, load at the end {load} (this run's own included)."
    yield ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _spread(series: Series) -> str:
    return f"{series.median:.3f} ({series.least:.3f} to {series.most:.3f})"


def _ratio(pair: dict[str, Series]) -> str:
    return f"{ratio(pair['casemate'], pair['runc']):.1f}"


def _targets(measured: Measured) -> Iterator[str]:
    idle = measured.idle
    reached: dict[str, tuple[str, float, str]] = {
        "outside": (
            "`ctr run` of `true` outside the guest's boot and run: shim, libvirt, QEMU's start, clean-up",
            measured.outside.median,
            _spread(measured.outside),
        ),
        "guest_boot": (
            "guest power-on to the agent's answer",
            measured.guest_boot.median,
            _spread(measured.guest_boot),
        ),
        "delete": (
            "deletion of a task that has ended",
            measured.delete["casemate"].median,
            _spread(measured.delete["casemate"]),
        ),
        "host_memory": (
            "host PSS of an idle pod beyond guest RAM touched",
            _beyond_guest_bytes(idle) / MIB,
            f"{_beyond_guest_bytes(idle) / MIB:.0f}",
        ),
    }
    yield "## Targets"
    yield ""
    yield "| | measured | target | |"
    yield "|---|---|---|---|"
    for key, (what, value, text) in reached.items():
        limit, unit = TARGETS[key]
        verdict = "reached" if value <= limit else "**missed**"
        yield f"| {what} | {text} {unit} | {limit} {unit} | {verdict} |"


def _beyond_guest_bytes(idle: Idle) -> int:
    return sum(process.pss_bytes - process.guest_ram_bytes for process in idle.processes)


def _typical(measured: Measured) -> Waterfall:
    """The pod whose run took the median time, or the one just above."""
    seconds = measured.run["casemate"].seconds
    order = sorted(range(len(seconds)), key=lambda index: seconds[index])
    return measured.waterfalls[order[len(order) // 2]]


def _waterfall(waterfall: Waterfall) -> Iterator[str]:
    yield "## One start, phase by phase"
    yield ""
    yield "The pod of the median run; milliseconds from the shim's exec. `casemate trace` draws any pod's."
    yield ""
    yield "```"
    end_s = max(span.end_s for span in waterfall.spans)
    scale = BAR / (end_s - waterfall.begin_s)
    for span in sorted(waterfall.spans, key=lambda span: (span.start_s, -span.end_s)):
        start, length = span.start_s - waterfall.begin_s, span.end_s - span.start_s
        left = min(int(start * scale), BAR - 1)
        bar = " " * left + ("▒" if is_guests(span) else "█") * max(1, round(length * scale))
        name = ("  " if span.parent else "") + span.name
        yield f"{name:<24} {start * 1000:>7.0f} {length * 1000:>7.0f}  {bar}".rstrip()
    yield "```"
    yield "Columns: phase, begin, length. █ on the host, ▒ in the guest."


def _idle(idle: Idle) -> Iterator[str]:
    yield "## An idle pod"
    yield ""
    yield f"One container that sleeps, in a guest of {idle.guest_memory_bytes // MIB} MiB. PSS in MiB"
    yield "(smaps_rollup); guest RAM is the part of it that is the guest's own memory."
    yield ""
    yield "| process | PSS | of it guest RAM |"
    yield "|---|---|---|"
    for process in idle.processes:
        yield f"| {process.name} | {process.pss_bytes / MIB:.1f} | {process.guest_ram_bytes / MIB:.1f} |"
    total = sum(process.pss_bytes for process in idle.processes)
    ram = sum(process.guest_ram_bytes for process in idle.processes)
    yield f"| all | {total / MIB:.1f} | {ram / MIB:.1f} |"
    yield ""
    used, there = idle.guest_used_bytes / MIB, idle.guest_total_bytes / MIB
    yield f"Seen from inside, the guest uses {used:.1f} of {there:.1f} MiB"
    yield "(MemTotal less MemAvailable, container and agent included)."


def _image(image: GuestImage) -> Iterator[str]:
    yield "## The guest image"
    yield ""
    yield "| file | MiB |"
    yield "|---|---|"
    files = [path for path in (image.kernel, image.initrd, image.rootfs) if path is not None]
    for path in files:
        yield f"| {path.name} | {path.stat().st_size / MIB:.1f} |"
    yield f"| all | {sum(path.stat().st_size for path in files) / MIB:.1f} |"


def program_version(argv: list[str]) -> str:
    """The first number with dots in what a program says of itself."""
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "of unknown version"
