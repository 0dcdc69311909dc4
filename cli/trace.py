"""`casemate trace [POD]`: where every millisecond of a pod's start and end went."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import pods
from cli.output import JsonOption, can_draw, print_json, print_line, print_note, terminal_width
from cli.spans import GUEST, read_trace, spans_of, tree
from rpc.errors import NotFound

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TRACE = "trace.json"


@app.command()
def trace(
    pod: Annotated[
        str | None,
        typer.Argument(
            help="A pod's id, the unique beginning of it, or NAMESPACE/ID; the latest if none.",
            autocompletion=pods.complete,
        ),
    ] = None,
    as_json: Annotated[bool, JsonOption] = False,
    chrome: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write Chrome's trace format (ui.perfetto.dev opens it); - is stdout."
        ),
    ] = None,
) -> None:
    """Draw a pod's trace as a waterfall, running or ended.

    Time that no span covers is shown as such. Times are the host's monotonic clock; a guest's
    spans have been aligned to it.
    """
    if as_json and chrome:
        raise typer.BadParameter("--json and --chrome exclude each other")
    found = pods.find(pod) if pod else _latest()
    recorded = read_trace(found.directory / TRACE)
    spans = spans_of(recorded)
    title = f"{recorded.get('namespace', found.namespace)}/{recorded.get('id', found.id)}"
    if as_json:
        print_json(recorded)
        return
    if chrome is not None:
        from cli.chrome import chrome_trace

        text = json.dumps(chrome_trace(spans, title))
        if str(chrome) == "-":
            sys.stdout.write(text + "\n")
        else:
            chrome.write_text(text)
            print_note(f"{len(spans)} spans written to {chrome}: open it at ui.perfetto.dev")
        return
    from cli.waterfall import ASCII, BLOCKS, draw

    accel = recorded.get("accel", "?")
    slow = " (emulated: every guest span is many times what KVM needs)" if accel == "tcg" else ""
    print_line((title, "bold"), f", {accel}{slow}")
    if not spans:
        print_note("no spans yet")
        return
    glyphs = BLOCKS if can_draw() else ASCII
    for line in draw(tree(spans), width=terminal_width(120), glyphs=glyphs):
        print_line(*line)
    if dropped := recorded.get("dropped"):
        print_note(f"{dropped} more spans were not kept")
    if any(span.where == GUEST for span in spans):
        print_line((f"{glyphs.host} host  {glyphs.guest} guest  {glyphs.untraced} no span", "dim"))


def _latest() -> pods.Pod:
    """The pod that started last, of those that have a trace."""
    traced = [pod for pod in pods.running() + pods.ended() if (pod.directory / TRACE).exists()]
    if not traced:
        raise NotFound("no pod has left a trace yet", hint="start one, for instance with `make demo`")
    return max(traced, key=lambda pod: pod.created_at)
