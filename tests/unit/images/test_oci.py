"""OCI archives: read back as an importer would, digest by digest."""

import io
import json
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from images.oci import OciImage, write_archive


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    path = tmp_path / "layer.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("etc/hello")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    return path


def read(archive: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """(index entry, manifest, config, all files), every digest and size checked on the way."""
    with tarfile.open(archive) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]

    def blob(descriptor: dict[str, Any]) -> bytes:
        algorithm, digest = descriptor["digest"].split(":")
        content = files[f"blobs/{algorithm}/{digest}"]
        assert sha256(content).hexdigest() == digest
        assert len(content) == descriptor["size"]
        return content

    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads(files["index.json"])["manifests"]
    manifest = json.loads(blob(entry))
    assert manifest["mediaType"] == entry["mediaType"]
    config = json.loads(blob(manifest["config"]))
    contents = [blob(described) for described in manifest["layers"]]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{sha256(c).hexdigest()}" for c in contents]
    return entry, manifest, config, files


def test_an_archive_is_what_an_importer_expects(tmp_path: Path, layer: Path) -> None:
    target = tmp_path / "image.tar"
    digest = write_archive(OciImage("localhost/casemate/x:v1", command=("sh",)), layer, target)
    entry, _, config, _ = read(target)
    assert entry["digest"] == digest
    assert entry["annotations"]["io.containerd.image.name"] == "localhost/casemate/x:v1"
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "v1"
    assert entry["platform"] == {"architecture": "amd64", "os": "linux"}
    assert config["architecture"] == "amd64"
    assert config["os"] == "linux"
    assert config["config"]["Cmd"] == ["sh"]
    assert any(word.startswith("PATH=") for word in config["config"]["Env"])


def test_the_config_says_what_was_asked_for(tmp_path: Path, layer: Path) -> None:
    image = OciImage(
        "x:y",
        command=("-c", "true"),
        entrypoint=("/bin/sh",),
        environment={"A": "b=c"},
        working_directory="/srv",
        user="1000:1000",
    )
    write_archive(image, layer, tmp_path / "image.tar")
    config = read(tmp_path / "image.tar")[2]["config"]
    assert config == {
        "Env": ["A=b=c"],
        "Cmd": ["-c", "true"],
        "Entrypoint": ["/bin/sh"],
        "WorkingDir": "/srv",
        "User": "1000:1000",
    }


def test_docker_finds_the_same_image_under_its_name(tmp_path: Path, layer: Path) -> None:
    write_archive(OciImage("localhost/casemate/x:v1"), layer, tmp_path / "image.tar")
    _, manifest, _, files = read(tmp_path / "image.tar")
    (described,) = json.loads(files["manifest.json"])
    assert described["RepoTags"] == ["localhost/casemate/x:v1"]
    blobs = [described["Config"], *described["Layers"]]
    wanted = [manifest["config"]["digest"], *(each["digest"] for each in manifest["layers"])]
    assert blobs == [f"blobs/{digest.replace(':', '/')}" for digest in wanted]


def test_another_architecture_can_be_claimed(tmp_path: Path, layer: Path) -> None:
    write_archive(OciImage("x:y", architecture="arm64"), layer, tmp_path / "image.tar")
    entry, _, config, _ = read(tmp_path / "image.tar")
    assert (entry["platform"]["architecture"], config["architecture"]) == ("arm64", "arm64")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, layer: Path) -> None:
    digests = [write_archive(OciImage("x:y"), layer, tmp_path / f"{n}.tar") for n in range(2)]
    assert digests[0] == digests[1]
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()


def test_the_build_date_is_source_date_epoch(
    tmp_path: Path, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    write_archive(OciImage("x:y"), layer, tmp_path / "image.tar")
    assert read(tmp_path / "image.tar")[2]["created"] == "1970-01-02T00:00:00Z"


def test_a_failure_leaves_no_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_archive(OciImage("x:y"), tmp_path / "missing", tmp_path / "image.tar")
    assert list(tmp_path.iterdir()) == []
