"""load(): the settings in force, in well under a millisecond when no config file has changed.

What was validated once is kept in RUN/cache/settings.json together with the stat signature of
every file it came from. Anything odd about that file only means reading the config again
(sources.py, schema.py), never a wrong setting and never a failed pod.
"""

import json
import os
import stat

from config import places
from config.settings import Settings, from_mapping, to_mapping
from config.whole import write_whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CACHE_NAME = "settings.json"
CACHE_MOST_BYTES = 1 << 20
# A file changed twice within one tick of the kernel's clock can have the same stat signature
# before and after; what changed this recently is therefore not cached yet.
RACY_NS = 100_000_000

# What went wrong and matters to nobody's pod: for the caller to log once it has a log. It cannot be
# written anywhere here, since what `start` says on standard error reaches containerd as an address.
unreported: list[str] = []

# What decides how a config file is read, besides the files themselves.
_CODE = tuple(
    os.path.join(places.PACKAGE_DIR, name)
    for name in (
        "schema.py",
        "sources.py",
        "settings.py",
        "values.py",
        "annotations.py",
        "waivers.py",
        "pci.py",
    )
)
# Of the environment, before what the files say.
_DIRECTORIES = (
    ("image_dir", places.IMAGE_DIR_VARIABLE),
    ("template_dir", places.TEMPLATE_DIR_VARIABLE),
    ("ledger_dir", places.LEDGER_DIR_VARIABLE),
)


def load() -> Settings:
    """The settings in force: packaged defaults, config.toml, drop-ins, environment.

    Raises InvalidArgument naming file, line and key for what is wrong in a config file.
    """
    signature = _signature()
    settings = None if signature is None else _read_cache(signature)
    if settings is None:
        settings = _load_slowly(signature)
    for key, variable in _DIRECTORIES:
        if directory := os.environ.get(variable):
            settings = settings.replace(**{key: directory})
    return settings


def _load_slowly(signature: "list[list[Any]] | None") -> Settings:
    from config.sources import read_settings

    settings = read_settings().settings
    # Only what is certain to belong to these files is kept: unchanged since before they were read.
    if signature is not None and signature == _signature() and not _is_racy(signature):
        _write_cache(signature, settings)
    return settings


def _signature() -> "list[list[Any]] | None":
    """One row per file, or None where a file cannot be told from another by stat."""
    rows: list[list[Any]] = []
    try:
        for path in (*places.config_files(), *_CODE):
            try:
                found = os.stat(path)
            except FileNotFoundError:
                rows.append([path])
            else:
                rows.append(
                    [path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
                )
    except OSError:
        return None  # the slow path meets the same obstacle and has the words for it
    return rows


def _is_racy(signature: "list[list[Any]]") -> bool:
    import time

    newest = max((row[5] for row in signature if len(row) > 5), default=0)
    return bool(abs(time.time_ns() - newest) < RACY_NS)


def _read_cache(signature: "list[list[Any]]") -> Settings | None:
    """What is cached for exactly these files, or None.

    Only a plain file that this user owns and nobody else may write is believed.
    """
    path = os.path.join(places.cache_dir(), CACHE_NAME)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None  # not there yet, or not ours to read; a reason worth a log comes with writing it
    try:
        about = os.fstat(descriptor)
        if (
            not stat.S_ISREG(about.st_mode)
            or about.st_uid != os.geteuid()
            or about.st_mode & 0o022
            or about.st_size > CACHE_MOST_BYTES
        ):
            return None
        stored = json.loads(os.read(descriptor, CACHE_MOST_BYTES))
        if stored["signature"] != signature:
            return None
        return from_mapping(stored["settings"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # torn, of another version, or not ours: read the config and write it anew
    finally:
        os.close(descriptor)


def _write_cache(signature: "list[list[Any]]", settings: Settings) -> None:
    """Keep settings for the next start. A cache that cannot be written costs time, not a pod."""
    directory = places.cache_dir()
    text = json.dumps({"signature": signature, "settings": to_mapping(settings)})
    try:
        os.makedirs(places.run_dir(), mode=0o711, exist_ok=True)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        write_whole(os.path.join(directory, CACHE_NAME), text.encode())
    except OSError as error:
        unreported.append(f"settings not cached, so every start reads the config anew: {error}")
