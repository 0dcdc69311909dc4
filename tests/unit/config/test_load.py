"""The cached way to the settings: as right as the slow way, and never a reason for a pod to fail."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import load as module
from config import sources
from config.load import load
from config.settings import Settings, from_mapping, to_mapping
from config.sources import read_defaults
from rpc.errors import InvalidArgument
from tests.unit.config.conftest import Write

ROOT = Path(__file__).parents[3]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each time that the config files are really read."""
    counted: list[int] = []
    real = sources.read_settings

    def counting() -> sources.Loaded:
        counted.append(1)
        return real()

    monkeypatch.setattr(sources, "read_settings", counting)
    return counted


def cache_of(host: Path) -> Path:
    return host / "run/cache/settings.json"


# --- what is cached ---


def test_second_load_comes_from_the_cache_and_is_the_same(
    host: Path, settled: None, reads: list[int]
) -> None:
    first = load()
    assert load() == first
    assert len(reads) == 1
    modes = [path.stat().st_mode & 0o777 for path in (host / "run", host / "run/cache", cache_of(host))]
    assert modes == [0o711, 0o700, 0o600]


def test_nothing_heavy_is_imported_from_the_cache(host: Path, settled: None) -> None:
    load()
    code = (
        "import sys; before = set(sys.modules); from config.load import load; load();"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    said = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    imported = set(said.stdout.split())
    assert "config" in imported
    assert not imported & {
        "pydantic",
        "tomllib",
        "logging",
        "typing",
        "difflib",
        "pathlib",
        "dataclasses",
        "inspect",
    }


@pytest.mark.parametrize("name", ["config.toml", "config.d/new.toml"])
def test_a_new_file_counts_at_once(host: Path, settled: None, write: Write, name: str) -> None:
    assert load().traces_kept == 100
    write(name, "traces_kept = 7\n")
    assert load().traces_kept == 7


def test_a_changed_a_replaced_and_a_removed_file_count_at_once(
    host: Path, settled: None, write: Write
) -> None:
    path = write("config.toml", "traces_kept = 7\n")
    assert load().traces_kept == 7
    stamp = path.stat()
    path.write_text("traces_kept = 8\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as `cp -p` would: the change time tells
    assert load().traces_kept == 8
    other = write("config.d/other", "traces_kept = 9\n")
    other.rename(path)
    assert load().traces_kept == 9
    path.unlink()
    assert load().traces_kept == 100


def test_a_file_changed_this_very_moment_is_not_cached(host: Path, write: Write, reads: list[int]) -> None:
    write("config.toml", "traces_kept = 7\n")
    assert load().traces_kept == 7
    assert not cache_of(host).exists()
    assert load().traces_kept == 7
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_cached(
    host: Path, settled: None, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("config.toml", "traces_kept = 7\n")
    real = sources.read_settings

    def read_then_change() -> sources.Loaded:
        loaded = real()
        path.write_text("traces_kept = 88\n")
        return loaded

    monkeypatch.setattr(sources, "read_settings", read_then_change)
    assert load().traces_kept == 7
    assert not cache_of(host).exists()


def test_environment_replaces_the_image_directory_cached_or_not(
    host: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASEMATE_IMAGE_DIR", "/elsewhere")
    assert load().image_dir == "/elsewhere"
    assert load().image_dir == "/elsewhere"
    monkeypatch.delenv("CASEMATE_IMAGE_DIR")
    assert load().image_dir == "/var/lib/casemate/images"


def test_a_mistake_in_the_config_is_raised_each_time(host: Path, settled: None, write: Write) -> None:
    load()
    write("config.toml", "acel = 1\n")
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="unknown key acel"):
            load()


def test_a_config_d_that_cannot_be_listed_is_an_error_not_silence(host: Path, settled: None) -> None:
    (host / "etc/config.d").rmdir()
    (host / "etc/config.d").symlink_to("config.d")
    with pytest.raises(InvalidArgument, match=r"config\.d"):
        load()


# --- what is wrong with the cache never matters ---

WRONG = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"signature": null, "settings": {}}',
    b" " * ((1 << 20) + 1),
]


@pytest.mark.parametrize("content", WRONG, ids=lambda content: repr(content[:20]))
def test_a_corrupt_cache_is_ignored_and_rewritten(
    host: Path, settled: None, reads: list[int], content: bytes
) -> None:
    expected = load()
    cache_of(host).write_bytes(content)
    assert load() == expected
    assert load() == expected
    assert len(reads) == 2  # the corrupt one was not used, what replaced it was


def test_a_cache_cut_anywhere_is_ignored(host: Path, settled: None) -> None:
    expected = load()
    whole = cache_of(host).read_bytes()
    for length in range(0, len(whole), 37):
        cache_of(host).write_bytes(whole[:length])
        assert load() == expected


def tamper(host: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stored = json.loads(cache_of(host).read_text())
    change(stored["settings"])
    cache_of(host).write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings.pop("accel"),
        lambda settings: settings.update(new=1),
        lambda settings: settings.update(traces_kept="100"),
        lambda settings: settings.update(traces_kept=True),
        lambda settings: settings.update(profiles=[]),
        lambda settings: settings.update(timeouts=None),
        lambda settings: settings.update(allowed_annotations=3),
        lambda settings: settings.update(allowed_annotations=[3]),
        lambda settings: settings.update(vfio=None),
        lambda settings: settings["vfio"].update(waive=3),
        lambda settings: settings["vfio"].update(waive=[3]),
        lambda settings: settings["vfio"].update(partitions=[]),
        lambda settings: settings["vfio"].update(partitions={"4": [3]}),
        lambda settings: settings["vfio"].update(partitions={"4": 3}),
        lambda settings: settings["vfio"].update(more=True),
        lambda settings: settings.update(default_profile="gone"),
        lambda settings: settings["timeouts"].update(boot_s="30"),
        lambda settings: settings["profiles"]["small"].pop("vcpus"),
        lambda settings: settings["profiles"].update(other=settings["profiles"]["small"]),
    ],
)
def test_a_cache_of_another_version_is_ignored(
    host: Path, settled: None, change: Callable[[dict[str, Any]], None]
) -> None:
    expected = load()
    tamper(host, change)
    assert load() == expected


def test_a_cache_that_others_may_write_is_not_trusted(host: Path, settled: None) -> None:
    expected = load()
    tamper(host, lambda settings: settings.update(accel="tcg"))
    assert load().accel == "tcg"  # otherwise the next lines would prove nothing
    cache_of(host).chmod(0o666)
    assert load() == expected
    assert cache_of(host).stat().st_mode & 0o777 == 0o600


def test_another_users_cache_is_not_trusted(
    host: Path, settled: None, as_nobody: Callable[[Path], None]
) -> None:
    expected = load()
    tamper(host, lambda settings: settings.update(accel="tcg"))
    as_nobody(cache_of(host))
    assert load() == expected


def test_a_cache_that_is_a_link_is_not_followed(host: Path, settled: None) -> None:
    expected = load()
    tamper(host, lambda settings: settings.update(accel="tcg"))
    cache_of(host).rename(host / "elsewhere.json")
    cache_of(host).symlink_to(host / "elsewhere.json")
    assert load() == expected
    assert not cache_of(host).is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_cache_that_is_no_file_does_not_hang(
    host: Path, settled: None, make: Callable[[Path], None]
) -> None:
    cache_of(host).parent.mkdir(parents=True)
    make(cache_of(host))
    assert load() == read_defaults().settings


def test_a_cache_that_cannot_be_written_is_reported_and_nothing_else(host: Path, settled: None) -> None:
    (host / "run").write_text("in the way")
    assert load() == read_defaults().settings
    assert module.unreported == [
        f"settings not cached, so every start reads the config anew: [Errno 17] File exists: '{host}/run'"
    ]


def test_a_cache_that_cannot_be_moved_into_place_leaves_no_rest(host: Path, settled: None) -> None:
    (cache_of(host) / "in-the-way").mkdir(parents=True)
    assert load() == read_defaults().settings
    assert "Is a directory" in module.unreported[0]
    assert [path.name for path in cache_of(host).parent.iterdir()] == ["settings.json"]


def test_nothing_is_ever_printed(host: Path) -> None:
    """containerd reads what `start` prints, errors included, as the address of the shim."""
    (host / "run").write_text("in the way")
    code = "from config import load; load.RACY_NS = 0; load.load(); assert load.unreported"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert (said.stdout, said.stderr) == (b"", b"")


def test_the_cache_tells_the_config_directories_apart(
    host: Path, settled: None, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("config.toml", "traces_kept = 7\n")
    assert load().traces_kept == 7
    monkeypatch.setenv("CASEMATE_CONFIG_DIR", str(host / "nowhere"))
    assert load().traces_kept == 100


# --- the stored form ---


def test_settings_survive_json() -> None:
    settings = read_defaults().settings
    assert from_mapping(json.loads(json.dumps(to_mapping(settings)))) == settings


def test_stored_settings_hold_every_field() -> None:
    settings = read_defaults().settings
    assert set(to_mapping(settings)) == {name for name, _ in Settings.FIELDS}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([name for name, _ in Settings.FIELDS]), json_values))
def test_anything_else_raises_what_load_expects(changes: dict[str, Any]) -> None:
    stored = to_mapping(read_defaults().settings) | changes
    try:
        settings = from_mapping(stored)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    assert isinstance(settings.traces_kept, int)
    assert all(isinstance(profile.vcpus, int) for profile in settings.profiles.values())


def test_racy_window_covers_the_kernels_clock() -> None:
    """Time stamps come from the timer tick: at least 100 of them a second."""
    assert module.RACY_NS >= 1_000_000_000 // 100
