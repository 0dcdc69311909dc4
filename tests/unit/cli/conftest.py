"""Run directories as shims leave them: real files, real journals, real processes as shims."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from config import load
from shim import system
from shim.paths import PodPaths

ROOT = Path(__file__).parents[3]


Casemate = Callable[..., Result]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with run/ and etc/; nothing of this machine's casemate is looked at."""
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CASEMATE_CONFIG_DIR", str(tmp_path / "etc"))
    monkeypatch.setenv("CASEMATE_IMAGE_DIR", str(tmp_path / "images"))
    monkeypatch.setenv("CASEMATE_TEMPLATE_DIR", str(tmp_path / "templates"))
    monkeypatch.setenv("CASEMATE_LEDGER_DIR", str(tmp_path / "ledger"))
    monkeypatch.delenv("CONTAINERD_ADDRESS", raising=False)
    monkeypatch.setattr(load, "unreported", [])
    (tmp_path / "etc").mkdir()
    return tmp_path


@pytest.fixture
def casemate(host: Path) -> Casemate:
    """Runs the command in this process; anything but an exit code is a bug and raised."""

    def run(*words: str) -> Result:
        result = CliRunner().invoke(app, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


class Shim:
    """A process that does nothing but live, as the shim that wrote a state.json."""

    def __init__(self) -> None:
        code = "import sys; print(flush=True); sys.stdin.read()"
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.pid = self.process.pid
        self.start_time = system.start_time(self.pid)

    def kill(self) -> None:
        """Dead, and not reaped: a zombie until end()."""
        self.process.kill()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def new_shim() -> Iterator[Callable[[], Shim]]:
    shims: list[Shim] = []

    def new() -> Shim:
        shims.append(Shim())
        return shims[-1]

    yield new
    for shim in shims:
        shim.end()


class Host:
    """Makes pods on the test's host."""

    def pod(
        self, namespace: str, pod_id: str, shim: Shim | None = None, *, ended: bool = False, **changes: Any
    ) -> Path:
        """A pod's directory with its state.json; without a shim, of one that died long ago."""
        paths = PodPaths(namespace, pod_id)
        directory = paths.ended if ended else paths.directory
        directory.mkdir(parents=True)
        record = {
            "namespace": namespace,
            "id": pod_id,
            "key": paths.key,
            "pid": shim.pid if shim else 1,
            "start_time": shim.start_time if shim else 1 << 60,
            "state": "ended" if ended else "running",
            "accel": "tcg",
            "accel_reason": "no /dev/kvm",
            "image": "default",
            "image_digest": "sha256:" + "0" * 64,
            "profile": "small",
            "vcpus": 1,
            "memory_bytes": 128 << 20,
            "qemu_pid": 10,
            "virtiofsd_pid": 11,
            "created_at": 1_700_000_000.0,
            "source": "boot",
            "transport": "serial",
            "containers": [{"id": pod_id, "state": "running", "pid": 12, "exit_status": 0}],
            "error": None,
        }
        (directory / "state.json").write_text(json.dumps(record | changes))
        return directory


@pytest.fixture
def pods(host: Path) -> Host:
    return Host()


def spawn(*words: str, **options: Any) -> "subprocess.Popen[bytes]":
    """The command as a process of its own, as a person starts it."""
    return subprocess.Popen([sys.executable, "-m", "cli.main", *words], cwd=ROOT, **options)
