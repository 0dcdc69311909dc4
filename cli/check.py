"""`casemate check`: whether this host is fit, line by line, each with what to do about it."""

import os
from collections.abc import Iterator
from typing import Annotated

import typer

from cli.checks.result import Check, CheckContext, Level, Result, failure, ok, warning
from cli.exits import ExitCode
from cli.output import JsonOption, print_json, print_line
from config.settings import Settings
from rpc.errors import CasemateError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILURE: "bold red"}
_ADDRESS = "/run/containerd/containerd.sock"


@app.command()
def check(
    address: Annotated[
        str, typer.Option(metavar="PATH", envvar="CONTAINERD_ADDRESS", help="containerd's socket.")
    ] = _ADDRESS,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Say whether this host is fit to run pods, and how to mend what is not.

    A warning is something that pods can do without. The exit code is 1 if there is a failure.
    """
    results = []
    for result in _results(address.removeprefix("unix://")):
        results.append(result)
        if not as_json:
            _print(result)
    failures = sum(1 for result in results if result.level is Level.FAILURE)
    warnings = sum(1 for result in results if result.level is Level.WARNING)
    if as_json:
        rows = [
            {"name": result.name, "level": result.level.value, "found": result.found, "fix": result.fix}
            for result in results
        ]
        print_json({"fit": not failures, "results": rows})
    else:
        verdict = ("not fit", "bold red") if failures else ("fit", "bold green")
        print_line("this host is ", verdict, f": {failures} failures, {warnings} warnings")
    if failures:
        raise typer.Exit(ExitCode.FAILURE)


def _results(address: str) -> Iterator[Result]:
    """One after the other, so that a slow one does not hide what is known already."""
    try:
        settings = _settings()
        yield from _config_files()
    except CasemateError as error:
        yield failure("config", "; ".join(filter(None, (error.brief, error.details))), error.hint)
        settings = _packaged_settings()
    context = CheckContext(settings, address)
    for each in _checks():
        try:
            yield from each(context)
        except (OSError, ValueError) as error:
            # What cannot be looked at is not fine, and the other checks still count.
            yield failure(each.__name__.replace("_", " "), f"cannot be checked: {error}", None)


def _config_files() -> Iterator[Result]:
    """Of a valid config: who else may write it, and whether it can be cached."""
    from config import load, places

    loose = [path for path in places.config_files() if os.path.exists(path) and os.stat(path).st_mode & 0o022]
    if loose:
        yield warning(
            "config", f"others than its owner may write {', '.join(loose)}", f"chmod go-w {' '.join(loose)}"
        )
    else:
        yield ok("config", "valid")
    for problem in load.unreported:
        yield warning("config cache", problem, f"see {places.cache_dir()}")


def _settings() -> Settings:
    from config.load import load

    return load()


def _packaged_settings() -> Settings:
    """The defaults: to go on checking the host where the operator's config is at fault."""
    from config.sources import read_defaults

    return read_defaults().settings


def _checks() -> tuple[Check, ...]:
    from cli.checks import containerd, devices, host, node, programs, store

    return (
        host.root_user,
        host.acceleration,
        programs.qemu,
        programs.libvirt,
        programs.qemu_user,
        programs.virtiofsd,
        programs.firmware,
        store.images,
        store.run_directory,
        containerd.containerd,
        node.fork_server,
        host.landlock,
        host.vsock,
        host.vhost_net,
        host.tun,
        host.host_name,
        host.cgroups,
        host.memory,
        host.hugepages,
        host.dedicated_cpus,
        host.iommu,
        devices.devices,
        devices.partitions,
    )


def _print(result: Result) -> None:
    print_line((f"{result.level.value:8}", _STYLES[result.level]), f"{result.name}: {result.found}")
    if result.fix and result.level is not Level.OK:
        print_line((f"{'':8}fix: {result.fix}", "dim"))
