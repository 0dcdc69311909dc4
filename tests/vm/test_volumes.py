"""A volume is what the host gave, and no more: whatever the guest's root and kernel do to it."""

import subprocess
from pathlib import Path

from shim import system
from tests.vm.pods import Pods

# Stands for a guest whose kernel is the tenant's: what its container may not, its root may.
ADMIN = ("--cap-add", "CAP_SYS_ADMIN")
REMOUNT = """\
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
MS_REMOUNT, MS_BIND = 0x20, 0x1000
for place in sys.argv[1:]:
    libc.mount(b"none", place.encode(), None, ctypes.c_ulong(MS_REMOUNT | MS_BIND), None)
    try:
        open(place + "/by-guest", "w")
        print(place, "was written")
    except OSError as error:
        print(place, error.strerror)
"""


def mount(source: Path, target: str, options: str) -> tuple[str, str]:
    return "--mount", f"type=bind,src={source},dst={target},options={options}"


def test_a_read_only_volume_stays_so_when_the_guest_mounts_it_again(pods: Pods) -> None:
    work = pods.ctr.instance.work / "sealed"
    for name in ("ro", "rro"):
        (work / name).mkdir(parents=True)
    options = (*ADMIN, *mount(work / "ro", "/ro", "rbind:ro"), *mount(work / "rro", "/rro", "rbind:rro"))
    result = pods.run("python3", "-c", REMOUNT, "/ro", "/rro", options=options).ok()
    assert "written" not in result.out
    assert list(work.glob("*/by-guest")) == []


def test_what_the_host_mounts_later_below_a_volume_stays_on_the_host(pods: Pods) -> None:
    work = pods.ctr.instance.work / "later"
    (work / "late").mkdir(parents=True)
    late = str(work / "late")
    with pods.detached("sleep", "1000", options=mount(work, "/volume", "rbind:ro:rprivate")) as name:
        subprocess.run(["mount", "-t", "tmpfs", "late", late], check=True)
        try:
            (work / "late" / "secret").write_text("of another pod")
            assert pods.exec(name, "ls", "/volume/late").ok().out == ""
        finally:
            system.umount(late)  # not detached: a guest must not be able to keep it busy


def test_a_volume_honours_no_setuid_bit_and_no_device_on_the_host(pods: Pods) -> None:
    work = pods.ctr.instance.work / "sealed-flags"
    work.mkdir()
    with pods.detached("sleep", "1000", options=mount(work, "/volume", "rbind:rw")) as name:
        pid = pods.state(name)["virtiofsd_pid"]
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        served = [line.split() for line in lines if f"/{name}/" in line.split()[4]]
        assert len(served) == 2, "the root file system and the volume"
        for fields in served:
            assert {"nosuid", "nodev"} <= set(fields[5].split(",")), fields
