"""A host from the library, by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.vfio.machines import MACHINES
from tests.unit.vfio.trees import Tree

Machine = Callable[[str], Tree]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return lambda name: MACHINES[name](tmp_path / name)
