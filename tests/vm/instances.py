"""The containerds of a session, each started when it is first asked for.

Must not know what is run in them.
"""

from pathlib import Path

import pytest

from bench.instance import Instance
from tests.vm import builds
from tests.vm.pods import prepare


class Instances:
    """demo: an image's archive. store: of guest images."""

    def __init__(self, demo: Path, store: Path) -> None:
        self.demo = demo
        self.store = store
        self.running: dict[str, Instance] = {}

    def start(self, name: str) -> Instance:
        """Raises NotHereError with the reason why a test may be skipped."""
        return Instance(builds.provide(name)).__enter__()

    def get(self, name: str) -> Instance:
        if name not in self.running:
            try:
                instance = self.start(name)
            except builds.NotHereError as reason:
                pytest.skip(str(reason))
            self.running[name] = instance
            prepare(instance, self.demo, self.store)
            self.settle(instance)
        return self.running[name]

    def settle(self, instance: Instance) -> None:
        """What is done once in the life of one, before its first test."""

    def discard(self, instance: Instance) -> None:
        """End it with all that runs in it: what a failed test left must not be the next test's trouble."""
        self.running = {name: other for name, other in self.running.items() if other is not instance}
        instance.close()

    def close(self) -> None:
        while self.running:
            self.running.popitem()[1].close()
