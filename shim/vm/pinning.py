"""On which of the host's CPUs a machine's threads run, if it has CPUs of its own. Most machines have none."""

from dataclasses import dataclass

from config.cpulist import ranges


@dataclass(frozen=True, slots=True)
class Pinning:
    """vcpus: the host's number of each of the guest's CPUs. emulator: where QEMU's other threads run."""

    vcpus: tuple[int, ...]
    emulator: tuple[int, ...]

    def __str__(self) -> str:
        return f"{ranges(self.vcpus)}, QEMU's other threads on {ranges(self.emulator)}"
