"""Reads and merges the config files, remembering which of them set each value.

Turns whatever is wrong into one InvalidArgument that names file, line, key and nearest match.
Only loaded when a config file changed (load.py), and by `casemate config`.
"""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from config import places
from config.annotations import KNOWN
from config.nearest import did_you_mean
from config.schema import known_keys, validate
from config.settings import Settings
from rpc.errors import InvalidArgument

Path = tuple[str, ...]
BASE_PROFILE = "default"


@dataclass(frozen=True, slots=True)
class Source:
    """One config file as read."""

    path: str
    text: str
    table: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, the merged tables as written, and which file set each of their values."""

    settings: Settings
    merged: dict[str, Any]
    origin: dict[Path, str]
    files: tuple[str, ...]


def read_settings() -> Loaded:
    """Read everything anew. Raises InvalidArgument for what is wrong in a config file."""
    sources = list(_read_files())
    merged: dict[str, Any] = {}
    origin: dict[Path, str] = {}
    for source in sources:
        merge(merged, source.table, origin, source.path)
    _inherit(merged, origin)
    try:
        settings = validate(merged)
    except ValidationError as error:
        raise _explained(error, sources, origin) from None
    if settings.default_profile not in settings.profiles:
        key = ("default_profile",)
        raise InvalidArgument(
            f"{_place(key, sources, origin)}: default_profile: no profile {settings.default_profile!r}",
            hint=did_you_mean(settings.default_profile, settings.profiles)
            or f"known are {', '.join(sorted(settings.profiles))}",
        )
    return Loaded(settings, merged, origin, tuple(source.path for source in sources))


def _read_files() -> Iterator[Source]:
    try:
        paths = places.config_files()
    except OSError as error:
        raise InvalidArgument(f"config: {error.filename}: {error.strerror}") from None
    for path in paths:
        try:
            with open(path, "rb") as file:
                text = file.read().decode()
            table = tomllib.loads(text)
        except FileNotFoundError:
            if path == places.DEFAULT_FILE:
                raise InvalidArgument(f"{path}: missing", hint="reinstall casemate") from None
            continue
        except OSError as error:
            raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{path}: not UTF-8 text at byte {error.start}") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InvalidArgument(f"{path}: not valid TOML: {error}") from None
        yield Source(path, text, table)


def merge(
    into: dict[str, Any], table: Mapping[str, Any], origin: dict[Path, str], path: str, at: Path = ()
) -> None:
    """Lay table over into: tables key by key, all else as a whole; note path as the origin."""
    for key, value in table.items():
        here = (*at, key)
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                _forget(origin, here)
                into[key] = {}
                origin[here] = path
            merge(into[key], value, origin, path, here)
        else:
            _forget(origin, here)
            into[key] = value
            origin[here] = path


def _forget(origin: dict[Path, str], at: Path) -> None:
    """What is replaced by another kind of value leaves no origins behind."""
    for known in [known for known in origin if known[: len(at)] == at]:
        del origin[known]


def _inherit(merged: dict[str, Any], origin: dict[Path, str]) -> None:
    """Give every profile what it lacks from profile "default"."""
    profiles = merged.get("profiles")
    if not isinstance(profiles, dict) or not isinstance(profiles.get(BASE_PROFILE), dict):
        return  # the schema says what is wrong with that
    for name, profile in profiles.items():
        if isinstance(profile, dict):
            for key, value in profiles[BASE_PROFILE].items():
                if key not in profile:
                    profile[key] = value
                    origin["profiles", name, key] = origin["profiles", BASE_PROFILE, key]


def _explained(error: ValidationError, sources: list[Source], origin: dict[Path, str]) -> InvalidArgument:
    problems = error.errors(include_url=False)
    # A typo in profile "default" is inherited by all: say it once, where it was written.
    problems.sort(key=lambda problem: problem["loc"][:2] != ("profiles", BASE_PROFILE))
    briefs: list[str] = []
    hint: str | None = None
    for problem in problems:
        path = tuple(str(part) for part in problem["loc"] if part != "[key]")
        brief = f"{_place(path, sources, origin)}: {_words(problem, path)}"
        if brief.split(": ")[0] in [known.split(": ")[0] for known in briefs]:
            continue
        briefs.append(brief)
        if problem["type"] == "extra_forbidden":
            hint = hint or did_you_mean(path[-1], known_keys(path[:-1]))
        else:
            hint = hint or _meant(problem, path)
    more = "\n".join(briefs[1:]) or None
    return InvalidArgument(briefs[0], more, hint or "every option is explained in " + places.DEFAULT_FILE)


def _words(problem: Mapping[str, Any], path: Path) -> str:
    key = ".".join(path)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case "literal_error":
            return f"{key}: {problem['input']!r} is not one of {problem['ctx']['expected']}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _meant(problem: Mapping[str, Any], path: Path) -> str | None:
    if not isinstance(problem["input"], str):
        return None
    if problem["type"] == "literal_error":
        return did_you_mean(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    return did_you_mean(problem["input"], KNOWN) if path[0] == "allowed_annotations" else None


def _place(path: Path, sources: list[Source], origin: dict[Path, str]) -> str:
    """FILE:LINE of a key, FILE where the line cannot be told."""
    for length in range(len(path), 0, -1):
        if path[:length] in origin:
            file = origin[path[:length]]
            text = next(source.text for source in sources if source.path == file)
            line = line_of(text, path[:length])
            return f"{file}:{line}" if line else file
    return os.path.join(places.config_dir(), "config.toml")


_HEADER = re.compile(r"\s*\[\[?\s*(?P<name>[^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"\s*(?P<name>(?:[A-Za-z0-9_.\s-]|\"[^\"]*\"|'[^']*')+?)\s*=")
_PART = re.compile(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)")


def line_of(text: str, path: Path) -> int | None:
    """The line where path is set, if exactly one looks like it. tomllib keeps no positions."""
    found: list[int] = []
    table: Path = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _parts(header["name"])
            if table == path:
                found.append(number)
        elif (key := _KEY.match(line)) and (*table, *_parts(key["name"])) == path:
            found.append(number)
    return found[0] if len(found) == 1 else None


def _parts(name: str) -> Path:
    return tuple("".join(groups) for groups in _PART.findall(name))
