"""`casemate logs POD`: the guest's console and the shim's log, of a pod that runs or has ended."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import pods
from cli.output import JsonOption, print_json, print_note
from cli.text import Cleaner, clean
from rpc.errors import NotFound
from shim.paths import PodPaths

app = typer.Typer(add_completion=False, rich_markup_mode=None)

CONSOLE, SHIM = "console.log", "shim.log"
_CHUNK = 1 << 16


class _Printer:
    """Writes bytes of several files to standard output, and says whose they are when it changes."""

    def __init__(self, names: list[str], *, raw: bool) -> None:
        self._cleaners = {name: Cleaner() for name in names}
        self._raw = raw
        self._current: str | None = None
        self._at_line_start = True

    def write(self, name: str, data: bytes, *, last: bool = False) -> None:
        if self._raw:
            if data:
                self._title(name)
                sys.stdout.flush()
                sys.stdout.buffer.write(data)
                self._at_line_start = data.endswith(b"\n")
        else:
            text = self._cleaners[name].feed(data, last=last)
            if text:
                self._title(name)
                encoding = sys.stdout.encoding or "utf-8"
                sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
                self._at_line_start = text.endswith("\n")
        sys.stdout.flush()

    def _title(self, name: str) -> None:
        if len(self._cleaners) > 1 and self._current != name:
            blank = "" if self._current is None else "\n"
            line_end = "" if self._at_line_start else "\n"
            sys.stdout.write(f"{line_end}{blank}==> {name} <==\n")
        self._current = name

    def end(self) -> None:
        for name in self._cleaners:
            self.write(name, b"", last=True)
        if not self._at_line_start and sys.stdout.isatty():
            sys.stdout.write("\n")
        sys.stdout.flush()


@app.command()
def logs(
    pod: Annotated[
        str,
        typer.Argument(
            help="A pod's id, the unique beginning of it, or NAMESPACE/ID.", autocompletion=pods.complete
        ),
    ],
    console: Annotated[bool, typer.Option("--console", help="Only the guest's console.")] = False,
    shim: Annotated[bool, typer.Option("--shim", help="Only the shim's log.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the pod ends or Ctrl-C.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="As written: a guest can then send your terminal anything.")
    ] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Print a pod's guest console and shim log, also after it ended.

    A guest writes what it likes to its console: escape sequences are left out and control
    characters shown as \\xNN, unless --raw.
    """
    found = pods.find(pod)
    names = [name for name, wanted in ((SHIM, shim), (CONSOLE, console)) if wanted] or [SHIM, CONSOLE]
    if as_json:
        if follow or raw:
            raise typer.BadParameter("--json goes with neither --follow nor --raw")
        print_json({"namespace": found.namespace, "id": found.id} | _texts(found.directory, names))
        return
    printer = _Printer(names, raw=raw)
    printed = _follow(found, names, printer) if follow and not found.ended else set()
    # Whatever has not been followed is printed as it is: a pod may have ended before we looked.
    for name in names:
        if name not in printed and _print_file(_path(found, name), printer):
            printed.add(name)
    printer.end()
    if not printed:
        raise NotFound(f"pod {found.namespace}/{found.id} has no {' and no '.join(names)}")


def _path(pod: pods.Pod, name: str) -> Path:
    """Where a log of pod is now: pods end while they are looked at."""
    ended = PodPaths.from_key(pod.key).ended / name
    return pod.directory / name if pod.directory.exists() else ended


def _follow(pod: pods.Pod, names: list[str], printer: _Printer) -> set[str]:
    """Print logs until the pod is over. Returns the names of those that there were."""
    from cli.follow import follow

    process = pods.open_shim(pod.record)
    if process is None:
        print_note(f"the shim of {pod.namespace}/{pod.id} is gone: nothing will be added")
        return set()
    seen = set()
    try:
        for path, data in follow(pod.directory, [pod.directory / name for name in names], process):
            seen.add(path.name)
            printer.write(path.name, data)
    finally:
        os.close(process)
    return seen


def _print_file(path: Path, printer: _Printer) -> bool:
    """Print what is there; returns whether there was a file."""
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                printer.write(path.name, data)
    except FileNotFoundError:
        return False
    return True


def _texts(directory: Path, names: list[str]) -> dict[str, str | None]:
    texts: dict[str, str | None] = {}
    for name in names:
        try:
            texts[name.removesuffix(".log")] = clean(
                (directory / name).read_bytes().decode(errors="backslashreplace")
            )
        except FileNotFoundError:
            texts[name.removesuffix(".log")] = None
    return texts
