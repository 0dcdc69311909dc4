"""Small OCI image archives with one layer, made by hand: what the tests need and no distribution ships.

Real images come from images/oci.py; this one is for shapes such as "another architecture".
"""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class File:
    data: bytes
    mode: int = 0o644


def write_archive(
    path: Path,
    reference: str,
    files: Mapping[str, File],
    *,
    architecture: str = "amd64",
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write an OCI image layout as a tar file, for `ctr image import`."""
    layer = _tar(files)
    packed = gzip.compress(layer, mtime=0)
    image_config = _json(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"], **(config or {})},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", image_config),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", packed)],
        }
    )
    described = {
        **_descriptor("application/vnd.oci.image.manifest.v1+json", manifest),
        "platform": {"architecture": architecture, "os": "linux"},
        "annotations": {
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference,
        },
    }
    index = _json({"schemaVersion": 2, "manifests": [described]})
    members = {"oci-layout": File(_json({"imageLayoutVersion": "1.0.0"})), "index.json": File(index)}
    for blob in packed, image_config, manifest:
        members[f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}"] = File(blob)
    path.write_bytes(_tar(members))


def _tar(files: Mapping[str, File]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        known: set[str] = set()
        for name, file in files.items():
            for parent in reversed(Path(name).parents[:-1]):
                if str(parent) not in known:
                    known.add(str(parent))
                    directory = tarfile.TarInfo(str(parent))
                    directory.type = tarfile.DIRTYPE
                    directory.mode = 0o755
                    archive.addfile(directory)
            member = tarfile.TarInfo(name)
            member.size = len(file.data)
            member.mode = file.mode
            archive.addfile(member, io.BytesIO(file.data))
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}
