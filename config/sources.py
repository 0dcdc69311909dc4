"""Reads and merges the config files, remembering which of them set each value.

Turns whatever is wrong into one InvalidArgument that names file, line, key and nearest match.
Only loaded when a config file changed (load.py), and by `casemate config`.
"""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from config import places
from config.annotations import KNOWN
from config.nearest import did_you_mean
from config.schema import known_keys, validate
from config.settings import DEDICATED, Settings
from config.waivers import WAIVABLE
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
class Origin:
    """Where a value was written: in which file, under which key (a profile may inherit it)."""

    path: str
    key: Path


Origins = dict[Path, Origin]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, the merged tables as written, and where each of their values came from."""

    settings: Settings
    merged: dict[str, Any]
    origins: Origins
    sources: tuple[Source, ...]

    def place(self, key: Path) -> str:
        """FILE:LINE of a key."""
        return _place(key, self.sources, self.origins)


def read_settings() -> Loaded:
    """Read everything anew. Raises InvalidArgument for what is wrong in a config file."""
    try:
        return _combined(places.config_files())
    except OSError as error:  # config.d cannot be listed
        raise InvalidArgument(f"{error.filename}: cannot be read: {error.strerror}") from None


def read_defaults() -> Loaded:
    """The packaged defaults alone, for who must go on where an operator's file is at fault."""
    return _combined([places.DEFAULT_FILE])


def _combined(paths: Sequence[str]) -> Loaded:
    sources = tuple(_read_files(paths))
    merged: dict[str, Any] = {}
    origins: Origins = {}
    for source in sources:
        merge(merged, source.table, origins, source.path)
    _inherit(merged, origins)
    try:
        settings = validate(merged)
    except ValidationError as error:
        raise _explained(error, sources, origins) from None
    for name in settings.node.pool:
        if name not in settings.profiles:
            raise InvalidArgument(
                f"{_place(('node', 'pool', name), sources, origins)}: node.pool: no profile {name!r}",
                hint=did_you_mean(name, settings.profiles),
            )
        if settings.node.pool[name] and settings.profiles[name].has_own_cpus:
            raise InvalidArgument(
                f"{_place(('node', 'pool', name), sources, origins)}: node.pool: profile {name!r} has "
                f'cpu_policy = "{DEDICATED}", and a machine of the pool has no CPUs of its own',
                hint="leave it out of the pool: its pods are restored from a template as they start",
            )
    if settings.default_profile not in settings.profiles:
        key = ("default_profile",)
        raise InvalidArgument(
            f"{_place(key, sources, origins)}: default_profile: no profile {settings.default_profile!r}",
            hint=did_you_mean(settings.default_profile, settings.profiles)
            or f"known are {', '.join(sorted(settings.profiles))}",
        )
    return Loaded(settings, merged, origins, sources)


def _read_files(paths: Sequence[str]) -> Iterator[Source]:
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


def merge(into: dict[str, Any], table: Mapping[str, Any], origins: Origins, path: str, at: Path = ()) -> None:
    """Lay table over into: tables key by key, all else as a whole; note path as the origin."""
    for key, value in table.items():
        here = (*at, key)
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                _forget(origins, here)
                into[key] = {}
                origins[here] = Origin(path, here)
            merge(into[key], value, origins, path, here)
        else:
            _forget(origins, here)
            into[key] = value
            origins[here] = Origin(path, here)


def _forget(origins: Origins, at: Path) -> None:
    """What is replaced by another kind of value leaves no origins behind."""
    for known in [known for known in origins if known[: len(at)] == at]:
        del origins[known]


def _inherit(merged: dict[str, Any], origins: Origins) -> None:
    """Give every profile what it lacks from profile "default"; not what no profile may have."""
    profiles = merged.get("profiles")
    if not isinstance(profiles, dict) or not isinstance(profiles.get(BASE_PROFILE), dict):
        return  # the schema says what is wrong with that
    base = profiles[BASE_PROFILE]
    for name, profile in profiles.items():
        if not isinstance(profile, dict):
            continue
        for key in known_keys(("profiles", name)):
            if key in base and key not in profile:
                profile[key] = base[key]
                origins["profiles", name, key] = origins["profiles", BASE_PROFILE, key]


def _explained(error: ValidationError, sources: Sequence[Source], origins: Origins) -> InvalidArgument:
    """One error for all problems: the first in brief and hint, the others in the details."""
    found: dict[tuple[str, Path], tuple[str, str | None]] = {}
    for problem in error.errors(include_url=False):
        path = tuple(str(part) for part in problem["loc"] if part != "[key]")
        place, origin = _place(path, sources, origins), _origin(path, origins)
        if origin is not None and len(origin.key) == len(path):
            path = origin.key  # what several profiles inherit is wrong once, where it was written
        found.setdefault((place, path), (f"{place}: {_words(problem, path)}", _meant(problem, path)))
    (first, hint), *others = found.values()
    rest = "\n".join(f"{text}; {meant}" if meant else text for text, meant in others)
    return InvalidArgument(first, rest or None, hint or f"every option is explained in {places.DEFAULT_FILE}")


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
    if problem["type"] == "extra_forbidden":
        return did_you_mean(path[-1], known_keys(path[:-1]))
    if not isinstance(problem["input"], str):
        return None
    if problem["type"] == "literal_error":
        return did_you_mean(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    known = WAIVABLE if path[:2] == ("vfio", "waive") else {"allowed_annotations": KNOWN}.get(path[0])
    return None if known is None else did_you_mean(problem["input"], known)


def _origin(path: Path, origins: Origins) -> Origin | None:
    """Where path, or else the nearest table around it, was written."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return None


def _place(path: Path, sources: Sequence[Source], origins: Origins) -> str:
    """FILE:LINE of a key, FILE where the line cannot be told."""
    origin = _origin(path, origins)
    if origin is None:
        return os.path.join(places.config_dir(), "config.toml")
    line = line_of(next(source.text for source in sources if source.path == origin.path), origin.key)
    return f"{origin.path}:{line}" if line else origin.path


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
