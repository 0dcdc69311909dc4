"""Which acceleration a pod gets: asked of the kernel once per boot, demanded in vain is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition
from shim.vm import accel
from shim.vm.accel import Acceleration, choose, probe


def store(path: Path, kind: str, reason: str = "by a test", key: str | None = None) -> Path:
    """A cache as a pod of this boot left it."""
    path.write_text(json.dumps({"key": key or accel._cache_key(), "kind": kind, "reason": reason}))
    return path


def test_tcg_is_never_probed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def probed() -> Acceleration:
        raise AssertionError("the kernel was asked")

    monkeypatch.setattr(accel, "_probe", probed)
    assert choose("tcg").kind == "tcg"


def test_auto_takes_what_there_is(tmp_path: Path) -> None:
    for kind in ("kvm", "tcg"):
        cache = store(tmp_path / kind, kind)
        assert choose("auto", cache) == Acceleration(kind, "by a test")


def test_kvm_that_is_demanded_and_absent_is_an_error_that_says_why(tmp_path: Path) -> None:
    cache = store(tmp_path / "accel.json", "tcg", "/dev/kvm: No such file or directory")
    with pytest.raises(FailedPrecondition, match="no usable KVM") as caught:
        choose("kvm", cache)
    assert caught.value.details == "/dev/kvm: No such file or directory"
    assert caught.value.hint
    assert choose("kvm", store(tmp_path / "kvm.json", "kvm")).kind == "kvm"


def test_the_probe_says_how_it_knows() -> None:
    """Of this machine, whatever it is; the test bed's tests know which it must be."""
    found = probe()
    assert found.kind in ("kvm", "tcg")
    assert "/dev/kvm" in found.reason


def test_the_probe_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    probe()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_found_is_remembered_for_this_boot(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "accel.json"
    found = probe(cache)
    assert json.loads(cache.read_text()) == {
        "key": accel._cache_key(),
        "kind": found.kind,
        "reason": found.reason,
    }
    assert probe(cache) == found


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"key": 1, "kind": "kvm"}', "\x00"])
def test_a_cache_that_cannot_be_used_is_made_anew(tmp_path: Path, text: str) -> None:
    cache = tmp_path / "accel.json"
    cache.write_text(text)
    found = probe(cache)
    assert json.loads(cache.read_text())["kind"] == found.kind


def test_what_another_boot_found_is_not_believed(tmp_path: Path) -> None:
    cache = store(tmp_path / "accel.json", "kvm", "long ago", key="another boot 1 2 3")
    assert probe(cache).reason != "long ago"


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert probe(tmp_path / "file" / "accel.json") == probe()


def test_without_a_device_the_key_is_the_boots_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert accel._cache_key().startswith(boot)
