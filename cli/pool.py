"""`casemate pool`: the machines that casemated keeps for pods to come, one line each."""

import time
from typing import Annotated

import typer

from cli import pods
from cli.output import JsonOption, print_json, print_note, print_table
from cli.ps import age, size
from config.load import load
from shim.paths import CLAIM

app = typer.Typer(add_completion=False, rich_markup_mode=None)

READY, MAKING, STALE = "ready", "being made", "stale"
_COLUMNS = ("ID", "STATE", "PROFILE", "TENANT", "VCPUS", "MEMORY", "FILES", "ACCEL", "AGE")
_STYLES = {STALE: "red", MAKING: "dim"}


@app.command()
def pool(as_json: Annotated[bool, JsonOption] = False) -> None:
    """List the machines that wait for pods.

    How many there are to be says `node.pool` in the configuration. Pods take those that were made for their
    kind: the same profile and settings, with or without directories of the host, from the same containerd.
    One whose process has ended without cleaning up is "stale": `casemate gc` removes it.
    """
    found = pods.spares()
    wanted = {name: count for name, count in load().node.pool.items() if count}
    if as_json:
        spares = [pod.record | {"id": pod.key, "state": _state(pod)} for pod in found]
        print_json({"wanted": wanted, "spares": spares})
        return
    print_table(_COLUMNS, [_row(pod) for pod in found], [_STYLES.get(_state(pod), "") for pod in found])
    if not wanted:
        print_note("node.pool names no profile: none is to wait")
    for name, count in wanted.items():
        ready = sum(pod.record.get("profile") == name and _state(pod) == READY for pod in found)
        if ready < count:
            print_note(
                f"{ready} of {count} of profile {name} are ready: casemated's log says why, if that lasts"
            )


def _state(pod: pods.Pod) -> str:
    if (pod.directory / CLAIM).exists() and pod.alive:
        return READY
    return STALE if pod.record and not pod.alive else MAKING


def _row(pod: pods.Pod) -> tuple[object, ...]:
    record = pod.record
    return (
        pod.key,
        _state(pod),
        record.get("profile", "?"),
        record.get("tenant") or "all",
        record.get("vcpus", "?"),
        size(record.get("memory_bytes")),
        record.get("files", "?"),
        record.get("accel", "?"),
        age(time.time() - pod.created_at),
    )
