"""`casemate gc`: takes away what pods left whose shim is gone, devices too, records of ended ones, and
templates that nothing can be restored from any more.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import ledger, pods
from cli.exits import ExitCode
from cli.output import JsonOption, print_error, print_json, print_line, print_note
from config.cpulist import ranges
from config.load import load
from config.settings import Settings
from images.store import ImageStore
from rpc.errors import CasemateError, PermissionDenied
from shim.cleanup import clean_pod
from shim.journal import Kind, read_journal
from shim.paths import run_dir
from shim.vm.template import Template, TemplateStore
from shim.vm.versions import identity

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# `start` makes the pod's directory and names its socket in the journal, the shim's process comes there later,
# and the state last: a directory without these two may be a pod that is just being started.
STARTING_S = 60.0


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be done.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Clean up after pods whose shim is gone, from their journals, and after machines of the pool.

    Pods with a shim are never touched. Devices of pods that are gone are reset and given back to the host, or
    quarantined. Of ended pods the records beyond traces_kept go, of templates those
    whose guest image or QEMU is no longer there, and the ones beyond templates_kept.
    """
    failed: list[dict[str, Any]] = []
    settings = None
    try:
        settings = load()
        kept = settings.traces_kept
    except CasemateError as error:
        # A mistake in the config must not leave dead pods lying about; only records stay.
        failed.append({"config": str(error)})
        kept = sys.maxsize
    cleaned: list[dict[str, Any]] = []
    for pod in (*pods.running(), *pods.spares()):
        if pod.alive:
            continue
        about = {"namespace": pod.namespace, "id": pod.id, "key": pod.key}
        try:
            if not _is_starting(pod):
                undone = _planned(pod) if dry_run else clean_pod(pod.paths, kept=kept)
                cleaned.append(about | {"undone": undone})
        except (CasemateError, OSError) as error:
            if isinstance(error, PermissionError):
                raise
            failed.append(about | {"error": str(error)})
    devices, cpus = _collect_devices(settings, failed, dry_run=dry_run) if settings is not None else ([], [])
    removed = _remove_old(kept, dry_run=dry_run)
    templates = _collect_templates(settings, failed, dry_run=dry_run) if settings is not None else ()
    if as_json:
        found = {
            "cleaned": cleaned,
            "devices": devices,
            "cpus": cpus,
            "removed": removed,
            "templates": templates,
            "failed": failed,
        }
        print_json({"dry_run": dry_run} | found)
    else:
        _tell(cleaned, devices, cpus, removed, templates, failed, dry_run=dry_run)
    if failed or any(each["quarantined"] for each in devices):
        raise typer.Exit(ExitCode.FAILURE)


def _tell(
    cleaned: list[dict[str, Any]],
    devices: list[dict[str, Any]],
    cpus: list[dict[str, Any]],
    removed: list[str],
    templates: tuple[str, ...],
    failed: list[dict[str, Any]],
    *,
    dry_run: bool,
) -> None:
    would = "would clean" if dry_run else "cleaned"
    for pod in cleaned:
        name = pod["key"] if pod["id"] == "?" else f"{pod['namespace']}/{pod['id']}"
        print_line((f"{would} {name}", "bold"))
        for line in pod["undone"]:
            print_line(f"  {line}")
    for each in devices:
        if each["quarantined"]:
            print_error(f"device {each['device']} is quarantined", each["quarantined"], "casemate gpu clear")
        else:
            print_line(f"{'would release' if dry_run else 'released'} device {each['device']}")
    for each in cpus:
        name = f"{each['namespace']}/{each['pod']}"
        print_line(f"{'would release' if dry_run else 'released'} CPUs {ranges(each['cpus'])} of {name}")
    if removed:
        print_line(f"{'would remove' if dry_run else 'removed'} the records of {len(removed)} ended pods")
    if templates:
        print_line(f"{'would remove' if dry_run else 'removed'} {len(templates)} templates")
    for failure in failed:
        if "config" in failure:
            print_error(failure["config"], hint="no old records were removed")
        elif "devices" in failure or "templates" in failure:
            print_error(failure.get("devices") or failure["templates"])
        else:
            print_error(f"{failure['namespace']}/{failure['id']} ({failure['key']})", failure["error"])
    if not (cleaned or devices or cpus or removed or templates or failed):
        print_note("nothing to clean up")


def _is_starting(pod: pods.Pod) -> bool:
    """Whether a process of its journal lives, or it is too young to have one there."""
    processes = [entry for entry in read_journal(pod.paths.journal) if entry.kind is Kind.PROCESS]
    if processes or pod.record:
        known = ({"pid": int(entry.value), "start_time": entry.started} for entry in processes)
        return any(map(pods.shim_alive, known))
    return time.time() - pod.directory.stat().st_mtime < STARTING_S


def _planned(pod: pods.Pod) -> list[str]:
    """What clean_pod() would undo of what is there."""
    planned: list[str] = []
    for entry in reversed(read_journal(pod.paths.journal)):
        # Of processes none lives, or the pod would not be here.
        path = Path(entry.value)
        if (entry.kind is Kind.SOCKET and path.exists()) or (entry.kind is Kind.CGROUP and path.is_dir()):
            planned.append(f"{entry.kind.value} {entry.value}")
    return [*planned, f"directory {pod.directory}"]


def _collect_devices(
    settings: Settings, failed: list[dict[str, Any]], *, dry_run: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """And CPUs. After the pods: no machine has any more then."""
    try:
        return ledger.collect(settings, dry_run=dry_run)
    except (CasemateError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        failed.append({"devices": str(error)})
        return [], []


def _collect_templates(settings: Settings, failed: list[dict[str, Any]], *, dry_run: bool) -> tuple[str, ...]:
    """The keys of templates that no pod can be restored from, or that were not used for long."""
    store = TemplateStore(Path(settings.template_dir), run_dir() / "cache" / "templates")
    images = {entry.digest for entry in ImageStore(Path(settings.image_dir)).list()}
    try:
        qemu = identity(settings.qemu)
    except FileNotFoundError:
        qemu = ""  # being replaced, or gone: in either case the next one is another

    def wanted(template: Template) -> bool:
        return template.about.get("image") in images and template.about.get("qemu") == qemu

    collect = store.doomed if dry_run else store.gc
    try:
        return collect(wanted, settings.templates_kept)
    except PermissionDenied as error:
        failed.append({"templates": str(error)})
        return ()


def _remove_old(kept: int, *, dry_run: bool) -> list[str]:
    """The records of ended pods beyond the newest `kept`."""
    old = [pod.directory for pod in pods.ended()[kept:]]
    if not dry_run:
        for directory in old:
            try:
                shutil.rmtree(directory)
            except FileNotFoundError:
                continue  # a shim that ends a pod removes old records too
    return [str(directory) for directory in old]
