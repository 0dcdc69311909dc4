"""Fixtures of the tests in the bed. Building it takes long where it is not in the cache yet."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import product
from scripts.host import require_root
from tests.testbed import machine
from tests.testbed.__main__ import ensure
from tests.testbed.devices import TOPOLOGIES
from tests.testbed.installation import PLACE

LIMIT_S = 900.0


@pytest.fixture(scope="session")
def bed() -> machine.Bed:
    require_root("test-testbed")
    return ensure()


@pytest.fixture(scope="module")
def seen(bed: machine.Bed, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What a program saw in an instance of its own: the module that the test's module names INSIDE.

    DEVICES, where the test's module has it, names the topology of the instance.
    """
    share = tmp_path_factory.mktemp("share")
    python = str(product.DEFAULT_PREFIX / "bin/python3")
    command = [python, "-BEs", "-m", f"tests.testbed.inside.{request.module.INSIDE}"]
    topology = getattr(request.module, "DEVICES", None)
    devices = TOPOLOGIES[topology] if topology else None
    shape = machine.Shape(share=share, limit_s=LIMIT_S, devices=devices)
    assert machine.run(bed, ["env", "--chdir", PLACE, *command], shape) == 0
    return json.loads(Path(share, "seen.json").read_text())
