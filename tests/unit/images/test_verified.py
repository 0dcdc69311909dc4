"""Verification: every kind of damage is named; what was verified is remembered only while nothing changes."""

import json
import logging
import os
from pathlib import Path

import pytest

from images.image import MANIFEST, encode_manifest, load
from images.store import ImageStore
from rpc.errors import CasemateError, DataLoss, FailedPrecondition, NotFound
from tests.unit.images.fakes import add_image
from tests.unit.ticks import next_tick


def test_a_flipped_bit_is_found_and_named(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    store.verify(image)
    content = bytearray(image.rootfs.read_bytes())
    content[100] ^= 1
    next_tick()
    image.rootfs.write_bytes(content)
    with pytest.raises(DataLoss) as caught:
        store.verify(image)
    assert str(image.rootfs) in caught.value.brief
    assert "casemate image build" in str(caught.value.hint)


def test_a_truncated_file_is_found(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    os.truncate(image.kernel, 10)
    with pytest.raises(DataLoss, match=str(image.kernel)):
        store.verify(image)


def test_a_missing_file_is_found(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    image.kernel.unlink()
    with pytest.raises(DataLoss, match="missing"):
        store.verify(image)


def test_a_changed_manifest_is_found(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    manifest = dict(image.manifest) | {"cmdline": "init=/bin/sh"}
    (image.directory / MANIFEST).write_bytes(encode_manifest(manifest))
    with pytest.raises(DataLoss, match=MANIFEST):
        store.verify(store.resolve("default"))


def test_what_was_verified_is_not_read_again_unless_asked(
    store: ImageStore, scratch: Path, tmp_path: Path
) -> None:
    """The memory is made to vouch for a damaged file: only a full verification may notice."""
    image = add_image(store, scratch)
    store.verify(image)
    memory = tmp_path / "run/cache/verified" / image.hex
    before = image.kernel.stat()
    image.kernel.write_text("damage")
    after = image.kernel.stat()
    old = f"{before.st_size} {before.st_mtime_ns} {before.st_ctime_ns}"
    text = memory.read_text()
    assert old in text
    memory.write_text(text.replace(old, f"{after.st_size} {after.st_mtime_ns} {after.st_ctime_ns}"))
    store.verify(image)
    with pytest.raises(DataLoss):
        store.verify(image, full=True)
    with pytest.raises(DataLoss):
        store.verify(image)  # the memory was taken back


def test_after_a_reboot_everything_is_read_again(store: ImageStore, scratch: Path, tmp_path: Path) -> None:
    image = add_image(store, scratch)
    store.verify(image)
    memory = tmp_path / "run/cache/verified" / image.hex
    lines = memory.read_text().splitlines()
    memory.write_text("\n".join(["another-boot", *lines[1:]]))
    store.verify(image)
    assert memory.read_text().splitlines() == lines


def test_a_replaced_file_of_the_same_size_and_times_is_noticed(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    store.verify(image)
    before = image.kernel.stat()
    other = image.directory / "other"
    other.write_text("X" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(image.kernel)
    with pytest.raises(DataLoss):
        store.verify(image)


def test_a_memory_that_cannot_be_written_costs_only_time(
    scratch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("not a directory")
    store = ImageStore(tmp_path / "store", tmp_path / "run/below")
    image = add_image(store, scratch)
    with caplog.at_level(logging.WARNING):
        store.verify(image)
    assert "cannot remember" in caplog.text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"schema": 2}, FailedPrecondition),
        ({"files": {}}, DataLoss),
        ({"files": {"vmlinux": {}, "rootfs.erofs": {}}}, DataLoss),
        ({"files": {"../../etc/passwd": {"sha256": "", "bytes": 1}}}, DataLoss),
        ({"files": []}, DataLoss),
        ({"cmdline": None}, None),
    ],
)
def test_a_manifest_is_checked_when_it_is_read(
    store: ImageStore, scratch: Path, change: dict[str, object], error: type[CasemateError] | None
) -> None:
    image = add_image(store, scratch)
    (image.directory / MANIFEST).write_text(json.dumps(dict(image.manifest) | change))
    if error is None:
        load(image.directory)
        return
    with pytest.raises(error):
        load(image.directory)


@pytest.mark.parametrize("content", ["", "[]", "null", '"text"', '{"schema": 1}', "\0"])
def test_what_is_no_manifest_is_refused(store: ImageStore, scratch: Path, content: str) -> None:
    image = add_image(store, scratch)
    (image.directory / MANIFEST).write_text(content)
    with pytest.raises(DataLoss, match="damaged"):
        store.resolve("default")


def test_a_name_without_an_image_tells_how_to_get_one(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    image.directory.rename(scratch / "elsewhere")
    with pytest.raises(NotFound) as caught:
        store.resolve("default")
    assert caught.value.hint == "casemate image build"
