"""A device as QEMU has it, in a few lines: opened through VFIO, memory mapped for its DMA, registers written.

By its character device and IOMMUFD, or by its group and VFIO's container. The numbers are of linux/vfio.h and
linux/iommufd.h. Must not know what the device does.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

CONFIG = 7
_COMMAND, _MEMORY_AND_MASTER = 0x04, 0x6
_TYPE = ord(";")
_BASE = _TYPE << 8 | 100
_SET_IOMMU, _GROUP_STATUS, _SET_CONTAINER, _DEVICE_FD = _BASE + 2, _BASE + 3, _BASE + 4, _BASE + 6
_REGION_INFO, _TYPE1_MAP = _BASE + 8, _BASE + 13
_BIND_IOMMUFD, _ATTACH = _BASE + 18, _BASE + 19
_IOAS_ALLOC, _IOAS_MAP = _TYPE << 8 | 0x81, _TYPE << 8 | 0x85
_TYPE1 = 3  # VFIO_TYPE1v2_IOMMU
_VIABLE = 1
_FIXED, _WRITABLE, _READABLE = 1, 2, 4


class Opened:
    """fd: of the device."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offsets: dict[int, int] = {}
        self.write(CONFIG, _COMMAND, struct.pack("<H", _MEMORY_AND_MASTER))

    def read(self, region: int, at: int, size: int) -> bytes:
        return os.pread(self._fd, size, self._offset(region) + at)

    def write(self, region: int, at: int, data: bytes) -> None:
        os.pwrite(self._fd, data, self._offset(region) + at)

    def size(self, region: int) -> int:
        return self._info(region)[0]

    def _offset(self, region: int) -> int:
        if region not in self._offsets:
            self._offsets[region] = self._info(region)[1]
        return self._offsets[region]

    def _info(self, region: int) -> tuple[int, int]:
        said = fcntl.ioctl(self._fd, _REGION_INFO, struct.pack("<IIIIQQ", 32, 0, region, 0, 0, 0))
        _, _, _, _, size, offset = struct.unpack("<IIIIQQ", said)
        return size, offset


@contextmanager
def by_cdev(path: str, memory: mmap.mmap, iova: int) -> Iterator[Opened]:
    with ExitStack() as stack:
        iommufd, device = _open(stack, "/dev/iommu"), _open(stack, path)
        fcntl.ioctl(device, _BIND_IOMMUFD, struct.pack("<IIiI", 16, 0, iommufd, 0))
        _, _, ioas = struct.unpack("<III", fcntl.ioctl(iommufd, _IOAS_ALLOC, struct.pack("<III", 12, 0, 0)))
        fcntl.ioctl(device, _ATTACH, struct.pack("<III", 12, 0, ioas))
        flags = _FIXED | _WRITABLE | _READABLE
        wanted = struct.pack("<IIIIQQQ", 40, flags, ioas, 0, _address(memory), len(memory), iova)
        fcntl.ioctl(iommufd, _IOAS_MAP, wanted)
        yield Opened(device)


@contextmanager
def by_group(path: str, address: str, memory: mmap.mmap, iova: int) -> Iterator[Opened]:
    """Raises PermissionError where the group is not viable."""
    with ExitStack() as stack:
        container, group = _open(stack, "/dev/vfio/vfio"), _open(stack, path)
        _, status = struct.unpack("<II", fcntl.ioctl(group, _GROUP_STATUS, struct.pack("<II", 8, 0)))
        if not status & _VIABLE:
            raise PermissionError(f"{path} is not viable")
        fcntl.ioctl(group, _SET_CONTAINER, struct.pack("<i", container))
        fcntl.ioctl(container, _SET_IOMMU, _TYPE1)
        wanted = struct.pack("<IIQQQ", 32, 3, _address(memory), iova, len(memory))
        fcntl.ioctl(container, _TYPE1_MAP, wanted)
        device = fcntl.ioctl(group, _DEVICE_FD, bytearray(address.encode() + b"\0"), True)
        stack.callback(os.close, device)
        yield Opened(device)


def _open(stack: ExitStack, path: str) -> int:
    fd = os.open(path, os.O_RDWR)
    stack.callback(os.close, fd)
    return fd


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
