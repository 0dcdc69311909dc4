"""A shim that is killed while it takes its pod's devices or gives them back: what it leaves is put right."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.settings import Settings
from shim import dedicated, reclaim
from tests.unit.shim.devicehosts import CARD, FIRST, RAM, DeviceHost, settings_in_memory, wishes
from vfio.ledger.ledger import Ledger

WISH = wishes(text=f"{FIRST}, {CARD}")


@pytest.fixture
def settings() -> Iterator[Settings]:
    with settings_in_memory() as settings:
        yield settings


def life(host: DeviceHost, settings: Settings, writes: int) -> bool:
    """A shim's, whose pod has a CPU of its own, too: from the claim to the release, killed before so many
    writes to sysfs. Whether it was."""
    left = [writes]

    def die() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            host.kernel.before = die
            giver = host.giver(settings)
            giver.give_back(giver.take(WISH, RAM, 1).claim)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def test_killed_before_any_write_all_are_free_and_as_they_were(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = DeviceHost(tmp_path / "host")
    host.tree.put("sys/devices/system/node/online", "0\n")
    host.tree.put("sys/devices/system/node/node0/cpulist", "0\n")
    monkeypatch.setattr(dedicated, "may_run_on", lambda _: [0])
    monkeypatch.setattr(reclaim, "Bus", lambda _: host.pci())
    native, kills = host.drivers(), 0
    for writes in range(1, 100):
        if not life(host, settings, writes):
            break
        kills += 1
        taken = reclaim.reclaim(settings, "the test")
        assert set(taken.devices.values()) <= {None}, (writes, taken)
        assert (host.states(settings), host.drivers()) == ({}, native), writes
        with Ledger(Path(settings.ledger_dir)) as ledger:
            assert (ledger.claims(), ledger.bindings()) == ([], [])
    assert kills > 10
    assert reclaim.reclaim(settings, "the test") == reclaim.Reclaimed()
