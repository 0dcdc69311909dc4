"""The test bed's fake GPU as NVIDIA's driver takes it for one of its own: until it is to be initialised.

Needs a QEMU with vfio-user (10.1), which the test bed has. Must not know what is tested.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from images import entries
from tests.testbed import cache, machine
from tests.testbed.fakegpu import FakeGpu, Model
from tests.testbed.gauges import Gauges
from tests.testbed.vfiouser import Server

FIRST_SLOT = 0x10
_INTERRUPT_PIN = 0x3D  # of configuration space: the driver wants an interrupt, be it one that nobody sends
# Which chip it is, in the form of newer ones (NV_PMC_BOOT_42 of NVIDIA's open modules), by device id.
_CHIP_AT, _CHIPS = 0xA00, {0x2330: 0x180A1000, 0x2230: 0x172A1000}
_RAM = ("-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-machine", "memory-backend=ram")
_HOLE = ("-global", "q35-pcihost.pci-hole64-size=512G")


class KnownGpu(FakeGpu):
    def __init__(self, model: Model, gauges: Gauges) -> None:
        super().__init__(model, gauges)
        self._config[_INTERRUPT_PIN] = 1

    def _forget(self) -> None:
        super()._forget()
        struct.pack_into("<I", self._registers, _CHIP_AT, _CHIPS[self._model.device_id])


def qemu() -> list[str | Path] | None:
    """The beginning of the command line of a QEMU that has vfio-user; None where no test bed was built."""
    hosts = entries.entries(cache.HOME, "host")
    return machine.program(hosts[0]) if hosts else None


def port(number: int) -> str:
    """Slot and function of the root port that the GPU of this number is behind."""
    return f"{FIRST_SLOT + number:02x}.0"


@contextmanager
def plugged(directory: Path, models: Sequence[Model]) -> Iterator[tuple[str, ...]]:
    """QEMU's options, as long as the GPUs are served, each behind a root port of its own."""
    options = [*_RAM, *_HOLE]
    with ExitStack() as stack:
        for number, model in enumerate(models):
            gauges = stack.enter_context(Gauges(directory / f"gauges{number}"))
            path = directory / f"gpu{number}.sock"
            stack.enter_context(Server(path, KnownGpu(model, gauges)))
            name, socket = f"port{number}", {"type": "unix", "path": str(path)}
            bridge = {"driver": "pcie-root-port", "id": name, "bus": "pcie.0", "addr": port(number)}
            gpu = {"driver": "vfio-user-pci", "bus": name, "addr": "00.0", "socket": socket, "rombar": 0}
            for device in (bridge | {"chassis": number + 1, "slot": number + 1}, gpu):
                options += ["-device", json.dumps(device)]
        yield tuple(options)
