"""Hosts of the library, each made once for tests that only look; and where tests write that write much."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.vfio.machines import MACHINES
from tests.unit.vfio.trees import Tree

Machine = Callable[[str], Tree]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    made: dict[str, Tree] = {}

    def get(name: str) -> Tree:
        if name not in made:
            made[name] = MACHINES[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory whose files need no disk: a kill leaves the same there, only a power cut loses more."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        yield Path(directory)
