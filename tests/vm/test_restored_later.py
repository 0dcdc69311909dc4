"""What has changed on the host between a template's saving and its use, or changes while clones of it run."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.instance import CHECKOUT, SYSTEM_PYTHON_PACKAGES
from shim.vm.template import RAM
from tests.vm.pods import Pods
from tests.vm.test_restore import Templates, cut_ram, flip_state, nothing, one

__all__ = ("nothing", "one")

YEAR_S = 365 * 86400
MADE_S = 180.0
LATE_S = 30.0
"""What a busy host may make of a second. A clock that is off is so by a year."""

# `casemate template build` on a host whose clock is off: what it tells the guest is all that is not as it is.
BUILD_AT_ANOTHER_TIME = """\
import sys, time, types
sys.path[1:1] = {path!r}
from shim.vm import hello
told = types.SimpleNamespace(time_ns=lambda: time.time_ns() + {offset_ns})
hello.time = told
sys.argv = ["casemate", "template", "build", "--json"]
from cli.main import app
app()
"""

CLOCKS = """\
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
class Timespec(ctypes.Structure):
    _fields_ = [('seconds', ctypes.c_long), ('nanoseconds', ctypes.c_long)]
REALTIME, ABSOLUTE = 0, 1
open('/dev/shm/now', 'w').close()
print(time.time(), os.stat('/dev/shm/now').st_mtime, flush=True)
began = time.monotonic()
time.sleep(1)
slept = time.monotonic() - began
until = time.time() + 1
whole = Timespec(int(until), int(until % 1 * 1e9))
assert libc.clock_nanosleep(REALTIME, ABSOLUTE, ctypes.byref(whole), None) == 0
print(slept, time.time() - until, time.time(), flush=True)
"""
"""Runs in the pod: what time it is, how long a second is, and when one that is named by its date ends."""


def build_at_another_time(templates: Templates, offset_s: int) -> list[str]:
    path = [str(CHECKOUT), sysconfig.get_path("purelib"), SYSTEM_PYTHON_PACKAGES]
    program = BUILD_AT_ANOTHER_TIME.format(path=path, offset_ns=offset_s * 10**9)
    done = subprocess.run(
        templates.instance.inside(str(Path(sys.executable).resolve()), "-IS", "-c", program),
        env=templates.instance.env(),
        capture_output=True,
        text=True,
        timeout=MADE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [made["key"] for made in json.loads(done.stdout)["made"]]


@pytest.mark.parametrize("offset_s", [YEAR_S, -YEAR_S], ids=["set back since", "set forward since"])
def test_a_clock_that_jumped_since_the_template_was_saved(nothing: Templates, offset_s: int) -> None:
    """The saved guest has the wrong date; its clone has the host's before anything runs in it."""
    build_at_another_time(nothing, offset_s)
    pods, name = nothing.pods, nothing.pods.ctr.new_id()
    before_s = time.time()
    with pods.start("python3", "-c", CLOCKS, name=name) as running:
        guest_s, file_s = map(float, running.read_until(b"\n", 60).split())
        said_s = time.time()
        assert pods.state(name)["source"] == "restore"
        slept_s, late_s, end_s = map(float, running.read_until(b"\n", 60).split())
        ended_s = time.time()
        assert running.finish(30).code == 0
    assert before_s - 1 < guest_s < said_s + 1
    assert abs(file_s - guest_s) < 1
    assert 1 <= slept_s < LATE_S
    assert 0 <= late_s < LATE_S
    assert said_s - 1 < end_s < ended_s + 1


def flip_ram(directory: Path) -> None:
    """One bit of the middle of what the file has."""
    with open(directory / RAM, "r+b") as ram:
        middle = ram.seek(ram.seek(0, 2) // 2, 3)  # SEEK_DATA
        byte = ram.read(1)[0]
        ram.seek(middle)
        ram.write(bytes([byte ^ 1]))


def take_away(directory: Path) -> None:
    for name in directory.iterdir():
        name.unlink()
    directory.rmdir()


LOOK = "cat /bin/* 2>/dev/null | cksum"


@pytest.mark.parametrize("damage", [cut_ram, flip_ram, flip_state, take_away])
def test_what_happens_to_a_template_is_nothing_to_its_clones(
    one: Templates, damage: Callable[[Path], None]
) -> None:
    """Two clones run; the next pod is booted, and the template that was damaged is gone."""
    pods, (key,) = one.pods, one.store.keys()
    with ExitStack() as running:
        clones = [running.enter_context(pods.detached("sleep", "1000")) for _ in range(2)]
        facts = [pods.state(name) for name in clones]
        assert {fact["source"] for fact in facts} == {"restore"}
        if facts[0]["files"] == "9p" and damage in (cut_ram, flip_ram):
            pytest.skip("RAM that is mapped is the file's (docs/architecture.md, known gaps)")
        sums = [sum_of(pods, clones[0])]
        damage(one.store.root / key)
        assert one.source() == "boot"
        assert one.store.keys() == ()
        sums += [sum_of(pods, name) for name in clones]
        assert len(set(sums)) == 1


def sum_of(pods: Pods, name: str) -> str:
    """Over more than the guest had in memory when it was saved: code of many pages runs for it."""
    return pods.exec(name, "sh", "-c", LOOK).ok().out


@pytest.mark.timeout(3 * MADE_S)
def test_another_cpu_is_another_template_and_the_first_one_stays_good(nothing: Templates) -> None:
    nothing.configure(make=True)
    assert nothing.source() == "boot"
    nothing.wait_made()
    assert nothing.source() == "restore"
    other = '[profiles.default]\ncpu_model = "qemu64"\n'
    nothing.configure(other, make=True)
    assert nothing.source() == "boot"
    # It came without the process that makes templates, as those like it were restored: the next one has it.
    assert nothing.source() == "boot"
    keys = nothing.wait_made(2)
    assert nothing.source() == "restore"
    nothing.configure()
    assert nothing.source() == "restore"
    assert set(nothing.store.keys()) == set(keys)
