"""What becomes of a pod, and of the template, when it is restored, or cannot be."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rpc.errors import DeadlineExceeded, FailedPrecondition, NotFound, Unavailable
from shim.trace import Trace
from shim.vm import sources
from shim.vm.blame import TemplateUnusable
from shim.vm.setting import MachineRequest, Setting
from shim.vm.template import MANIFEST, RAM, RETRY_S, STATE, TemplateStore
from tests.unit.rpc.wires import run
from tests.unit.shim.templates import flip_byte, key, make
from tests.unit.shim.test_sources import setting_of

KEY = key(1)


class Ways:
    """The two ways to a machine, as a test wants them to end; `went` says which were tried."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.store = setting.templates
        self.went: list[str] = []
        self.wanted: list[str] = []
        self.restoring: Callable[[], object] = lambda: "restored"
        self.booting: Callable[[], object] = lambda: "booted"

    async def restore(self, *_: object) -> object:
        self.went.append("restore")
        return self.restoring()

    async def boot(self, *_: object) -> object:
        self.went.append("boot")
        return self.booting()

    def obtain(self) -> Any:
        trace = Trace("default", "web", 0.0)
        return run(sources.obtain(self.setting.request, trace, self.wanted.append))


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    found = setting_of(tmp_path)
    settings = found.request.settings.replace(template_dir=str(tmp_path / "templates"))
    ways = Ways(replace(found, request=replace(found.request, settings=settings)))

    def make_setting(request: MachineRequest, _: Trace, __: AsyncExitStack) -> Setting:
        return replace(ways.setting, request=request)

    monkeypatch.setattr(sources, "make_setting", make_setting)
    monkeypatch.setattr(sources, "template_key", lambda _: KEY)
    monkeypatch.setattr(sources, "_restore", ways.restore)
    monkeypatch.setattr(sources, "_boot", ways.boot)
    yield ways
    assert [*(ways.store.root / "tmp").glob("*")] == []


def raising(error: Exception) -> Callable[[], NoReturn]:
    def raise_() -> NoReturn:
        raise error

    return raise_


def grow_old(store: TemplateStore) -> None:
    path = store.root / KEY / MANIFEST
    then = path.stat().st_mtime - RETRY_S - 5
    os.utime(path, (then, then))


def test_a_pod_is_restored_where_there_is_a_template(ways: Ways) -> None:
    make(ways.store, KEY)
    assert ways.obtain() == "restored"
    assert (ways.went, ways.wanted) == (["restore"], [])


def test_the_first_pod_of_a_shape_is_booted_and_wants_a_template(ways: Ways) -> None:
    assert ways.obtain() == "booted"
    assert (ways.went, ways.wanted) == (["boot"], [KEY])


def test_a_pod_that_must_be_booted_is(ways: Ways) -> None:
    make(ways.store, KEY)
    request = ways.setting.request
    profile = request.profile.replace(template="off")
    ways.setting = replace(ways.setting, request=replace(request, profile=profile))
    assert ways.obtain() == "booted"
    assert (ways.went, ways.wanted) == (["boot"], [])


def _cut(directory: Path) -> None:
    os.truncate(directory / RAM, 4096)


def _flip(directory: Path) -> None:
    flip_byte(directory / STATE, 100)


def _lose_state(directory: Path) -> None:
    (directory / STATE).unlink()


def _garble(directory: Path) -> None:
    (directory / MANIFEST).write_text('{"format": 0}')


@pytest.mark.parametrize("damage", [_cut, _flip, _lose_state, _garble])
def test_a_damaged_template_costs_a_boot_and_is_made_anew(
    ways: Ways, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(make(ways.store, KEY).directory)
    assert ways.obtain() == "booted"
    assert (ways.went, ways.wanted) == (["boot"], [KEY])
    assert ways.store.keys() == ()
    (line,) = caplog.messages
    assert line.startswith(f"the guest is booted, as it cannot be restored from template {KEY}: ")


def test_a_template_that_turns_out_useless_costs_a_boot_and_is_made_anew(
    ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    make(ways.store, KEY)
    grow_old(ways.store)
    ways.restoring = raising(TemplateUnusable("QEMU does not take the template's state", "its words"))
    assert ways.obtain() == "booted"
    assert (ways.went, ways.wanted) == (["restore", "boot"], [KEY])
    assert ways.store.keys() == ()
    (line,) = caplog.messages
    assert line.endswith("QEMU does not take the template's state: its words")


def test_one_that_was_useless_as_soon_as_it_was_made_is_not_made_again_at_once(
    ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    make(ways.store, KEY)
    ways.restoring = raising(TemplateUnusable("no"))
    assert ways.obtain() == "booted"
    assert ways.obtain() == "booted"
    assert (ways.went, ways.wanted) == (["restore", "boot", "boot"], [])
    assert ways.store.keys() == ()
    assert "it failed lately" in caplog.messages[-1]
    make(ways.store, KEY)  # a person did
    ways.restoring = lambda: "restored"
    assert ways.obtain() == "restored"


def late(limit_s: float) -> TemplateUnusable:
    error = DeadlineExceeded("no answer")
    return TemplateUnusable.because("the restored guest does not answer", error, limit_s)


def test_where_a_boot_is_as_slow_the_template_is_not_to_blame(
    ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    """A pod that may use little of a processor must not have the others' template thrown away."""
    make(ways.store, KEY)
    ways.restoring = raising(late(0.0))
    assert ways.obtain() == "booted"
    assert (ways.went, ways.wanted) == (["restore", "boot"], [])
    assert ways.store.keys() == (KEY,)
    assert not ways.store.failed_lately(KEY)
    assert caplog.messages[-1] == f"template {KEY} is kept: the boot was no faster than what was waited for"


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(late(60.0), id="the boot was faster"),
        pytest.param(TemplateUnusable.because("no", Unavailable("its words"), 0.0), id="it was refused"),
    ],
)
def test_what_a_boot_does_faster_or_was_refused_is_the_templates_fault(
    ways: Ways, error: TemplateUnusable
) -> None:
    make(ways.store, KEY)
    ways.restoring = raising(error)
    assert ways.obtain() == "booted"
    assert ways.store.keys() == ()
    assert ways.store.failed_lately(KEY)


def test_what_fails_a_boot_as_well_is_told_and_the_template_kept(ways: Ways) -> None:
    make(ways.store, KEY)
    ways.restoring = raising(FailedPrecondition("no virtiofsd"))
    with pytest.raises(FailedPrecondition, match="no virtiofsd"):
        ways.obtain()
    assert ways.went == ["restore"]
    assert ways.store.keys() == (KEY,)


def test_a_template_is_not_to_blame_where_nothing_works(ways: Ways) -> None:
    make(ways.store, KEY)
    ways.restoring = raising(TemplateUnusable("the restored guest does not answer"))
    ways.booting = raising(Unavailable("QEMU ended"))
    with pytest.raises(Unavailable, match="QEMU ended"):
        ways.obtain()
    assert ways.wanted == []
    assert ways.store.keys() == (KEY,)
    assert not ways.store.failed_lately(KEY)


def test_a_host_without_memory_for_a_copy_boots_and_keeps_the_template(ways: Ways) -> None:
    make(ways.store, KEY)
    ways.restoring = raising(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert ways.obtain() == "booted"
    assert ways.wanted == []
    assert ways.store.keys() == (KEY,)


def test_a_template_that_others_could_have_put_there_is_not_used_and_not_touched(
    ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    make(ways.store, KEY)
    ways.store.root.chmod(0o777)
    assert ways.obtain() == "booted"
    assert (ways.went, ways.wanted) == (["boot"], [])
    assert ways.store.keys() == (KEY,)
    assert f"others than root can write to {ways.store.root}" in caplog.messages[-1]


def test_a_template_that_was_removed_meanwhile_costs_a_boot(ways: Ways) -> None:
    make(ways.store, KEY)

    def restore() -> NoReturn:
        ways.store.remove(KEY)
        raise NotFound("gone")

    ways.restoring = restore
    assert ways.obtain() == "booted"
    assert ways.wanted == [KEY]


def test_a_template_that_was_replaced_meanwhile_is_not_removed_for_the_old_one(ways: Ways) -> None:
    make(ways.store, KEY, profile="old")

    def boot() -> str:
        make(ways.store, KEY, profile="new")
        return "booted"

    ways.restoring, ways.booting = raising(TemplateUnusable("no")), boot
    assert ways.obtain() == "booted"
    assert [template.about["profile"] for template in ways.store.list()] == ["new"]


def test_a_template_that_cannot_be_removed_does_not_cost_the_pod(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(ways.store, KEY)
    _garble(ways.store.root / KEY)

    def fail(_: TemplateStore, __: str, ___: str) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(TemplateStore, "remove", fail)
    assert ways.obtain() == "booted"
    assert "cannot be removed: [Errno 30] Read-only file system" in caplog.messages[-1]


def test_a_template_that_cannot_be_read_costs_a_boot(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    make(ways.store, KEY)
    os.utime(ways.store.root / KEY / STATE)  # it has to be verified

    def fail(fd: int, count: int, offset: int) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        assert ways.obtain() == "booted"
    assert ways.wanted == [KEY]
