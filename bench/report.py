"""Writes what page.py says: a page of Markdown with its pictures beside it, or one HTML file with all in it.

It decides no number and no word about one.
"""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from bench.document import Document, read
from bench.page import Picture, Row, Section, Table, sections
from bench.svg import MADE_BY
from rpc.errors import NotFound

HEAD = (
    "Absolute numbers belong to the machine that they are of. A ratio compares two things that took turns in "
    "one run, never numbers of two runs. Each section begins with what measures the same."
)
WRITTEN = (
    "Written by `casemate bench report`; do not edit. `make bench` measures the machine that it runs on, "
    "`make bench-testbed` the emulated host of [testbed.md](testbed.md). Options that were tuned, and what "
    "each gives: [architecture.md](architecture.md#options-that-were-tuned)."
)
HTML = "report.html"
STYLE = """\
body { font: 15px/1.5 sans-serif; color: #1f2430; max-width: 1720px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #d5d8dd; padding: .25em .6em; text-align: left; }
td:nth-child(n+3) { font-variant-numeric: tabular-nums; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(560px, 1fr)); gap: 1em; }
.row { align-items: start; }
svg { max-width: 100%; height: auto; border: 1px solid #e3e5e8; }
"""


def write_page(documents: Sequence[Document], page: Path) -> list[Path]:
    """Writes a Markdown page, and its pictures into a directory of its name. Returns what was written."""
    pictures = page.with_suffix("")
    found = sections(documents)
    pictures.mkdir(exist_ok=True)
    for stale in pictures.rglob("*.svg"):
        if f'data-by="{MADE_BY}"' in stale.read_text(errors="replace"):
            stale.unlink()
    written = [page]
    page.write_text(markdown(found, pictures.name))
    for picture in _pictures(found):
        path = pictures / f"{picture.name}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(picture.content)
        written.append(path)
    return written


def renew(page: Path) -> list[Path]:
    """Writes a page of all the runs that are kept beside it, PAGE/MACHINE/*.json, and PAGE/report.html.

    Returns what was written. Raises NotFound where no run is kept.
    """
    directory = page.with_suffix("")
    kept = sorted(directory.glob("*/*.json"))
    if not kept:
        raise NotFound(f"there is no run in {directory}", hint="make bench")
    documents = [read(path) for path in kept]
    written = write_page(documents, page)
    written.append(directory / HTML)
    written[-1].write_text(html(documents))
    return written


def _pictures(found: Sequence[Section]) -> Iterator[Picture]:
    for section in found:
        for part in section.parts:
            if isinstance(part, Picture):
                yield part
            elif isinstance(part, Row):
                yield from part.pictures


def markdown(found: Sequence[Section], directory: str) -> str:
    """directory: where the pictures are, as seen from the page."""
    lines = ["# Performance", "", WRITTEN, "", HEAD]
    for section in found:
        lines += ["", f"{'#' * (1 + section.depth)} {section.title}"]
        for part in section.parts:
            lines.append("")
            if isinstance(part, Table):
                lines += [_line(part.head), "|" + "---|" * len(part.head), *map(_line, part.rows)]
            elif isinstance(part, Picture):
                lines.append(_link(part, directory))
            elif isinstance(part, Row):
                lines += [_line([_link(picture, directory) for picture in part.pictures])]
                lines.append("|" + "---|" * len(part.pictures))
            else:
                lines.append(part)
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _link(picture: Picture, directory: str) -> str:
    return f"![{picture.about}]({directory}/{picture.name}.svg)"


def html(documents: Sequence[Document]) -> str:
    """One page that needs no other file."""
    body = ["<h1>casemate: performance</h1>", f"<p>{_inline(HEAD)}</p>"]
    for section in sections(documents):
        level = 1 + section.depth
        body.append(f"<h{level}>{_inline(section.title)}</h{level}>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_table(part))
            elif isinstance(part, Picture):
                body.append(part.content)
            elif isinstance(part, Row):
                body.append('<div class="row">')
                body += [f"<div>{picture.content}</div>" for picture in part.pictures]
                body.append("</div>")
            else:
                body.append(f"<p>{_inline(part)}</p>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>casemate: performance</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    rows = ["<tr>" + "".join(f"<th>{_inline(cell)}</th>" for cell in table.head) + "</tr>"]
    rows += ["<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _inline(text: str) -> str:
    """Escaped, with the two marks of Markdown that cells have."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
