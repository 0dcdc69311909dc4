"""A root file system that is made of others: images of file systems, and the overlay that names them.

containerd's snapshotters of images (erofs, blockfile) send these, in the words of containerd's mount manager,
which makes them where a shim does not (containerd's docs/mounts.md; core/mount/manager). It must not know
what a container is.
"""

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rpc.api.types import Mount
from rpc.errors import InvalidArgument, Unavailable, Unimplemented

_FORMAT, _MKDIR = "format/", "mkdir/"
_MKDIR_OPTION = "X-containerd.mkdir.path="
_MKDIR_MODE = 0o700
_PLACE = re.compile(r"\{\{\s*(mount|source|overlay)\s+(\d+)(?:\s+(\d+))?\s*\}\}")

# loop(4), linux/loop.h. LOOP_CONFIGURE: Linux 5.8.
_CONTROL = "/dev/loop-control"
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_READ_ONLY, _AUTOCLEAR = 1, 4
_CONFIG = struct.Struct("=II5Q4I64s64s32s2Q8Q")
_ATTEMPTS = 100
"""To have a device before somebody else does, as containerd and losetup(8)."""


def is_made_of_parts(mount: Mount) -> bool:
    return mount.type.startswith((_FORMAT, _MKDIR))


def split(mounts: Sequence[Mount]) -> tuple[Sequence[Mount], Sequence[Mount]]:
    """(those that are only there to be named by others, those that are the root file system)."""
    last = max((at for at, mount in enumerate(mounts) if is_made_of_parts(mount)), default=0)
    return mounts[:last], mounts[last:]


def resolved(mount: Mount, parts: Sequence[Mount], places: Sequence[Path]) -> Mount:
    """The same with what containerd's prefixes of its type ask for done. places: where each of parts is.

    Makes directories that it asks for, in one of the places. Raises Unimplemented, InvalidArgument.
    """
    while is_made_of_parts(mount):
        if mount.type.startswith(_FORMAT):
            options = [_formatted(option, parts, places) for option in mount.options]
            source = _formatted(mount.source, parts, places)
            kind = mount.type.removeprefix(_FORMAT)
            mount = Mount(type=kind, source=source, target=mount.target, options=options)
        else:
            for option in mount.options:
                if option.startswith(_MKDIR_OPTION):
                    _make_directory(option.removeprefix(_MKDIR_OPTION), places)
            options = [option for option in mount.options if not option.startswith(_MKDIR_OPTION)]
            kind = mount.type.removeprefix(_MKDIR)
            mount = Mount(type=kind, source=mount.source, target=mount.target, options=options)
    return mount


def _formatted(text: str, parts: Sequence[Mount], places: Sequence[Path]) -> str:
    def value(match: re.Match[str]) -> str:
        kind, first = match[1], int(match[2])
        last = int(match[3]) if match[3] else first
        if max(first, last) >= len(places) or (match[3] is not None) != (kind == "overlay"):
            raise InvalidArgument(f"rootfs: {match[0]}: there are {len(places)} mounts before it")
        if kind == "source":
            return parts[first].source
        step = 1 if first <= last else -1
        return ":".join(str(places[at]) for at in range(first, last + step, step))

    filled = _PLACE.sub(value, text)
    if "{{" in filled:
        raise Unimplemented(f"rootfs: {text}: not known to this version")
    return filled


def _make_directory(asked: str, places: Sequence[Path]) -> None:
    """asked: PATH[:MODE[:UID:GID]]. Its parent is there; links, which an image may have, are not followed."""
    path, *more = asked.split(":")
    place = next((place for place in places if path.startswith(f"{place}/")), None)
    if place is None:
        raise Unimplemented(f"rootfs: {_MKDIR_OPTION}{asked}: no directory of a mount before it")
    try:
        mode = int(more[0], 8) if more else _MKDIR_MODE
        owner = (int(more[1]), int(more[2])) if len(more) == 3 else (os.getuid(), os.getgid())
        if len(more) not in (0, 1, 3) or not 0 <= mode <= 0o777:
            raise ValueError(asked)
    except ValueError as error:
        raise InvalidArgument(f"rootfs: {_MKDIR_OPTION}{asked}: PATH[:MODE[:UID:GID]]") from error
    steps = Path(path).relative_to(place).parts
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(place, flags)
    try:
        for number, step in enumerate(steps, start=1):
            if step == "..":
                raise InvalidArgument(f"rootfs: {_MKDIR_OPTION}{asked}: leads out of the mount")
            if number == len(steps):
                _make_if_missing(step, descriptor)
            below = os.open(step, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)
    except OSError as error:
        raise InvalidArgument(f"rootfs: {_MKDIR_OPTION}{asked}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _make_if_missing(name: str, parent: int) -> None:
    try:
        os.mkdir(name, _MKDIR_MODE, dir_fd=parent)
    except FileExistsError:
        return  # of an earlier life of the container; what is no directory fails to open


@contextmanager
def loop_device(image: str, *, read_only: bool) -> Iterator[str]:
    """The path of a device whose content is the file's. It is the kernel's to take back, once it is neither
    held here nor mounted: nothing of it is left however the shim ends.

    Raises OSError, Unavailable if others are always faster.
    """
    access = os.O_RDONLY if read_only else os.O_RDWR
    backing = os.open(image, access | os.O_CLOEXEC)
    try:
        device, path = _configured(backing, image, access, _AUTOCLEAR | (_READ_ONLY if read_only else 0))
    finally:
        os.close(backing)
    try:
        yield path
    finally:
        os.close(device)


def _configured(backing: int, image: str, access: int, flags: int) -> tuple[int, str]:
    """(a descriptor of the device, its path)."""
    nothing = (0,) * 8
    name = os.fsencode(image)[:63]
    config = _CONFIG.pack(backing, 0, *nothing[:5], 0, 0, 0, flags, name, b"", b"", *nothing[:2], *nothing)
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            path = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            device = os.open(path, access | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
                return device, path
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
    finally:
        os.close(control)
    raise Unavailable(f"rootfs: no loop device for {image}: others take them")
