"""Whether this host can run guests on KVM: asked of the kernel, not assumed.

A /dev/kvm that opens may still run no guest (a cloud's VM without nested virtualisation, a paravirtual
KVM that takes no stock kernel). It must not know what a pod is.
"""

import fcntl
import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import FailedPrecondition
from shim.trace import write_json

KVM_API_VERSION = 12
_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_CREATE_VCPU = 0xAE41
_RUN = 0xAE80
_SET_USER_MEMORY_REGION = 0x4020AE46
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_SET_REGS = 0x4090AE82
_EXIT_HLT = 5
_SREGS_BYTES = 312


@dataclass(frozen=True, slots=True)
class Acceleration:
    """kind is "kvm" or "tcg"; reason says how it is known, for a person."""

    kind: str
    reason: str


def choose(wanted: str, cache: Path | None = None) -> Acceleration:
    """What `accel = auto | kvm | tcg` comes to here. FailedPrecondition if kvm is demanded and absent."""
    if wanted == "tcg":
        return Acceleration("tcg", "accel = tcg in the configuration")
    found = probe(cache)
    if wanted == "kvm" and found.kind != "kvm":
        raise FailedPrecondition(
            "accel = kvm, but this host has no usable KVM",
            details=found.reason,
            hint="enable virtualisation in the firmware or the outer hypervisor, or set accel = auto",
        )
    return found


def probe(cache: Path | None = None) -> Acceleration:
    """Under 5 ms; with a cache file nearly nothing, for as long as this boot and /dev/kvm stay the same."""
    key = _cache_key()
    if cache is not None:
        try:
            stored = json.loads(cache.read_text())
            if stored["key"] == key:
                return Acceleration(stored["kind"], stored["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no cache is the ordinary case; a bad one is written anew below
    found = _probe()
    if cache is not None:
        try:
            cache.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            write_json(cache, {"key": key, "kind": found.kind, "reason": found.reason})
        except OSError:
            pass  # it costs the next pod a probe, nothing else
    return found


def _cache_key() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        status = os.stat("/dev/kvm")
    except OSError:
        return boot
    return f"{boot} {status.st_rdev} {status.st_ctime_ns} {status.st_ino}"


def _probe() -> Acceleration:
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Acceleration("tcg", f"/dev/kvm: {error.strerror}")
    try:
        version = fcntl.ioctl(kvm, _GET_API_VERSION, 0)
        if version != KVM_API_VERSION:
            return Acceleration("tcg", f"/dev/kvm speaks API {version}, not {KVM_API_VERSION}")
        flag = _cpu_flag()
        if flag is None:
            return Acceleration("tcg", "/dev/kvm opens, but the CPU has neither vmx nor svm")
        outcome = _run_hlt(kvm)
    except OSError as error:
        return Acceleration("tcg", f"/dev/kvm opens, but runs no guest: {error.strerror}")
    finally:
        os.close(kvm)
    if outcome != _EXIT_HLT:
        return Acceleration("tcg", f"/dev/kvm opens, but a one-instruction guest ended with exit {outcome}")
    return Acceleration("kvm", f"/dev/kvm ran a guest ({flag})")


def _cpu_flag() -> str | None:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("flags"):
                flags = line.split()
                return next((flag for flag in ("vmx", "svm") if flag in flags), None)
    return None


def _run_hlt(kvm: int) -> int:
    """The exit reason of a real-mode guest whose one instruction is HLT (linux/kvm.h, struct kvm_run)."""
    descriptors: list[int] = []
    page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    try:
        page[0] = 0xF4
        vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
        descriptors.append(vm)
        address = _address_of(page)
        fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0x1000, mmap.PAGESIZE, address))
        vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
        descriptors.append(vcpu)
        sregs = bytearray(_SREGS_BYTES)
        fcntl.ioctl(vcpu, _GET_SREGS, sregs)
        sregs[0:8] = bytes(8)  # cs.base
        sregs[12:14] = bytes(2)  # cs.selector
        fcntl.ioctl(vcpu, _SET_SREGS, bytes(sregs))
        rip, rflags = 0x1000, 0x2
        fcntl.ioctl(vcpu, _SET_REGS, struct.pack("=18Q", *[0] * 16, rip, rflags))
        with mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0), mmap.MAP_SHARED) as run:
            fcntl.ioctl(vcpu, _RUN, 0)
            return int(struct.unpack_from("=I", run, 8)[0])
    finally:
        for fd in reversed(descriptors):
            os.close(fd)
        page.close()


def _address_of(page: mmap.mmap) -> int:
    """The export ends with this call: a page that is still exported cannot be closed."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(page))
