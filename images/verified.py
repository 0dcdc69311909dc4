"""Verifies an image's files against its manifest, and remembers it as long as no file changes.

On the shim's hot path: the second verification of an image is one stat per file. Must not know
how images are found.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

from images.files import make_directory, write_new
from images.image import BUILD_HINT, GuestImage, repair_hint, sha256_of
from rpc.errors import DataLoss

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Verifier:
    """memory: a directory; what it says of an image counts while the files stay as they are."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory

    def verify(self, image: GuestImage, *, full: bool = False) -> None:
        """Raises DataLoss naming the first file that is missing or not what the manifest says.

        Reads the files only if one has changed since they were last read, or the machine was booted,
        or full is set.
        """
        stamp = _stamp(image)
        if not full and self._recall(image) == stamp:
            return
        for path, expected in image.expected():
            found = sha256_of(path)
            if found != expected:
                self.forget(image)
                raise DataLoss(
                    f"{path} of guest image {image.name} is damaged",
                    f"its sha256 is {found}, expected {expected}",
                    hint=repair_hint(image.hex),
                )
        if stamp == _stamp(image):  # else something changed while it was read
            self._remember(image, stamp)

    def forget(self, image: GuestImage) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            (self._memory / image.hex).unlink()

    def _recall(self, image: GuestImage) -> str:
        try:
            return (self._memory / image.hex).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return ""  # nothing was verified yet, or could be remembered

    def _remember(self, image: GuestImage, stamp: str) -> None:
        temporary = self._memory / f".{image.hex}.{os.getpid()}"
        try:
            make_directory(self._memory, 0o700)
            write_new(temporary, stamp.encode(), 0o600)
            temporary.rename(self._memory / image.hex)
        except OSError as error:  # a full or read-only /run only costs the next verification some time
            log.warning("cannot remember that image %s is verified: %s", image.short, error)


def _stamp(image: GuestImage) -> str:
    lines = [_BOOT_ID.read_text().strip()]
    for path, expected in image.expected():
        try:
            s = os.stat(path)
        except FileNotFoundError as error:
            raise DataLoss(f"{path} of guest image {image.name} is missing", hint=BUILD_HINT) from error
        lines.append(f"{path} {s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {expected}")
    return "\n".join(lines)
