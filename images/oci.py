"""OCI images for the demo and the tests, made of Debian packages: archives for `ctr image import`.

No registry is ever asked. The archive follows the OCI image layout 1.0 and names itself for
containerd, and for Docker (`docker load`, which reads manifest.json); must not know them otherwise.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from images.image import sha256_of
from images.packages import Form, Request, fetch, source_date_epoch

DEMO = "localhost/casemate/demo:latest"
DEMO_PACKAGES = ("bash", "coreutils", "findutils", "iproute2", "procps", "python3")

_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_NAME = "io.containerd.image.name"
_TAG = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class OciImage:
    """What the image's config says. architecture is a claim: the tests make a false one."""

    reference: str
    command: tuple[str, ...] = ("bash",)
    entrypoint: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": _SEARCH_PATH, "LANG": "C.UTF-8"})
    working_directory: str = "/"
    user: str = ""
    architecture: str = "amd64"


def write_demo(target: Path, *, suite: str = "trixie", mirror: str = "", cache: Path | None = None) -> str:
    """Writes the demo's archive. Returns the manifest's digest."""
    fetched = fetch(Request(DEMO_PACKAGES, Form.INSTALLED, suite=suite, mirror=mirror), cache)
    return write_archive(OciImage(DEMO), fetched.path, target)


def write_archive(image: OciImage, layer: Path, target: Path) -> str:
    """Writes an OCI archive with one layer, an uncompressed tar archive. Returns the manifest's digest.

    The same input gives the same bytes. target appears when it is whole.
    """
    layer_digest = sha256_of(layer)
    config = _encode(_config(image, layer_digest))
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor(_CONFIG, _digest(config), len(config)),
            "layers": [_descriptor(_LAYER, layer_digest, layer.stat().st_size)],
        }
    )
    described = _descriptor(_MANIFEST, _digest(manifest), len(manifest)) | {
        "platform": {"architecture": image.architecture, "os": "linux"},
        "annotations": {_NAME: image.reference, _TAG: image.reference.rpartition(":")[2]},
    }
    index = _encode({"schemaVersion": 2, "mediaType": _INDEX, "manifests": [described]})
    for_docker = {
        "Config": f"blobs/sha256/{_digest(config)}",
        "RepoTags": [image.reference],
        "Layers": [f"blobs/sha256/{layer_digest}"],
    }
    temporary = target.with_name(f".{target.name}.part")
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            _add(archive, "oci-layout", _encode({"imageLayoutVersion": "1.0.0"}))
            _add(archive, "index.json", index)
            _add(archive, "manifest.json", _encode([for_docker]))
            for blob in (manifest, config):
                _add(archive, f"blobs/sha256/{_digest(blob)}", blob)
            with layer.open("rb") as file:
                archive.addfile(_member(f"blobs/sha256/{layer_digest}", layer.stat().st_size), file)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return f"sha256:{_digest(manifest)}"


def _config(image: OciImage, layer_digest: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(source_date_epoch(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    config: dict[str, Any] = {
        "Env": [f"{name}={value}" for name, value in image.environment.items()],
        "Cmd": list(image.command),
        "WorkingDir": image.working_directory,
    }
    if image.entrypoint:
        config["Entrypoint"] = list(image.entrypoint)
    if image.user:
        config["User"] = image.user
    return {
        "created": created,
        "architecture": image.architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        "history": [{"created": created, "created_by": "casemate"}],
    }


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}


def _encode(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o644, source_date_epoch()
    return member


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    archive.addfile(_member(name, len(content)), io.BytesIO(content))
