"""The Go program of the interop tests, as a fixture."""

from pathlib import Path

import pytest

from tests.vm.interop import peer


@pytest.fixture(scope="session")
def go_program() -> Path:
    return peer.program()
