"""How every command prints: JSON, tables and styled lines; plain and whole when it is piped.

rich is loaded only where there is a terminal to draw on. Everything but JSON, which escapes by
itself, is cleaned of control characters here.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from cli.text import clean, one_line

JsonOption = typer.Option("--json", help="Print JSON, for scripts.")

Part = tuple[str, str]  # text, style: "" or a style of rich's such as "bold red"


def print_json(value: Any) -> None:
    """One JSON document on standard output. ASCII only, so nothing in it moves a terminal."""
    print(json.dumps(value, indent=2, sort_keys=False))


def print_error(brief: str, details: str | None = None, hint: str | None = None) -> None:
    """An error for people, on standard error."""
    parts: list[Part] = [("error: ", "bold red"), (brief, "")]
    if details:
        parts.append(("\n  " + details.strip().replace("\n", "\n  "), "dim"))
    if hint:
        parts += [("\nhint: ", "bold"), (hint, "")]
    _print(parts, error=True)


def print_note(text: str) -> None:
    """Something worth saying that is not data: on standard error."""
    _print([(text, "dim")], error=True)


def print_line(*parts: Part | str) -> None:
    _print([(part, "") if isinstance(part, str) else part for part in parts], error=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], styles: Sequence[str] = ()) -> None:
    """Columns, padded; nothing is cut. styles are per row."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def padded(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    print_line((padded(columns), "bold"))
    for index, row in enumerate(cells):
        print_line((padded(row), styles[index] if styles else ""))


def terminal_width(default: int = 100) -> int:
    """Columns of the terminal; default where there is none."""
    import shutil

    return shutil.get_terminal_size((default, 24)).columns if sys.stdout.isatty() else default


def can_draw() -> bool:
    """Whether standard output's encoding has the block characters."""
    try:
        "█▒·→".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _print(parts: Iterable[Part], *, error: bool) -> None:
    stream = sys.stderr if error else sys.stdout
    parts = [(clean(text), style) for text, style in parts]
    if not stream.isatty():
        text = "".join(text for text, _ in parts)
        encoding = stream.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    # soft_wrap: the terminal wraps; what a person copies from it is whole.
    Console(file=stream, highlight=False).print(Text.assemble(*parts), soft_wrap=True)
