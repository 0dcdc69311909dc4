"""The initramfs: an archive with /init, which images/handover.py plans, and the modules that it loads.

Must not know where modules come from.
"""

import stat
from collections.abc import Iterable, Mapping

from images.handover import Root, from_initramfs
from images.initprogram import build


def initramfs(modules: Mapping[str, bytes], root: Root) -> bytes:
    """The initramfs as an uncompressed cpio archive; modules: file name -> content, in load order."""
    paths = [f"/{name}" for name in modules]
    files = [("init", stat.S_IFREG | 0o755, build(from_initramfs(paths, root)))]
    files += [(name, stat.S_IFREG | 0o644, content) for name, content in modules.items()]
    return cpio(files)


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the kernel's format (Documentation/driver-api/early-userspace/buffer-format.rst).

    files: (path, st_mode, content). No times, no owners: the same files are the same bytes.
    """
    archive = bytearray()
    for number, (path, mode, content) in enumerate([*files, ("TRAILER!!!", 0, b"")], start=1):
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
