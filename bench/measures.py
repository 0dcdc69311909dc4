"""What is measured: every measure's name, in words and in its unit. Declared once, for files and pages.

A name is what a file of samples has to be found by: rename none without raising document.SCHEMA.
"""

from dataclasses import dataclass

SECONDS, BYTES, RATE = "s", "MiB", "MiB/s"
MIB = 1 << 20

RUN = "run"
RUN_GONE = "run.gone"
FIRST_BYTE = "first_byte"
MANY_RUN = "many.run"
MANY_GONE = "many.gone"
MANY_FIRST_BYTE = "many.first_byte"
GUEST_BOOT = "guest_boot"
OUTSIDE = "outside"
EXEC = "exec"
EXEC_FIRST_BYTE = "exec.first_byte"
DELETE = "delete"
KILL = "kill"
KILL_GONE = "kill.gone"
PSS = "pss"
PSS_ALONE = "pss.alone"
PSS_HOST = "pss.host"
PSS_SHIM = "pss.shim"
GUEST_USED = "guest_used"
ROOTFS_COLD, ROOTFS_WARM = "rootfs.cold", "rootfs.warm"
VOLUME_COLD, VOLUME_WARM = "volume.cold", "volume.warm"
BLOCK = "block-direct"
BLOCK_BUFFERED = "block"
OUTPUT = "output"
TCP_IN, TCP_OUT, TCP_ANSWER = "tcp.in", "tcp.out", "tcp.answer"
FILES_READ, FILES_WRITE = "files.read", "files.write"
FILES_WALK, FILES_WALK_AGAIN, FILES_MAKE = "files.walk", "files.walk_again", "files.make"


@dataclass(frozen=True, slots=True)
class Measure:
    """unit: values are kept in seconds, bytes or bytes per second, and shown in this."""

    name: str
    text: str
    unit: str = SECONDS

    @property
    def scale(self) -> float:
        return 1.0 if self.unit == SECONDS else float(MIB)

    def show(self, value: float) -> str:
        return f"{value / self.scale:.3f}" if self.unit == SECONDS else f"{value / self.scale:.1f}"


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(RUN, "`ctr run --rm` of `true`, from ctr's exec to its exit"),
        Measure(RUN_GONE, "the same, until nothing of the container is left"),
        Measure(FIRST_BYTE, "`ctr run --rm` of `echo`, from ctr's exec to the first byte"),
        Measure(MANY_FIRST_BYTE, "`ctr run --rm` of `echo`, many at once, from ctr's exec to the first byte"),
        Measure(MANY_RUN, "the same, from ctr's exec to its exit"),
        Measure(MANY_GONE, "the same, from the first ctr's exec until nothing of any container is left"),
        Measure(GUEST_BOOT, "guest power-on to the agent's answer"),
        Measure(OUTSIDE, "`ctr run` of `true` outside the guest's boot and run"),
        Measure(EXEC, "`ctr task exec` of `true`"),
        Measure(EXEC_FIRST_BYTE, "`ctr task exec` of `echo`, to the first byte"),
        Measure(DELETE, "`ctr task delete` of a task that has ended"),
        Measure(KILL, "`ctr task delete --force` of one that runs: KILL, its end, its deletion"),
        Measure(KILL_GONE, "the same, until nothing of the container is left"),
        Measure(PSS, "PSS of an idle pod's processes, the share of one of all", BYTES),
        Measure(PSS_ALONE, "PSS of an idle pod's processes, alone", BYTES),
        Measure(PSS_HOST, "the share's part that is not the guest's RAM", BYTES),
        Measure(PSS_SHIM, "the share's part that is the shim's own process", BYTES),
        Measure(GUEST_USED, "memory in use as the guest sees it (MemTotal less MemAvailable)", BYTES),
        Measure(ROOTFS_COLD, "a file of the image, read from the host's disk", RATE),
        Measure(ROOTFS_WARM, "a file of the image, read from the host's page cache", RATE),
        Measure(VOLUME_COLD, "a file of a bind-mounted volume, read from the host's disk", RATE),
        Measure(VOLUME_WARM, "a file of a bind-mounted volume, read from the host's page cache", RATE),
        Measure(BLOCK, "a block device, read with O_DIRECT, its file in the host's page cache", RATE),
        Measure(BLOCK_BUFFERED, "the same, read for the first time through the reader's page cache", RATE),
        Measure(OUTPUT, "a container's output, from its first byte at ctr's stdout to its last", RATE),
        Measure(TCP_IN, "TCP from the host to a container", RATE),
        Measure(TCP_OUT, "TCP from a container to the host", RATE),
        Measure(TCP_ANSWER, "a byte by TCP from the host to a container and back"),
        Measure(FILES_WALK, "lstat of everything below /usr, the first time"),
        Measure(FILES_WALK_AGAIN, "the same again"),
        Measure(FILES_MAKE, "500 files of 4 KiB made, renamed, removed"),
        Measure(FILES_READ, "a file of the image, read for the first time, in the host's page cache", RATE),
        Measure(FILES_WRITE, "a new file of 16 MiB, written and synced", RATE),
    )
}
