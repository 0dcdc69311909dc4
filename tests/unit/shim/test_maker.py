"""When a template is made, and what is left when it cannot be; the machine that is saved is a stub."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpc.errors import ResourceExhausted, Unavailable
from shim.trace import Trace
from shim.vm import maker
from shim.vm.template import Template, TemplateStore
from tests.unit.rpc.wires import run
from tests.unit.shim import templates
from tests.unit.shim.templates import key

KEY = key(1)
Make = Callable[..., Template | None]


class Setting:
    def __init__(self, store: TemplateStore) -> None:
        self.templates = store


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "templates", tmp_path / "run/templates")


@pytest.fixture
def make(store: TemplateStore, monkeypatch: pytest.MonkeyPatch) -> Make:
    async def save(_: object, __: Trace, staging: Path) -> dict[str, Any]:
        templates.write(staging)
        return {"profile": "default"}

    monkeypatch.setattr(maker, "make_setting", lambda *_: Setting(store))
    monkeypatch.setattr(maker, "template_key", lambda _: KEY)
    monkeypatch.setattr(maker, "_save_booted", save)
    nothing: Any = None
    return lambda *most: run(maker.make_template(nothing, Trace("", "", 0.0), *most))


def test_one_that_is_there_is_not_made_again(make: Make, store: TemplateStore) -> None:
    made = make()
    assert made is not None
    assert (made.key, made.about["profile"]) == (KEY, "default")
    assert make() is None
    assert make(0) is None
    assert not store.failed_lately(KEY)


def test_pods_have_no_more_made_than_there_may_be(make: Make, store: TemplateStore) -> None:
    other = templates.make(store, key(2))
    with pytest.raises(ResourceExhausted, match=r"there are 1 templates \(templates_kept\) or more"):
        make(1)
    assert store.keys() == (key(2),)
    assert store.failed_lately(KEY)  # the next pod does not try
    long_ago_s = time.time() - maker.UNUSED_S - 5
    os.utime(other.directory, (long_ago_s, long_ago_s))
    assert make(1) is not None
    assert store.keys() == (KEY,)


def test_a_machine_that_cannot_be_saved_is_noted(
    make: Make, store: TemplateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> dict[str, Any]:
        raise Unavailable("QEMU did not start")

    monkeypatch.setattr(maker, "_save_booted", fail)
    with pytest.raises(Unavailable):
        make()
    assert store.failed_lately(KEY)
    assert store.keys() == ()
    assert list((store.root / "tmp").iterdir()) == []
