"""Run in the bed by device_pods.py: what a device reads and writes for its guest, and what the IOMMU stops.

QEMU's edu copies between its buffer and whatever address it is told (docs/specs/edu in QEMU's source). Who
tells it here is a tenant who is root in a privileged container of his machine.
"""

import ctypes
import json
import mmap
import os
import struct
import subprocess
from typing import Any

from tests.testbed.inside import places
from tests.testbed.inside.given import ctr, until_free
from tests.testbed.inside.one_pod import timed

DEVICE = "edu0"
WORDS = "what the guest wrote"
SECRET = "what the host wrote"
BEYOND = 1 << 30  # of the guest's RAM
PAGE = 4096
TENANT = f"""\
import ctypes, glob, json, mmap, os, struct, sys, time
outside = int(sys.argv[1])
(at,) = [os.path.dirname(path) for path in glob.glob("/sys/bus/pci/devices/*/device")
         if open(path).read() == "0x11e8\\n"]
open(at + "/enable", "w").write("1")
config = os.open(at + "/config", os.O_RDWR)
(command,) = struct.unpack("<H", os.pread(config, 2, 4))
os.pwrite(config, struct.pack("<H", command | 6), 4)
registers = mmap.mmap(os.open(at + "/resource0", os.O_RDWR), 1 << 20)
def register(offset):
    return ctypes.c_uint64.from_buffer(registers, offset)
SOURCE, TARGET, COUNT, COMMAND = map(register, (0x80, 0x88, 0x90, 0x98))
BUFFER = 0x40000
page = mmap.mmap(-1, 4096)
page[:] = bytes(4096)
ctypes.CDLL(None).mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page))), 4096)
virtual = ctypes.addressof(ctypes.c_char.from_buffer(page))
with open("/proc/self/pagemap", "rb", 0) as pagemap:
    (entry,) = struct.unpack("<Q", os.pread(pagemap.fileno(), 8, virtual // 4096 * 8))
physical = (entry & (1 << 55) - 1) * 4096
def copy(source, target, command):
    SOURCE.value, TARGET.value, COUNT.value = source, target, 64
    COMMAND.value = command
    end = time.monotonic() + 60
    while COMMAND.value & 1 and time.monotonic() < end:
        time.sleep(0.01)
    return not COMMAND.value & 1
def words():
    return page[:64].rstrip(b"\\0").decode(errors="replace")
seen = {{"physical": physical}}
page[:64] = b"{WORDS}".ljust(64, b"\\0")
seen["read"] = copy(physical, BUFFER, 1)
page[:64] = bytes(64)
seen["written"] = copy(BUFFER, physical, 3)
seen["words"] = words()
seen["out"] = copy(BUFFER, outside, 3)
seen["in"] = copy(outside, BUFFER, 1)
copy(BUFFER, physical, 3)
seen["stolen"] = words()
print(json.dumps(seen))
"""


def faults() -> list[str]:
    """What the host's kernel says that the IOMMU stopped."""
    log = subprocess.run(["dmesg", "--notime"], capture_output=True, text=True, check=True).stdout
    return [line for line in log.splitlines() if "DMAR" in line and "fault addr" in line]


def page_of_the_hosts(memory: mmap.mmap) -> tuple[int, int]:
    """Of this process's memory a page with the secret, where the guest has no RAM: where it is there, and its
    physical address."""
    anchor = ctypes.c_char.from_buffer(memory)
    base = ctypes.addressof(anchor)
    del anchor
    with open("/proc/self/pagemap", "rb", 0) as pagemap:
        for offset in range(0, len(memory), PAGE):
            memory[offset : offset + len(SECRET)] = SECRET.encode()
            (entry,) = struct.unpack("<Q", os.pread(pagemap.fileno(), 8, (base + offset) // PAGE * 8))
            if (at := (entry & (1 << 55) - 1) * PAGE) >= BEYOND:
                if ctypes.CDLL(None).mlock(ctypes.c_void_p(base + offset), PAGE):
                    raise OSError("mlock")
                return offset, at
    raise AssertionError("all of this memory lies below the guest's")


def look() -> dict[str, Any]:
    address = places.addresses()[DEVICE]
    before = faults()
    with mmap.mmap(-1, 256 << 20) as memory:
        offset, outside = page_of_the_hosts(memory)
        command = ("python3", "-c", TENANT, str(outside))
        done = timed(ctr("dma", *command, wish=address, options=("--privileged",)))
        kept = memory[offset : offset + len(SECRET)].decode(errors="replace")
    seen = {
        "done": done,
        "address": address,
        "outside": outside,
        "kept": kept,
        "faults": faults()[len(before) :],
        "left": until_free((DEVICE,)),
    }
    if done["code"] == 0:
        seen["tenant"] = json.loads(str(done["out"]))
    return seen
