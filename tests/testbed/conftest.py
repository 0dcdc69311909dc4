"""Fixtures of the tests in the bed. Building it takes long where it is not in the cache yet."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import product
from scripts.host import require_root
from tests.testbed import machine
from tests.testbed.__main__ import ensure
from tests.testbed.devices import TOPOLOGIES
from tests.testbed.installation import PLACE

Look = Callable[..., Any]
LIMIT_S = 1500.0


@pytest.fixture(scope="session")
def bed() -> machine.Bed:
    require_root("test-testbed")
    return ensure()


@pytest.fixture(scope="session")
def look_inside(bed: machine.Bed, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """What a program of inside/ saw in an instance of its own, with this topology's devices, if any.

    Called with the program, the topology, and the program's arguments.
    """

    @functools.cache
    def look(program: str, topology: str, *words: str) -> Any:
        share = tmp_path_factory.mktemp("share")
        python = str(product.DEFAULT_PREFIX / "bin/python3")
        command = [python, "-BEs", "-m", f"tests.testbed.inside.{program}", *words]
        devices = TOPOLOGIES[topology] if topology else None
        shape = machine.Shape(share=share, limit_s=LIMIT_S, devices=devices)
        assert machine.run(bed, ["env", "--chdir", PLACE, *command], shape) == 0
        return json.loads(Path(share, "seen.json").read_text())

    return look


@pytest.fixture(scope="module")
def seen(look_inside: Look, request: pytest.FixtureRequest) -> Any:
    """Of the program that the test's module names INSIDE, in an instance with what it names DEVICES.

    Modules that name the same share one instance.
    """
    return look_inside(request.module.INSIDE, getattr(request.module, "DEVICES", ""))
