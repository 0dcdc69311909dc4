"""Small real things for the tests of images/: ELF files, kernels, modules, package trees, images in a store.

Everything is made by code; nothing here needs root or a network.
"""

import gzip
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path
from struct import pack

from images.image import INITRD, KERNEL, ROOTFS, GuestImage
from images.store import ImageStore

PVH_NOTE = pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100000)
RELEASE = "6.12.1-fake"
# what the guest's Python can import here; all of the standard library would take seconds to compile
_IMPORTED = "asyncio, collections.abc, colorsys, ctypes, encodings.idna, json, py_compile, socket, subprocess"
HOST_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


def add_image(store: ImageStore, scratch: Path, name: str = "default", **content: str) -> GuestImage:
    """Adds an image whose files hold the given text; files that are not given are all the same."""
    files = {}
    for file, key in ((KERNEL, "kernel"), (INITRD, "initrd"), (ROOTFS, "rootfs")):
        files[file] = scratch / f"{name}-{file}"
        files[file].write_text(content.get(key, key) * 1000)
    return store.add(name, files, {"cmdline": content.get("cmdline", "quiet")})


def elf(note: bytes = PVH_NOTE, text: bytes = b"\x90" * 100 + b"code") -> bytes:
    """An executable with a text segment that holds a note, a data segment with zeros behind, and padding."""
    headers = 64 + 3 * 56
    text_at, data_at = 4096, 8192 * 2
    content = note + text
    programs = [
        pack("<IIQQQQQQ", 1, 5, text_at, 0xFFFF0000, 0x1000000, len(content), len(content), 4096),
        pack("<IIQQQQQQ", 1, 6, data_at, 0xFFFFF000, 0x2000000, 1004, 5000, 4096),
        pack("<IIQQQQQQ", 4, 4, text_at, 0xFFFF0000, 0x1000000, len(note), len(note), 4),
    ]
    ehdr = pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0x1000000, 64, 999, 0, 64, 56, 3, 64, 9, 8
    )
    image = bytearray(ehdr + b"".join(programs))
    assert len(image) == headers
    image += bytes(text_at - len(image)) + content
    image += bytes(data_at - len(image)) + b"data" + bytes(1000)
    return bytes(image) + b"section headers and relocations"


def bzimage(payload: bytes) -> bytes:
    """A bzImage with two setup sectors and the payload 100 bytes into the protected-mode code."""
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    setup[0x202:0x206] = b"HdrS"
    setup[0x248:0x250] = pack("<II", 100, len(payload))
    return bytes(setup) + bytes(100) + payload + b"trailer"


def compressed(content: bytes, how: str) -> bytes:
    match how:
        case "xz":
            return lzma.compress(content)
        case "gzip":
            return gzip.compress(content) + pack("<I", len(content))
        case _:
            return content


def module(depends: str = "", body: bytes = b"") -> bytes:
    return b"\x7fELF" + body + b"license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def signed(content: bytes, signature: bytes = b"S" * 300) -> bytes:
    info = pack(">8xI", len(signature))
    return content + signature + info + b"~Module signature appended~\n"


def kernel_tree(tree: Path, modules: dict[str, str], builtin: tuple[str, ...] = ()) -> None:
    """A kernel package's files. modules: path below kernel/ without suffix -> what it depends on."""
    (tree / "boot").mkdir(parents=True)
    (tree / "boot" / f"vmlinuz-{RELEASE}").write_bytes(bzimage(compressed(elf(), "gzip")))
    directory = tree / "usr/lib/modules" / RELEASE
    directory.mkdir(parents=True)
    (directory / "modules.builtin").write_text("".join(f"kernel/{path}.ko\n" for path in builtin))
    for path, depends in modules.items():
        file = directory / "kernel" / f"{path}.ko.xz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lzma.compress(signed(module(depends, path.encode()))))


def python_tree(tree: Path) -> None:
    """What a guest's packages would hold, borrowed from this host: Python, libraries, small programs."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/lib").mkdir()
    library = Path(os.__file__).parent
    shutil.copy(Path(sys.executable).resolve(), tree / "usr/bin" / version)
    (tree / "usr/bin/python3").symlink_to(version)
    target = tree / "usr/lib" / version
    code = (
        f"import sys, {_IMPORTED}; print(*(getattr(m, '__file__', None) or '' for m in sys.modules.values()))"
    )
    files = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    for path in map(Path, files.stdout.split()):
        if path.is_relative_to(library):
            copy = target / path.relative_to(library)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for package in ("test", "idlelib"):
        (target / package).mkdir()
        (target / package / "__init__.py").write_text("")
    (tree / "usr/lib/x86_64-linux-gnu").symlink_to(HOST_LIBRARIES)
    for program in ("crun", "busybox"):
        shutil.copy("/usr/bin/true", tree / "usr/bin" / program)


def agent_source(source: Path, body: str = "print('agent runs')") -> Path:
    """A checkout with an agent that does body in main()."""
    for package in ("agent", "rpc"):
        (source / package).mkdir(parents=True)
        (source / package / "__init__.py").write_text("")
    (source / "rpc/errors.py").write_text("WORD = 'from rpc'\n")
    (source / "agent/__main__.py").write_text(f"import json, sys, rpc.errors\n\ndef main():\n    {body}\n")
    return source
