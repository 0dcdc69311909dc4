"""What holds for every test: its marker comes from its folder, Hypothesis is repeatable, Ctrl-C works.

Must not know what any package does; fixtures live beside the tests that use them.
"""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import recorded

TESTS = Path(__file__).parent
FOLDERS = ("unit", "vm", "testbed", "kubernetes")

# Nothing counts time: this suite runs beside emulated machines that take the processor away for a second.
SLOW = [HealthCheck.too_slow]
settings.register_profile("casemate", deadline=None, suppress_health_check=SLOW, print_blob=True)
settings.load_profile("casemate")

# A shell has its background jobs ignore Ctrl-C, and they bequeath that to every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(recorded.VARIABLE):
        config.pluginmanager.register(recorded.Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in FOLDERS:
            raise pytest.UsageError(f"{item.path}: tests live in one of tests/{{{','.join(FOLDERS)}}}")
        item.add_marker(getattr(pytest.mark, folder))
