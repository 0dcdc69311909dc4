"""What files would cost if they came as they do not: by a 9p server of QEMU's own, or as a block device.

Run in the bed by other_ways.sh. A guest of a pod's size and kernel has the demo's image for its root and does
what `casemate bench files` has a container do, so that its figures can be read beside that command's.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import files, payload
from bench.measures import MEASURES, MIB
from images.oci import DEMO
from images.store import ImageStore
from scripts.product import IMAGES

SCRATCH = Path("/root/other-ways")
TREE, SHOWN = SCRATCH / "tree", SCRATCH / "shown"
PAYLOAD_BYTES = 64 * MIB
BOOT_S = 240
INIT = """\
#!/bin/sh
echo begun
python3 /worker.py
python3 /trials.py /tried
"""
"""The kernel panics when it ends, and QEMU with it."""
MACHINE = (
    *("-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-smp", "1"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
)
CMDLINE = "console=ttyS0 loglevel=1 panic=-1 no_timer_check pci=lastbus=1 rw init=/init.sh"


@dataclass(frozen=True, slots=True)
class Way:
    """make: what has to be done before a guest can have the tree. root: for the guest's kernel."""

    name: str
    root: str
    devices: tuple[str, ...]
    make: tuple[str, ...] = ()


DISK = SCRATCH / "tree.ext4"
PACKED = SCRATCH / "tree.erofs"
SHARE = f"local,id=tree,path={TREE},security_model=none"
WAYS = (
    Way(
        "9p by QEMU",
        "root=tree rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=524288,cache=loose",
        ("-fsdev", SHARE, "-device", "virtio-9p-pci,fsdev=tree,mount_tag=tree"),
    ),
    Way(
        "a disk with ext4",
        "root=/dev/vda rootfstype=ext4",
        ("-drive", f"file={DISK},format=raw,if=virtio"),
        ("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(TREE), str(DISK), "1G"),
    ),
)
PACK = ("mkfs.erofs", "--quiet", str(PACKED), str(TREE))
"""An image that nothing can be written to: a guest would lay memory or another disk over it."""


def main() -> int:
    """Prints a line for each figure."""
    SHOWN.mkdir(parents=True)
    run("ctr", "image", "mount", DEMO, str(SHOWN))
    run("cp", "-a", str(SHOWN), str(TREE))  # with its devices
    run("ctr", "image", "unmount", str(SHOWN))
    payload.random_file(TREE / payload.NAME, PAYLOAD_BYTES)
    (TREE / "worker.py").write_text(files.WORKER)
    shutil.copyfile(files.TRIED, TREE / "trials.py")
    init = TREE / "init.sh"
    init.write_text(INIT)
    init.chmod(0o755)
    image = ImageStore(IMAGES).resolve("default")
    # Before any guest writes to the tree.
    for name, argv in {**{way.name: way.make for way in WAYS if way.make}, "an erofs image": PACK}.items():
        began = time.monotonic()
        run(*argv)
        print(f"{name}: made in {time.monotonic() - began:.2f} s", flush=True)
    for way in WAYS:
        show(way, guest(way, image.kernel))
    return 0


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def guest(way: Way, kernel: Path) -> list[str]:
    """What its programs said."""
    argv = ["qemu-system-x86_64", *MACHINE, *way.devices, "-kernel", str(kernel)]
    argv += ["-append", f"{CMDLINE} {way.root}"]
    done = subprocess.run(
        argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=BOOT_S
    )
    before, begun, said = done.stdout.replace("\r", "").partition("begun\n")
    if not begun:
        raise SystemExit(f"{way.name}: the guest came to nothing: {before[-2000:]}")
    return said.splitlines()


def show(way: Way, said: Sequence[str]) -> None:
    figures, tried = said[: len(files.ORDER)], said[len(files.ORDER) :]
    for measure, line in zip(files.ORDER, figures, strict=True):
        about = MEASURES[measure]
        done, seconds = line.split()
        value = int(done) / float(seconds) if measure in files.RATES else float(seconds)
        print(f"{way.name}: {about.text}: {about.show(value)} {about.unit}", flush=True)
    for line in tried:
        print(f"{way.name}: {line}", flush=True)
        if line.endswith(" tried"):
            return
    raise SystemExit(f"{way.name}: the trials did not come to their end")


if __name__ == "__main__":
    sys.exit(main())
