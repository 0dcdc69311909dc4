"""`casemate ps`: the pods of this host, one line each."""

import time
from typing import Annotated

import typer

from cli import pods
from cli.output import JsonOption, print_json, print_note, print_table
from config.cpulist import ranges

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_STYLES = {pods.STALE: "red", pods.UNKNOWN: "red", "ended": "dim"}
_COLUMNS = (
    "NAMESPACE",
    "POD",
    "STATE",
    "ACCEL",
    "PROFILE",
    "VCPUS",
    "MEMORY",
    "IMAGE",
    "CONTAINERS",
    "DEVICES",
    "AGE",
)


@app.command()
def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also the pods that ended.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """List the pods of this host.

    A pod whose shim is gone without having cleaned up is "stale": `casemate gc` removes it.
    """
    found = pods.running() + (pods.ended() if everything else [])
    if as_json:
        print_json(
            [pod.record | {"key": pod.key, "state": pod.state, "shim_alive": pod.alive} for pod in found]
        )
        return
    print_table(_COLUMNS, [_row(pod) for pod in found], [_STYLES.get(pod.state, "") for pod in found])
    for pod in found:
        if pod.problem:
            print_note(f"{pod.directory}: {pod.problem}")
    left = sum(1 for pod in found if pod.state in (pods.STALE, pods.UNKNOWN))
    if left:
        print_note(f"{left} without a shim: `casemate gc` cleans up after them")


def _row(pod: pods.Pod) -> tuple[object, ...]:
    record = pod.record
    containers = record.get("containers")
    return (
        pod.namespace,
        pod.id,
        pod.state,
        record.get("accel", "?"),
        record.get("profile", "?"),
        _vcpus(record),
        size(record.get("memory_bytes")),
        record.get("image", "?"),
        "-" if pod.ended else _containers(containers) if isinstance(containers, list) else "?",
        _devices(record),
        age(time.time() - pod.created_at),
    )


def _vcpus(record: dict[str, object]) -> str:
    """How many, and which of the host's they are if these are the pod's alone."""
    count, cpus = record.get("vcpus", "?"), record.get("cpus")
    if not isinstance(cpus, list) or not cpus or not all(type(cpu) is int for cpu in cpus):
        return str(count)
    return f"{count} on {ranges(cpus)}"


def _devices(record: dict[str, object]) -> str:
    """How many of the host's, by which way of VFIO's, of which huge pages RAM is, how many have been lost."""
    devices, pages = record.get("devices"), record.get("hugepage_bytes")
    if not isinstance(devices, list) or not devices:
        return "-"
    words = [f"{len(devices)} by {record.get('device_access')}"]
    if pages:
        words.append(f"{size(pages)} pages")
    if gone := sum(1 for each in devices if isinstance(each, dict) and each.get("gone")):
        words.append(f"{gone} gone")
    return ", ".join(words)


def _containers(containers: list[dict[str, object]]) -> str:
    """How many, and in which states unless all run."""
    states = [str(container.get("state", "?")) for container in containers]
    if all(state == "running" for state in states):
        return str(len(states))
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def size(value: object) -> str:
    """Bytes in the largest binary unit that keeps them whole."""
    if not isinstance(value, int):
        return "?"
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value and value % factor == 0:
            return f"{value // factor}{unit}"
    return str(value)


def age(seconds: float) -> str:
    seconds = max(0, int(seconds))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
