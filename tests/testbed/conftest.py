"""Fixtures of the tests in the bed. Building it takes long where it is not in the cache yet."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.host import require_root
from tests.testbed import machine
from tests.testbed.__main__ import ensure
from tests.testbed.installation import PLACE

LIMIT_S = 900.0


@pytest.fixture(scope="session")
def bed() -> machine.Bed:
    require_root("test-testbed")
    return ensure()


@pytest.fixture(scope="module")
def seen(bed: machine.Bed, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What a program saw in an instance of its own: the module that the test's module names INSIDE."""
    share = tmp_path_factory.mktemp("share")
    command = ["/usr/bin/python3", "-BEs", "-m", f"tests.testbed.inside.{request.module.INSIDE}"]
    shape = machine.Shape(share=share, limit_s=LIMIT_S)
    assert machine.run(bed, ["env", "--chdir", PLACE, *command], shape) == 0
    return json.loads(Path(share, "seen.json").read_text())
