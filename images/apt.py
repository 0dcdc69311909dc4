"""The machine's own Debian mirror, read from its apt sources in both of their formats.

Image builds download from the mirror that the machine's owner chose; no host name is ever written
into casemate. Must not know what is downloaded.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import NotFound

ETC = Path("/etc/apt")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_DEBIAN_SUITES = frozenset(
    ["oldstable", "stable", "testing", "unstable", "bullseye", "bookworm", "trixie", "forky", "sid"]
)
_ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<rest>\S.*)")


@dataclass(frozen=True, slots=True)
class Source:
    """One (address, suite) that apt knows."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


def read_sources(etc: Path = ETC) -> list[Source]:
    """Every enabled binary source of the machine, in apt's order."""
    found: list[Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".list":
            found += _one_line_format(text)
        elif path.suffix == ".sources":
            found += _deb822_format(text)
    return found


def source_lines(suite: str, sources: Iterable[Source], components: Sequence[str] = ("main",)) -> list[str]:
    """sources.list lines for a Debian suite, from the mirrors by which the machine gets its own.

    The suite itself, and its updates and security fixes where the machine uses those of its own suite.
    components: of the archive, whatever the machine itself uses of it.
    """
    known = list(sources)
    main = _best(s for s in known if s.suite in _DEBIAN_SUITES)
    if main is None:
        raise NotFound(
            "no Debian mirror in the machine's apt sources",
            f"looked for a suite of Debian in {ETC}/sources.list and {ETC}/sources.list.d",
            hint="add one, or name it with --mirror",
        )
    lines = [_line(main, suite, components)]
    if suite in ("sid", "unstable"):
        return lines
    for kind in ("updates", "security"):
        extra = _best(
            s for s in known if s.suite.removesuffix(f"-{kind}") in _DEBIAN_SUITES and s.suite.endswith(kind)
        )
        if extra is not None:
            lines.append(_line(extra, f"{suite}-{kind}", components))
    return lines


def mirror_lines(suite: str, mirror: str, components: Sequence[str] = ("main",)) -> list[str]:
    """The same for a mirror that was named: it is not asked for updates and security fixes."""
    return [_line(Source(mirror, suite, ("main",)), suite, components)]


def _line(source: Source, suite: str, components: Sequence[str]) -> str:
    return f"deb [signed-by={KEYRING}] {source.uri} {suite} {' '.join(components)}"


def _best(candidates: Iterable[Source]) -> Source | None:
    """The likeliest to be Debian's own archive: third parties use its suite names too."""

    def rank(source: Source) -> tuple[bool, bool, bool]:
        return (
            "main" in source.components,
            "debian-archive" in source.signed_by or not source.signed_by,
            re.search(r"/debian(-security)?/?$", source.uri) is not None,
        )

    return max((c for c in candidates if "main" in c.components), key=rank, default=None)


def _one_line_format(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = _ONE_LINE.fullmatch(line.split("#")[0].strip())
        if match is None:
            continue
        options = dict(word.partition("=")[::2] for word in shlex.split(match["options"] or ""))
        uri, suite, *components = match["rest"].split()
        yield Source(uri, suite, tuple(components), options.get("signed-by", ""))


def _deb822_format(text: str) -> Iterator[Source]:
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields = _fields(paragraph.splitlines())
        if fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        if "deb" not in fields.get("types", "").split():
            continue
        signed_by = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri, suite, tuple(fields.get("components", "").split()), signed_by)


def _fields(lines: Sequence[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t"):
            if name:
                fields[name] += " " + line.strip()
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower() if colon else ""
        if name:
            fields[name] = value.strip()
    return fields
