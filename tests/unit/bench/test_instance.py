"""What a private containerd's supervisor tells of the processes that it starts."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.instance import Binaries, Instance, InstanceError

SUPERVISOR = """\
import json, sys
for line in sys.stdin:
    print(json.dumps({"event": "started", "pid": 7}), flush=True)
    if json.loads(line)["argv"] == ["ends"]:
        print(json.dumps({"event": "exit", "pid": 7, "status": 3}), flush=True)
"""
"""Speaks as bench/supervisor.py, where there is one pid for all, one after another."""


@pytest.fixture
def instance() -> Iterator[Instance]:
    instance = Instance(Binaries("none", "0", Path("/nowhere")))
    pipe = subprocess.PIPE
    instance._process = subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdin=pipe, stdout=pipe)
    yield instance
    instance.close()


def test_a_process_that_has_the_pid_of_one_that_ended_has_not_ended(instance: Instance) -> None:
    assert instance.spawn(["ends"]) == 7
    assert instance.wait_exit(7, 60) == 3
    assert instance.spawn(["goes on"]) == 7
    with pytest.raises(InstanceError, match="process 7 did not end"):
        instance.wait_exit(7, 0.1)
