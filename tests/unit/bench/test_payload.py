"""The file that is read: in an image of its own layer, and out of the page cache."""

import json
import os
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bench import payload
from images import oci
from rpc.errors import DataLoss


def test_an_image_gets_a_layer_with_the_file(tmp_path: Path) -> None:
    layer, file, first, second = (tmp_path / name for name in ("layer.tar", "file", "1.tar", "2.tar"))
    with tarfile.open(layer, "w"):
        pass
    payload.random_file(file, 2 << 20)
    oci.write_archive(oci.OciImage("localhost/x:latest"), layer, first)
    payload.add_layer(first, file, second)
    with tarfile.open(second) as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert not list(tmp_path.glob("*.layer"))
    for name, blob in content.items():
        if name.startswith("blobs/"):
            assert sha256(blob).hexdigest() == name.rpartition("/")[2]

    def at(descriptor: dict[str, Any]) -> bytes:
        blob = content["blobs/" + descriptor["digest"].replace(":", "/")]
        assert len(blob) == descriptor["size"]
        return blob

    (described,) = json.loads(content["index.json"])["manifests"]
    manifest = json.loads(at(described))
    config = json.loads(at(manifest["config"]))
    assert config["rootfs"]["diff_ids"] == [one["digest"] for one in manifest["layers"]]
    assert len(manifest["layers"]) == 2
    (tmp_path / "added.tar").write_bytes(at(manifest["layers"][1]))
    with tarfile.open(tmp_path / "added.tar") as added:
        assert added.getnames() == [payload.NAME]
        assert added.extractfile(payload.NAME).read() == file.read_bytes()  # type: ignore[union-attr]


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    payload.random_file(tmp_path / "file", 1 << 20)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "file", "something")
    with pytest.raises(DataLoss, match=r"a\.tar is not an OCI archive"):
        payload.add_layer(tmp_path / "a.tar", tmp_path / "file", tmp_path / "b.tar")


def test_evicting_a_file_and_reading_it_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    payload.random_file(path, 4 << 20)
    if not payload.evict(path):
        pytest.skip("this file system keeps its files in the page cache, or does not say")
    path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert os.preadv(descriptor, [bytearray(4096)], 2 << 20, os.RWF_NOWAIT) == 4096
    finally:
        os.close(descriptor)
    assert payload.evict(path)


def test_memory_as_a_file_system_is_never_cold() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        payload.random_file(Path(file.name), 1 << 20)
        assert not payload.evict(Path(file.name))
