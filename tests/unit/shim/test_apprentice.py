"""Who makes the next pod's template: a process that waits, is told once, and only where there is none."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from config.load import load
from config.settings import Profile, Settings
from shim import apprentice
from shim.apprentice import TENANT_ANNOTATION, Standby, stand_by, tenant_of
from shim.paths import PodPaths
from shim.vm.backing import Backing, Cell
from shim.vm.passthrough import Function
from shim.vm.plugging import from_json
from tests.unit.shim.guests import FACTS

RESTORED = replace(FACTS, source="restore")
SPEC: dict[str, Any] = {"annotations": {"dev.casemate.vcpus": "2", "other": "x"}}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CASEMATE_CONFIG_DIR", str(tmp_path / "etc"))
    return load()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


# -- tenants -------------------------------------------------------------------------------------------------


def test_all_pods_share_a_template_unless_tenants_are_kept_apart(settings: Settings) -> None:
    shared = settings.profiles["default"]
    apart = shared.replace(template="tenant")
    told = {TENANT_ANNOTATION: "blue"}
    assert tenant_of(shared, "k8s.io", told) == ""
    assert tenant_of(apart, "k8s.io", told) == "blue"
    assert tenant_of(apart, "default", {}) == "default"
    assert tenant_of(apart, "default", {TENANT_ANNOTATION: ""}) == "default"


# -- the word ------------------------------------------------------------------------------------------------


def order_of(reading: int) -> bytes:
    return os.read(reading, 1 << 16)


def test_the_order_says_what_to_make(settings: Settings, tmp_path: Path, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    standby = Standby(tmp_path / "hint", writing)
    profile = settings.profiles["small"].replace(vcpus=1, kernel_cmdline='a="b"')
    standby.settle(profile, "blue", FACTS, wished=True)
    order = json.loads(order_of(reading).removesuffix(apprentice.NOTHING_TO_DO))
    assert Profile(**order["profile"]) == profile
    assert order["tenant"] == "blue"
    assert order_of(reading) == b""  # closed


def test_the_order_says_for_which_devices(settings: Settings, tmp_path: Path, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    gpu = Function("0000:3b:00.0", "an H100", "gpu", 12, "vfio0", 0, 0, bar_bytes=128 << 30)
    facts = replace(FACTS, devices=(gpu,), backing=Backing(2 << 20, cells=(Cell(1, 128 << 20),)))
    Standby(tmp_path / "hint", writing).settle(settings.profiles["small"], "", facts, wished=True)
    order = json.loads(order_of(reading).removesuffix(apprentice.NOTHING_TO_DO))
    (told,), backing = from_json(order)
    assert (told.address, told.bar_bytes) == (gpu.address, gpu.bar_bytes)
    assert backing == facts.backing


def test_a_pod_that_was_restored_says_that_none_is_needed(
    settings: Settings, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    hint = tmp_path / "cache/restorable/x"
    Standby(hint, writing).settle(settings.profiles["default"], "", RESTORED, wished=False)
    assert order_of(reading) == apprentice.NOTHING_TO_DO
    assert hint.exists()
    assert hint.stat().st_mode & 0o077 == 0


def test_a_pod_that_was_booted_and_wants_none_says_so(
    settings: Settings, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    standby = Standby(tmp_path / "hint", writing)
    standby.settle(settings.profiles["default"], "", FACTS, wished=False)
    assert order_of(reading) == apprentice.NOTHING_TO_DO
    assert not (tmp_path / "hint").exists()
    standby.dismiss()  # twice does no harm
    assert order_of(reading) == b""


def test_a_wish_without_an_apprentice_lets_the_next_pod_have_one(settings: Settings, tmp_path: Path) -> None:
    hint = tmp_path / "hint"
    hint.touch()
    Standby(hint, -1).settle(settings.profiles["default"], "", FACTS, wished=True)
    assert not hint.exists()
    Standby(hint, -1).settle(settings.profiles["default"], "", FACTS, wished=True)


def test_an_apprentice_that_is_gone_costs_a_line_in_the_log(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    Standby(tmp_path / "hint", writing).make(settings.profiles["default"], "", FACTS)
    assert "the process that was to make it is gone" in caplog.text
    reading, writing = os.pipe()
    os.close(reading)
    Standby(tmp_path / "hint", writing).dismiss()


def test_a_hint_that_cannot_be_left_costs_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    Standby(tmp_path / "file" / "hint", -1).not_needed()
    assert "file/hint: " in caplog.text


# -- the one that waits --------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """What the waiting process was told to make: it writes that down instead, and leaves as it would."""
    file = tmp_path / "made"

    def make(
        settings: Settings, profile: Profile, tenant: str, most: int, devices: Any
    ) -> tuple[int, PodPaths]:
        assert most == settings.templates_kept  # pods have no more made than that
        assert devices == ((), None)
        file.write_text(json.dumps([profile.name, tenant, sorted(os.listdir("/proc/self/fd"), key=int)]))
        return 0, PodPaths("a", "b")

    monkeypatch.setattr(apprentice, "make", make)
    return lambda: list(json.loads(file.read_text())) if file.exists() else []


@pytest.fixture
def spare() -> Iterator[int]:
    """A descriptor of a number that nothing else will get."""
    with open("/dev/null") as null:
        fd = fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, 500)
    yield fd
    os.close(fd)


class Forks:
    """The children that were forked, each waited for by its own number: orphans are adopted at any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pids: list[int] = []
        self._fork = os.fork
        monkeypatch.setattr(os, "fork", self._record)

    def _record(self) -> int:
        pid = self._fork()
        if pid:
            self.pids.append(pid)
        return pid

    def ended(self) -> int:
        """The exit status of the only one."""
        (pid,) = self.pids
        self.pids.clear()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Forks:
    return Forks(monkeypatch)


def test_the_one_that_waits_makes_what_it_is_told(
    settings: Settings, forks: Forks, made: Callable[[], list[Any]], spare: int
) -> None:
    standby = stand_by(settings, "default", SPEC, spare)
    standby.make(settings.profiles["small"], "blue", FACTS)
    assert forks.ended() == 0
    name, tenant, descriptors = made()
    assert (name, tenant) == ("small", "blue")
    assert str(spare) not in descriptors  # the listener, which clients take for a shim that lives


def test_the_one_that_waits_goes_when_it_is_not_needed(
    settings: Settings, forks: Forks, made: Callable[[], list[Any]], spare: int
) -> None:
    stand_by(settings, "default", SPEC, spare).dismiss()
    assert forks.ended() == 0
    assert made() == []


def test_the_one_that_waits_goes_with_a_pod_that_dies(
    settings: Settings, forks: Forks, made: Callable[[], list[Any]], spare: int
) -> None:
    standby = stand_by(settings, "default", SPEC, spare)
    os.close(standby._words)  # as the kernel does
    assert forks.ended() == 0
    assert made() == []


def test_an_order_that_cannot_be_carried_out_is_told(
    settings: Settings,
    forks: Forks,
    spare: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError("no space for its directory")

    monkeypatch.setattr(apprentice, "make", fail)
    standby = stand_by(settings, "default", SPEC, spare)
    standby.make(settings.profiles["small"], "", FACTS)
    assert forks.ended() == 1
    assert "no space for its directory" in capfd.readouterr().err


def test_nobody_waits_where_none_are_to_be_made(settings: Settings, forks: Forks, spare: int) -> None:
    standby = stand_by(settings.replace(make_templates=False), "default", SPEC, spare)
    standby.settle(settings.profiles["default"], "", FACTS, wished=True)
    assert forks.pids == []


def test_nobody_waits_once_a_pod_like_this_one_was_restored(
    settings: Settings, forks: Forks, made: Callable[[], list[Any]], spare: int
) -> None:
    first = stand_by(settings, "default", SPEC, spare)
    first.settle(settings.profiles["default"], "", RESTORED, wished=False)
    assert forks.ended() == 0
    second = stand_by(settings, "default", SPEC, spare)
    assert forks.pids == []
    second.settle(settings.profiles["default"], "", FACTS, wished=True)  # it was removed
    third = stand_by(settings, "default", SPEC, spare)
    third.dismiss()
    assert forks.ended() == 0


def test_pods_are_alike_by_what_they_ask_of_us(settings: Settings) -> None:
    def likeness(spec: dict[str, Any] | None = SPEC, namespace: str = "default", **changes: Any) -> str:
        return apprentice._likeness(settings.replace(**changes), namespace, spec)

    assert likeness() == likeness({"annotations": {"dev.casemate.vcpus": "2", "other": "y"}, "process": {}})
    others = [
        likeness(None),
        likeness({"annotations": {"dev.casemate.vcpus": "1"}}),
        likeness({"annotations": SPEC["annotations"] | {TENANT_ANNOTATION: "blue"}}),
        likeness(namespace="k8s.io"),
        likeness(default_profile="small"),
    ]
    assert len({likeness(), *others}) == 6
    # A bundle is a client's: whatever it holds instead of annotations, the pod says what is wrong with it.
    strange: list[object] = [None, [], "x", 7]
    assert {likeness({"annotations": odd}) for odd in strange} == {likeness(None)}
    assert likeness({"annotations": {"dev.casemate.vcpus": ["2"], 3: 4}})
