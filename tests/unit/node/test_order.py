"""Which pods a machine of the pool can be of."""

import os
from pathlib import Path
from typing import Any

import pytest

from config.load import load
from config.settings import Settings
from node import claim
from node.likeness import Likeness
from node.order import Order, from_words
from shim.bootstrap import Arguments, Start
from shim.procfs import start_time
from shim.wants import wants_of
from tests.unit.shim.pods import config


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("CASEMATE_CONFIG_DIR", str(tmp_path))
    words = 'allowed_annotations = ["dev.casemate/devices"]\n[node.pool]\ndefault = 1\n'
    (tmp_path / "config.toml").write_text(words)
    return load()


def order_of(settings: Settings, **annotations: str) -> Order:
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "network")]
    document: dict[str, Any] = {"annotations": annotations, "linux": {"namespaces": namespaces}}
    return Order(settings, wants_of(document, settings, "default", "web"), {})


def test_a_pod_like_its_profile_has_one(settings: Settings) -> None:
    order = order_of(settings)
    assert order.is_pooled
    assert from_words(order.words(), {}).digest == order.digest


def test_a_pod_with_devices_has_none(settings: Settings) -> None:
    order = order_of(settings, **{"dev.casemate/devices": "kind=gpu"})
    assert order.wants.devices
    assert not order.is_pooled


def test_a_pod_that_says_only_later_what_it_wants_has_none(settings: Settings) -> None:
    """As `start` of a sandbox: there is no config.json, or one without a process."""
    arguments = Arguments(["-id", "web", "-namespace", "default", "-address", "/run/c.sock", "start"])
    alike = Likeness(os.getpid(), start_time("self"))
    for spec, pooled in ((None, False), ({"annotations": {}}, False), (config(), True)):
        order = claim.order_of(Start(arguments, "/bundle", "web", spec), settings, alike)
        assert (order is not None) is pooled
    alike.close()
