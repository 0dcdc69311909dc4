"""A mount namespace for a test: what it mounts is seen in its thread alone, and goes with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from shim import cleanup, system


def isolated(work: Callable[[], None], flags: int = system.CLONE_NEWNS) -> None:
    """Runs it in a thread that has namespaces of its own, and raises what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            system.unshare(flags)
            if flags & system.CLONE_NEWNS:
                system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def tmpfs(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    system.mount("tmpfs", str(path), "tmpfs")
    return path


def mount_points(below: Path) -> list[str]:
    return cleanup.mount_points_below(str(below))
