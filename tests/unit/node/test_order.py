"""Which pods a machine of the pool can be of."""

from pathlib import Path
from typing import Any

import pytest

from config.load import load
from config.settings import Settings
from node.order import Order, from_words
from shim.wants import wants_of


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
