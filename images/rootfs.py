"""The guest's root file system: chosen files of Debian packages, and nothing that no guest reads.

Allow-lists programs and follows their libraries, so what packages merely drag along stays out. Must
not know of kernels, stores or how the packages were fetched.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from images.bundle import write_bundle
from images.bytecode import GuestPython
from images.crun import PROGRAM as CRUN
from images.elf import is_elf, libraries
from images.packages import source_date_epoch
from images.run import run
from rpc.errors import NotFound

CODE = "/usr/lib/casemate"  # the agent and rpc, in the guest
MODULES = "/usr/lib/modules"
MAIN = f"{CODE}/main.pyc"
BUNDLE = f"{CODE}/bundle"
INIT = f"{CODE}/init"  # of an image without an initramfs: the first program
PROGRAM = ("/usr/bin/python3", "-I", "-S", MAIN)
WANTED = ("/usr/bin/python3", "/usr/lib/x86_64-linux-gnu/libc.so.6", BUNDLE)  # read before it starts
UUID = "0c05e3a7-e000-4000-8000-00000000cafe"  # of every image: nothing mounts by it

_PROGRAMS = (CRUN, "usr/bin/busybox")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LINKER = "ld-linux-x86-64.so.2"
_LOADED_LATER = ("libgcc_s.so.1",)  # the C library loads it by name when a thread ends itself
_DIRECTORIES = (
    *("dev", "proc", "sys", "run", "tmp", "root", "mnt", "etc", "var"),
    *("usr/bin", "usr/lib64", _LIBRARIES),
)
_LINKS = {
    "bin": "usr/bin",
    "sbin": "usr/bin",
    "usr/sbin": "bin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    f"usr/lib64/{_LINKER}": f"../lib/x86_64-linux-gnu/{_LINKER}",
    "usr/bin/sh": "busybox",
    "var/run": "/run",
    "var/tmp": "/tmp",
    "etc/mtab": "/proc/self/mounts",
}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}
# of the standard library: what a service without terminal, tests, TLS and data bases never imports
_NOT_IN_GUEST = frozenset(
    (
        *(
            "_pyrepl",
            "curses",
            "dbm",
            "email",
            "ensurepip",
            "html",
            "http",
            "idlelib",
            "pydoc_data",
            "sqlite3",
        ),
        *(
            "sysconfig",
            "test",
            "tkinter",
            "turtledemo",
            "unittest",
            "urllib",
            "venv",
            "wsgiref",
            "xml",
            "xmlrpc",
        ),
        *("antigravity.py", "cProfile.py", "doctest.py", "ftplib.py", "imaplib.py", "mailbox.py", "pdb.py"),
        *("poplib.py", "profile.py", "pstats.py", "pydoc.py", "sitecustomize.py", "smtplib.py", "ssl.py"),
        *("this.py", "trace.py", "tracemalloc.py", "turtle.py", "webbrowser.py", "zipapp.py"),
        *("__phello__", "__pycache__"),
    )
)
_NOT_LOADED = (
    *("_bz2", "_codecs_", "_ctypes_test", "_curses", "_dbm", "_decimal", "_hashlib", "_interp", "_lsprof"),
    *("_lzma", "_multibytecodec", "_sqlite3", "_ssl", "_test", "_uuid", "_xx", "_zoneinfo", "readline", "xx"),
)
_FIRST = Path(__file__).parent / "guest"


def populate(tree: Path, python: GuestPython, root: Path, crun: Path | None = None) -> None:
    """Fills root with what does not change with the agent, from an unpacked tree of packages.

    crun: another tree, with another crun.
    """
    for directory in _DIRECTORIES:
        (root / directory).mkdir(parents=True, exist_ok=True)
    for link, target in _LINKS.items():
        (root / link).symlink_to(target)
    for file, content in _FILES.items():
        (root / file).write_text(content)
    programs = [*_PROGRAMS, python.program]
    for program in programs:
        _copy(((crun if program == CRUN else None) or tree) / program, root / program)
    (root / "usr/bin/python3").symlink_to(Path(python.program).name)
    _standard_library(python, root)
    from_tree = [tree / _LIBRARIES]
    binaries = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and _is_elf(p)]
    found = libraries(binaries, from_tree) | {name: tree / _LIBRARIES / name for name in _LOADED_LATER}
    for name, path in found.items():
        _copy(path.resolve(), root / _LIBRARIES / name)


def _standard_library(python: GuestPython, root: Path) -> None:
    source = python.tree / python.library
    sources: list[str] = []
    for directory, names, files in os.walk(source):
        here = Path(directory).relative_to(source)
        names[:] = sorted(n for n in names if n not in _NOT_IN_GUEST and not n.startswith("config-"))
        if here == Path("lib-dynload"):
            for name in files:
                if not name.startswith(_NOT_LOADED):
                    _copy(Path(directory, name), root / python.library / here / name)
            continue
        sources += [str(here / n) for n in files if n.endswith(".py") and n not in _NOT_IN_GUEST]
    python.compile(source, root / python.library, f"/{python.library}", sources)


def add_modules(root: Path, text: str, files: Mapping[str, bytes], drivers: str) -> None:
    """Adds kernel modules; modules.txt, which tells the agent the order in which to load them; drivers.txt,
    which are for which devices."""
    directory = root / MODULES.lstrip("/")
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    code = root / CODE.lstrip("/")
    code.mkdir(parents=True, exist_ok=True)
    (code / "modules.txt").write_text(text)
    (code / "drivers.txt").write_text(drivers)


def add_init(root: Path, program: bytes) -> None:
    """Adds the first program of a guest whose kernel mounts the root by itself."""
    path = root / INIT.lstrip("/")
    path.write_bytes(program)
    path.chmod(0o755)


def check_source(source: Path) -> None:
    if not (source / "agent/__main__.py").is_file():
        raise NotFound(f"no agent to put into the image: {source}/agent/__main__.py is missing")


def add_agent(root: Path, python: GuestPython, source: Path) -> None:
    """Adds the agent and rpc, compiled, from a checkout or an installation of casemate."""
    check_source(source)
    target = root / CODE.lstrip("/")
    for package in ("agent", "rpc"):
        files = sorted(str(p.relative_to(source)) for p in (source / package).rglob("*.py"))
        python.compile(source, target, CODE, files)
    python.compile(_FIRST, target, CODE, ["main.py"])
    inside = GuestPython(root, python.version)
    write_bundle(inside, root, CODE, "agent.__main__")


def make_erofs(root: Path, image: Path) -> None:
    """Packs root into an erofs image whose bytes depend on root's content only (and on mkfs.erofs).

    Not compressed: that halves the image, and costs an emulated guest 0.1 s of its boot.
    """
    for directory, names, files in os.walk(root):
        os.chmod(directory, 0o1777 if directory == str(root / "tmp") else 0o755)
        for name in [*names, *files]:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    run(
        ["mkfs.erofs", "--quiet", f"-T{source_date_epoch()}", "-U", UUID, "--all-root", "-x-1", image, root],
        package="erofs-utils",
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return is_elf(file.read(16))
