"""What a guest image is: a directory with a manifest and the files it lists, named by the manifest's digest.

On the shim's hot path: imports little. Must not know the store's layout above one image's directory.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpc.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound

MANIFEST = "manifest.json"
KERNEL, INITRD, ROOTFS = "vmlinux", "initrd.cpio", "rootfs.erofs"
SCHEMA = 1
PREFIX = "sha256:"
BUILD_HINT = "casemate image build"
_SHORT = 12
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
_NAME_BYTES = 128


@dataclass(frozen=True, slots=True)
class GuestImage:
    """An image in the store. name is what it was asked for by; digest is "sha256:HEX"."""

    name: str
    digest: str
    directory: Path
    kernel: Path
    initrd: Path | None
    rootfs: Path  # attached read-only as the first virtio-blk disk
    cmdline: str  # what this image needs on the kernel command line
    manifest: Mapping[str, Any]

    @property
    def hex(self) -> str:
        return self.digest.removeprefix(PREFIX)

    @property
    def short(self) -> str:
        return self.hex[:_SHORT]

    @property
    def size_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    def expected(self) -> Iterator[tuple[Path, str]]:
        """Every file of the image, and the sha256 it must have."""
        yield self.directory / MANIFEST, self.hex
        for name, entry in sorted(self.manifest["files"].items()):
            yield self.directory / name, entry["sha256"]


def load(directory: Path, name: str = "") -> GuestImage:
    """The image in a directory, unverified. Raises NotFound, DataLoss, FailedPrecondition."""
    hex_ = directory.name
    name = name or hex_[:_SHORT]
    try:
        with open(directory / MANIFEST, "rb") as file:
            manifest = json.load(file)
        if manifest["schema"] != SCHEMA:
            raise FailedPrecondition(
                f"guest image {name} has schema {manifest['schema']}, this casemate reads {SCHEMA}",
                hint=BUILD_HINT,
            )
        files = manifest["files"]
        image = GuestImage(
            name=name,
            digest=PREFIX + hex_,
            directory=directory,
            kernel=directory / KERNEL,
            initrd=directory / INITRD if INITRD in files else None,
            rootfs=directory / ROOTFS,
            cmdline=manifest["cmdline"],
            manifest=manifest,
        )
        if not {KERNEL, ROOTFS} <= set(files) <= {KERNEL, INITRD, ROOTFS}:
            raise ValueError(f"it lists {sorted(files)}")
        if not all(isinstance(entry["sha256"], str) and entry["bytes"] >= 0 for entry in files.values()):
            raise ValueError("a file has no digest or no size")
    except FileNotFoundError as error:
        raise NotFound(f"guest image {name} lacks {error.filename}", hint=BUILD_HINT) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"{directory / MANIFEST} is damaged", str(error), hint=repair_hint(hex_)) from error
    return image


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's one spelling, so that the same image always has the same digest."""
    return json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"


def check_name(name: str) -> None:
    """Raises InvalidArgument unless this can be the name of an image."""
    if not name or len(name) > _NAME_BYTES or name[0] in "._-" or not _NAME_CHARACTERS.issuperset(name):
        raise InvalidArgument(
            f"{name!r} cannot name a guest image",
            hint="lower-case letters, digits, and - . _ inside",
        )


def sha256_of(path: Path) -> str:
    from hashlib import file_digest

    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def repair_hint(hex_: str) -> str:
    return f"casemate image rm {hex_[:_SHORT]}; {BUILD_HINT}"
