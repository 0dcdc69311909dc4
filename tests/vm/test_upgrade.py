"""Pods that run while a newer casemate is installed: they go on with the code that they were begun with."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.instance import CHECKOUT, EXECUTABLES, launcher
from scripts.product import PACKAGES
from tests.vm import faults
from tests.vm.pods import Pods

MARK = """
import logging
logging.getLogger("casemate").warning("of the next version")
"""


@pytest.fixture
def upgraded(pods: Pods, tmp_path: Path) -> Iterator[Path]:
    """A newer version, as `make install` puts it beside the other; the launchers name it by turns."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / package, tmp_path / package, ignore=ignored)
    with open(tmp_path / "shim/creation.py", "a") as file:
        file.write(MARK)
    yield tmp_path
    install(pods, CHECKOUT)


def install(pods: Pods, code: Path) -> None:
    """Whoever starts an executable finds it whole, of one version or the other."""
    for name, module in EXECUTABLES.items():
        executable = pods.ctr.instance.base / "bin" / name
        scratch = executable.with_suffix(".new")
        scratch.write_text(launcher(code, module))
        scratch.chmod(0o755)
        scratch.rename(executable)


def is_next(pods: Pods, name: str) -> bool:
    return "of the next version" in pods.paths(name).log.read_text()


def test_a_pod_goes_on_while_another_version_is_installed_and_is_taken_away_by_it(
    pods: Pods, upgraded: Path
) -> None:
    with pods.detached("sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done") as old:
        install(pods, upgraded)
        with pods.detached("sleep", "1000") as new:
            assert (is_next(pods, old), is_next(pods, new)) == (False, True)
            for name in (old, new):
                assert pods.exec(name, "echo", "answers").ok().out == "answers\n"
                pods.ctr("task", "pause", name).ok()
                pods.ctr("task", "resume", name).ok()
                assert "memory.usage" in pods.ctr("task", "metrics", name).ok().out
        pods.kill(old, "TERM")
        pods.wait_status(old, "STOPPED")
    with pods.detached("sleep", "1000") as killed:
        install(pods, CHECKOUT)
        # What it leaves, another version's `delete` takes away.
        faults.kill_and_wait(pods.state(killed)["pid"])
