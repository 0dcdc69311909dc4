"""A file to be read: added to an OCI archive as a layer of its own, and evicted from the host's page cache.

It knows the OCI image layout 1.0 and the kernel's page cache; who reads the file is storage.py's.
"""

import io
import json
import os
import tarfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from rpc.errors import DataLoss

NAME = "casemate-bench.bin"
_CHUNK = 1 << 20
_EVICTED_S = 0.5  # the longest seen was 8 ms


def random_file(path: Path, size_bytes: int) -> None:
    """What nothing on the way can compress or share. size_bytes: whole MiB."""
    with path.open("wb") as file:
        for _ in range(size_bytes // _CHUNK):
            file.write(os.urandom(_CHUNK))
        file.flush()
        os.fsync(file.fileno())


def add_layer(archive: Path, file: Path, target: Path) -> None:
    """Writes `archive` once more with a last layer that holds `file` as /NAME. Raises DataLoss."""
    layer = target.with_name(f"{target.name}.layer")
    with tarfile.open(layer, "w", format=tarfile.USTAR_FORMAT) as made:
        made.add(file, NAME, filter=_roots)
    digest = _digest_of(layer)
    try:
        with tarfile.open(archive) as given, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
            index = _json(given, "index.json")
            (described,) = index["manifests"]
            manifest = _json(given, _blob(described["digest"]))
            config = _json(given, _blob(manifest["config"]["digest"]))
            kind = manifest["layers"][-1]["mediaType"].removesuffix("+gzip").removesuffix("+zstd")
            config["rootfs"]["diff_ids"].append(digest)
            config.pop("history", None)  # which is optional, and has to fit the layers
            manifest["layers"].append({"mediaType": kind, "digest": digest, "size": layer.stat().st_size})
            manifest["config"] |= _store(new, config)
            described |= _store(new, manifest)
            _add(new, "index.json", json.dumps(index).encode())
            new.add(layer, _blob(digest), filter=_roots)
            for member in given:
                if member.isfile() and member.name.removeprefix("./") != "index.json":
                    new.addfile(member, given.extractfile(member))
    except (ValueError, KeyError, TypeError, tarfile.TarError) as error:
        raise DataLoss(f"{archive} is not an OCI archive with one image", details=repr(error)) from None
    finally:
        layer.unlink()


def evict(path: Path) -> bool:
    """Take a file out of the host's page cache. Whether it is out: some file systems have no other place.

    Pages that are written back and mapped by nobody are dropped (posix_fadvise(2)); a read that must not
    wait tells whether they were (preadv2(2), RWF_NOWAIT). A page that the kernel holds for a moment, for its
    own lists, stays (5 of 1000 calls, seen on a 6.18 kernel): the next call drops it, within _EVICTED_S.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        middle = os.fstat(descriptor).st_size // 2
        deadline = time.monotonic() + _EVICTED_S
        while time.monotonic() < deadline:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(descriptor, [bytearray(4096)], middle, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False  # this file system cannot say
    finally:
        os.close(descriptor)
    return False


def _roots(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def _digest_of(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _json(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file")
    return json.load(file)


def _store(archive: tarfile.TarFile, value: Any) -> dict[str, Any]:
    """Adds a blob. What a descriptor says of it."""
    content = json.dumps(value).encode()
    digest = f"sha256:{sha256(content).hexdigest()}"
    _add(archive, _blob(digest), content)
    return {"digest": digest, "size": len(content)}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))
