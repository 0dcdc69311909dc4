"""Fixtures of the tests in the bed. Building it takes long where it is not in the cache yet."""

import pytest

from scripts.host import require_root
from tests.testbed.__main__ import ensure
from tests.testbed.machine import Bed


@pytest.fixture(scope="session")
def bed() -> Bed:
    require_root("test-testbed")
    return ensure()
