"""Small files on the guest's own tmpfs: they never block, so the event loop may touch them."""

import os
from contextlib import suppress


def read(path: str, max_bytes: int = -1) -> bytes:
    with open(path, "rb") as file:
        return file.read(max_bytes)


def write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_directory(path: str) -> None:
    """Removes a directory of files, if it is there."""
    with suppress(FileNotFoundError):
        for name in os.listdir(path):
            remove(f"{path}/{name}")
        os.rmdir(path)
