"""A virtual machine that plays the host: a real kernel with devices in it, and what vfio/ finds there.

QEMU by hand under TCG, the guest image's kernel (Debian's cloud kernel has Intel's IOMMU), and an initramfs
of this machine's Python with our code, whose /init is main(). Knows nothing of what should be found.
"""

import base64
import ctypes
import os
import pickle
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from images.initramfs import cpio
from vfio import inventory, isolation
from vfio.inventory import Inventory
from vfio.isolation import Audit
from vfio.names import PciNames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from images.modules import Module  # whose decompression the Python of the initramfs has not

CHECKOUT = Path(__file__).parents[2]
BOOT_S = 170
_PYTHON = "/usr/bin/python3"
_NOT_NEEDED = set("test idlelib tkinter lib2to3 pydoc_data ensurepip site-packages turtledemo".split())
_MODULES = Path("/modules")
_POWER_OFF = 0x4321FEDC  # LINUX_REBOOT_CMD_POWER_OFF


@dataclass(frozen=True)
class Scan:
    """What the code found there, with root's eyes; interrupts: names of the interrupt controllers."""

    found: Inventory
    audit: Audit
    header_only: Audit  # the same for somebody who may read 64 bytes of configuration space
    interrupts: frozenset[str]


def main() -> None:
    """/init of the machine of scan()."""
    answer(_look)


def answer(look: Callable[[], object]) -> None:
    """An /init: load the modules, look, write what was found to the second serial port, power off."""
    libc = ctypes.CDLL(None)
    for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")):
        libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None)
    # What is raised here is read on the console: the kernel panics when /init has ended.
    console = os.open("/dev/ttyS0", os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(console, standard)
    for module in sorted(_MODULES.glob("*")):
        content = module.read_bytes()
        if libc.init_module(content, ctypes.c_ulong(len(content)), b"") != 0:
            raise OSError(f"module {module.name} is not loaded: see the kernel's words above")
    said = base64.b64encode(pickle.dumps(look())).decode()
    with open("/dev/ttyS1", "w", encoding="utf-8") as port:
        port.write(f"{said}\nend\n")
    libc.sync()
    libc.reboot(_POWER_OFF)


def _look() -> Scan:
    found = inventory.read(names=PciNames())
    audit = isolation.audit(found)
    os.seteuid(65534)
    header_only = isolation.audit(inventory.read(names=PciNames()))
    os.seteuid(0)
    chips = Path("/sys/kernel/irq").glob("*/chip_name")
    return Scan(found, audit, header_only, frozenset(each.read_text().strip() for each in chips))


def scan(kernel: Path, directory: Path, devices: list[str], cmdline: str) -> Scan:
    """What is seen in a machine with these options of QEMU."""
    seen = boot(kernel, directory, devices, cmdline, "hostscan")
    assert isinstance(seen, Scan)
    return seen


def boot(
    kernel: Path,
    directory: Path,
    devices: list[str],
    cmdline: str,
    program: str,
    modules: "Sequence[Module]" = (),
) -> object:
    """What main() of tests/vm/PROGRAM.py answers there. Raises AssertionError with what was said instead."""
    from shim.vm.designer import EMULATED_CMDLINE  # the emulated host has this module, too, and no shim

    archive = directory / "initramfs"
    archive.write_bytes(_initramfs(program, modules))
    result, console = directory / "result", directory / "console"
    argv = [
        *("qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max", "-m", "768", "-smp", "2"),
        *(
            "-M",
            "q35,kernel-irqchip=split",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ),
        *("-object", "memory-backend-ram,id=m0,size=384M", "-object", "memory-backend-ram,id=m1,size=384M"),
        *("-numa", "node,nodeid=0,cpus=0,memdev=m0", "-numa", "node,nodeid=1,cpus=1,memdev=m1"),
        *("-serial", f"file:{console}", "-serial", f"file:{result}"),
        *("-kernel", str(kernel), "-initrd", str(archive)),
        *("-append", f"console=ttyS0 quiet panic=-1 {EMULATED_CMDLINE} rdinit=/init {cmdline}"),
        *devices,
    ]
    ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOOT_S, check=False)
    said, end, _ = result.read_text().partition("\nend") if result.exists() else ("", "", "")
    if not end:
        last = console.read_text(errors="replace")[-3000:] if console.exists() else ""
        raise AssertionError(f"QEMU ended with {ended.returncode}: {ended.stderr.decode()}\n{last}")
    return pickle.loads(base64.b64decode(said))  # noqa: S301 # our own words


def _initramfs(program: str, modules: "Sequence[Module]") -> bytes:
    """This machine's Python, its libraries, the standard library's sources, and the product's."""
    files: dict[str, tuple[int, bytes]] = {}
    standard = Path(sysconfig.get_path("stdlib"))
    python = Path(sys.executable).resolve()
    extensions = sorted((standard / "lib-dynload").glob("*.so"))
    wanted = set("_ctypes _json _struct _pickle _datetime _bisect _random _hashlib _sqlite3 _queue".split())
    extensions = [each for each in extensions if each.name.split(".")[0] in wanted]
    _add(files, _PYTHON, python)
    for path in (python, *extensions):
        for library in _libraries(path):
            _add(files, str(library), library)
    for path in (*standard.rglob("*.py"), *extensions):
        if not _NOT_NEEDED & set(path.relative_to(standard).parts):
            _add(files, str(path), path)
    for package in ("config", "images", "rpc", "shim", "vfio"):
        for path in (CHECKOUT / package).rglob("*.py"):
            _add(files, f"/app/{path.relative_to(CHECKOUT)}", path)
    for name in {
        "tests/__init__.py",
        "tests/vm/__init__.py",
        "tests/vm/hostscan.py",
        f"tests/vm/{program}.py",
    }:
        _add(files, f"/app/{name}", CHECKOUT / name)
    for number, module in enumerate(modules):
        files[f"modules/{number:03}-{module.name}"] = (stat.S_IFREG | 0o644, module.content)
    init = (
        f"#!{_PYTHON} -B",
        "import sys",
        'sys.path.insert(0, "/app")',
        f"from tests.vm import {program}",
        f"{program}.main()",
    )
    files["init"] = (stat.S_IFREG | 0o755, "\n".join(init).encode())
    directories = {"proc", "sys", "dev", "tmp"}
    for name in files:
        directories |= {str(parent) for parent in Path(name).parents} - {"."}
    tree = [(name, stat.S_IFDIR | 0o755, b"") for name in sorted(directories)]
    return cpio([*tree, *((name, mode, content) for name, (mode, content) in sorted(files.items()))])


def _add(files: dict[str, tuple[int, bytes]], name: str, path: Path) -> None:
    files[name.lstrip("/")] = (stat.S_IFREG | 0o755, path.read_bytes())


def _libraries(path: Path) -> set[Path]:
    said = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    return {Path(word) for word in said.split() if word.startswith("/")}
