"""agent/filesystems.py: which file systems the guest's kernel has."""

from pathlib import Path
from typing import Any

import pytest

from agent import filesystems
from rpc.errors import Unimplemented


def mount(kind: str, *options: str) -> dict[str, Any]:
    return {"mounts": [{"destination": "/there", "type": kind, "source": kind, "options": list(options)}]}


@pytest.fixture
def known(tmp_path: Path) -> str:
    path = tmp_path / "filesystems"
    path.write_text("nodev\tsysfs\nnodev\tdebugfs\n\text4\n")
    return str(path)


def test_what_the_kernel_lacks_is_refused_by_name(known: str) -> None:
    with pytest.raises(Unimplemented, match=r"^mount /there: type 'tracefs': the guest's kernel has no such"):
        filesystems.check(mount("tracefs"), known)


@pytest.mark.parametrize("kind", ["debugfs", "ext4", "tmpfs", "cgroup"])
def test_what_it_has_and_what_is_always_there_passes(known: str, kind: str) -> None:
    filesystems.check(mount(kind), known)


def test_a_bind_mount_is_no_file_systems_whatever_its_type(known: str) -> None:
    filesystems.check(mount("none", "rbind"), known)
    filesystems.check(mount("whatever", "bind", "ro"), known)
    filesystems.check({}, known)
