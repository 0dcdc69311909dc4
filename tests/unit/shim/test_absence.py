"""`delete` of a pod of which nothing is left: the right answer, without what takes time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rpc.api.task import DeleteResponse
from rpc.api.types import Timestamp
from shim import absence
from shim.paths import PodPaths

ROOT = Path(absence.__file__).parents[1]


@pytest.mark.parametrize(
    "now_ns", [0, 1_000_000_000, 1_700_000_000_000_000_000, 1_792_295_259_123_456_789, 2**62]
)
def test_the_answer_is_the_message_that_containerd_expects(now_ns: int) -> None:
    for pid in (0, 1, 4711, (1 << 22) - 1):
        expected = DeleteResponse(pid=pid, exit_status=137, exited_at=Timestamp.from_ns(now_ns))
        assert DeleteResponse.decode(absence.answer(pid, now_ns)) == expected


def test_what_is_left_is_seen_whatever_it_is(tmp_path: Path) -> None:
    paths = PodPaths("default", "web", tmp_path)
    assert absence.is_gone(paths)
    paths.directory.parent.mkdir(parents=True)
    paths.directory.symlink_to("/nowhere")
    assert not absence.is_gone(paths)
    paths.directory.unlink()
    paths.directory.mkdir()
    assert not absence.is_gone(paths)


def test_nothing_that_takes_time_is_imported(tmp_path: Path) -> None:
    """json, re, pathlib, ctypes: each of them is a third of what the interpreter itself takes to start."""
    program = (
        "import sys\n"
        f"sys.path.insert(1, {str(ROOT)!r})\n"
        "sys.argv[:] = ['shim', '-namespace', 'default', '-id', 'web', 'delete']\n"
        "try:\n"
        "    from shim.bootstrap import main\n"
        "    main()\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", program],
        env=os.environ | {"CASEMATE_RUN_DIR": str(tmp_path)},
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert DeleteResponse.decode(done.stdout).exit_status == 137
    loaded = set(done.stderr.decode().split())
    assert {"shim.absence", "shim.paths"} <= loaded
    assert not loaded & {"json", "re", "pathlib", "ctypes", "typing", "dataclasses", "shim.contract", "rpc"}
