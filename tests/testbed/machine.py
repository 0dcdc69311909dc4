"""Starts throw-away instances of the bed, each for one command: QEMU, its time limits, its end.

QEMU is run straight out of the bed's own root file system, by that system's dynamic linker, because the
machine's own may be years older. Must not know what is installed in the bed.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rpc.errors import Unavailable
from scripts.host import CHECKOUT, say
from tests.testbed import devices
from tests.testbed.devices import Topology
from tests.testbed.installation import INIT

LIBRARIES = "usr/lib/x86_64-linux-gnu"
# A first heartbeat takes 5 s of a quiet machine.
BOOT_S = 120.0
# Without a heartbeat for that long, the emulator hangs: of some dozens of runs with guests one does.
HUNG_S = 60.0
LOOK_S = 1.0
# TCG's TSC is the machine's own, constant and in step on all CPUs, but CPUID does not say so. KVM then
# keeps the first, rough measurement of its rate, and where a busy machine spoilt that, gives guests a TSC
# that stands still (kvm_set_tsc_khz: "user requested TSC rate below hardware speed").
CMDLINE = "console=ttyS0 loglevel=4 panic=-1 root=/dev/vda rw tsc=reliable setcpuid=constant_tsc,nonstop_tsc"
# TCG runs `rep movsb` and `rep stosb` byte by byte: kernels and the C library must not think them fast.
CPU = "max,-erms,-fsrm,-fsrs,-fzrm"
TIMED_OUT = 124  # as timeout(1) has it
CPUS, MEMORY_MIB, LIMIT_S = 2, 8192, 540.0
CONSOLE, COMPLAINTS = "console.log", "qemu.log"
TROUBLE = re.compile(r"BUG: |Oops: |general protection|Kernel panic|WARNING: |INFO: |watchdog: ")
"""What a kernel begins with when it tells of something that it did not expect."""
FEW, MANY = 15, 120


@dataclass(frozen=True, slots=True)
class Bed:
    """What an instance is made of: the tree that QEMU comes from, the kernel, the disk."""

    host: Path
    kernel: Path
    disk: Path


@dataclass(frozen=True, slots=True)
class Shape:
    """limit_s: what the command has, from the start of QEMU. share: a directory seen as /share. kept: what
    is written to the disk stays there. devices: beside those that every instance has.
    """

    cpus: int = CPUS
    memory_mib: int = MEMORY_MIB
    limit_s: float = LIMIT_S
    share: Path | None = None
    shell: bool = False
    kept: bool = False
    devices: Topology | None = None


class End(Enum):
    DONE = "ended"
    NO_BOOT = "did not boot"
    HUNG = "hung"
    LATE = "was not done in time"


def run(bed: Bed, command: Sequence[str], shape: Shape, files: Sequence[Path] = ()) -> int:
    """Run a command as root in an instance of its own; what it prints goes where our output goes.

    files are copied to /exchange first, executable. Returns its exit code, or TIMED_OUT. An instance that the
    emulator hung is told of and tried once more; Unavailable if that hangs, too.
    """
    end = End.DONE
    for attempt in ("first", "second"):
        with _exchange(command, files) as exchange:
            end = _instance(bed, shape, exchange)
            if end is End.DONE:
                return int((exchange / "exit-code").read_text())
            words = {name: (exchange / name).read_text(errors="replace") for name in (CONSOLE, COMPLAINTS)}
        say(f"testbed: the {attempt} instance {end.value}; the last words of its kernel, and of QEMU:")
        print("\n".join(line for text in words.values() for line in last_words(text)), flush=True)
        if end is End.LATE:
            say(f"testbed: stopped after {shape.limit_s:.0f} s")
            return TIMED_OUT
    raise Unavailable(f"the test bed {end.value}, twice")


def last_words(text: str) -> list[str]:
    """The last lines, and what led to them: those from the kernel's first trouble on."""
    lines = text.splitlines()
    last = lines[-FEW:]
    before = lines[:-FEW]
    for number, line in enumerate(before):
        if TROUBLE.search(line):
            return before[number:][:MANY] + last
    return last


@contextmanager
def _exchange(command: Sequence[str], files: Sequence[Path]) -> Iterator[Path]:
    """The directory by which both sides speak: command, heartbeat, exit-code; the kernel's console."""
    with tempfile.TemporaryDirectory(prefix="casemate-testbed-", dir="/var/tmp") as name:
        exchange = Path(name)
        (exchange / CONSOLE).touch()
        (exchange / "command").write_bytes(b"".join(word.encode() + b"\0" for word in command))
        for file in files:
            shutil.copyfile(file, exchange / file.name)
            (exchange / file.name).chmod(0o755)
        yield exchange


def _instance(bed: Bed, shape: Shape, exchange: Path) -> End:
    environment = {
        **os.environ,
        "QEMU_MODULE_DIR": str(bed.host / LIBRARIES / "qemu"),
        "TMPDIR": str(exchange),  # of the disk's snapshot
    }
    stdin = None if shape.shell else subprocess.DEVNULL
    with ExitStack() as stack:
        arguments = qemu(bed, shape, exchange)
        if shape.devices is not None:
            arguments += stack.enter_context(devices.plugged(shape.devices, exchange))
        # It says much of what guests do with BARs, and nothing else that anybody reads before it failed.
        complaints = stack.enter_context((exchange / COMPLAINTS).open("wb"))
        process = subprocess.Popen(arguments, env=environment, stdin=stdin, stderr=complaints)
        try:
            return _watch(process, shape, exchange)
        finally:
            process.kill()
            process.wait()


def _watch(process: "subprocess.Popen[bytes]", shape: Shape, exchange: Path) -> End:
    start = time.monotonic()
    heard, beat = start, 0
    while True:
        try:
            process.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            pass
        else:
            return End.DONE if (exchange / "exit-code").exists() else End.NO_BOOT if not beat else End.HUNG
        now = time.monotonic()
        try:
            latest = (exchange / "heartbeat").stat().st_mtime_ns
        except FileNotFoundError:
            latest = 0
        if latest != beat:
            heard, beat = now, latest
        if now - heard > (HUNG_S if beat else BOOT_S):
            return End.HUNG if beat else End.NO_BOOT
        if not shape.shell and now - start > shape.limit_s:
            return End.LATE


def program(host: Path) -> list[str | Path]:
    """The bed's QEMU, run where its libraries are not this machine's: the beginning of a command line."""
    return [
        *(host / "lib64/ld-linux-x86-64.so.2", "--library-path", host / LIBRARIES),
        *(host / "usr/bin/qemu-system-x86_64", "-L", host / "usr/share/qemu"),
        *("-L", host / "usr/share/seabios"),
    ]


def qemu(bed: Bed, shape: Shape, exchange: Path) -> list[str]:
    """The command line. TCG's CPU has AMD's SVM and nested paging: the bed has a /dev/kvm."""
    host = bed.host
    flags = "testbed.shell" if shape.shell else ""
    snapshot = "off" if shape.kept else "on"
    cpu, cpus, cmdline, memory = CPU, str(shape.cpus), CMDLINE, list[str]()
    if shape.devices is not None:
        cpu, cmdline = f"{CPU},{devices.CPU}", f"{CMDLINE} {shape.devices.cmdline}"
        cpus = f"{shape.cpus},sockets={shape.devices.nodes}"
        memory = devices.memory(shape.devices.nodes, shape.cpus, shape.memory_mib)
    shares = [("checkout", CHECKOUT, ",readonly=on"), ("exchange", exchange, "")]
    if shape.share is not None:
        shares.append(("share", shape.share, ""))
        flags += " testbed.share"
    arguments: list[str | Path] = [
        *program(host),
        *("-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", cpu),
        *("-smp", cpus, "-m", f"{shape.memory_mib}M", *memory),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", bed.kernel),
        *("-append", f"{cmdline} init={INIT} {flags}"),
        *("-drive", f"file={bed.disk},format=raw,if=none,id=disk,snapshot={snapshot},cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=disk"),
        *("-device", "virtio-rng-pci"),
        *("-chardev", f"file,id=console,path={exchange}/{CONSOLE}", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=output,signal=off" if shape.shell else "stdio,id=output"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=output"),
    ]
    for tag, path, options in shares:
        arguments += ["-fsdev", f"local,id={tag},path={path},security_model=none{options}"]
        arguments += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return [str(argument) for argument in arguments]
