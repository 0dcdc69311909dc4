"""What of the share a container holds on to: walked through first, let go of last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agent import libc
from agent.submounts import Submounts


def spec(root: object, *sources: object) -> dict[str, Any]:
    binds = [{"type": "bind", "source": source, "destination": "/x"} for source in sources]
    return {"root": {"path": root}, "mounts": [{"type": "proc", "source": "proc"}, *binds]}


def test_every_directory_is_walked_through_as_the_kernel_mounts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open(2): O_DIRECTORY makes the last component one that is walked through; O_PATH alone does not."""
    share = str(tmp_path)
    (tmp_path / "root").mkdir()
    (tmp_path / "file").touch()
    opened: list[tuple[str, bool]] = []
    real = os.open

    def record(path: str, flags: int, *rest: Any) -> int:
        opened.append((path, bool(flags & os.O_DIRECTORY)))
        return real(path, flags, *rest)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", record)
        Submounts(spec(f"{share}/root", f"{share}/file", f"{share}/no", 7, f"{share}/\0", "/etc"), share)
    assert opened == [(f"{share}/{name}", True) for name in ("root", "file", "no", "\0")]
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_what_is_mounted_is_unmounted_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(os.path, "ismount", lambda path: path.endswith("/mounted"))
    monkeypatch.setattr(os, "statvfs", lambda path: done.append(f"asked {path}"))
    monkeypatch.setattr(libc, "umount", lambda path: done.append(f"unmounted {path}"))
    submounts = Submounts(spec("/share/plain", "/share/mounted", "/other/mounted"), "/share")
    submounts.release()
    submounts.release()
    assert done == ["asked /share/mounted", "unmounted /share/mounted"]


def test_before_there_is_a_share_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's rehearsal runs on files of its own."""
    monkeypatch.setattr(libc, "umount", pytest.fail)
    Submounts(spec("/"), "").release()
