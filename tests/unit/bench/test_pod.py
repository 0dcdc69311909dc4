"""A pod's cost, read from its trace and from the kernel's counts."""

import json
import os
from pathlib import Path

import pytest

from bench.pod import memory_of, read_waterfall
from rpc.errors import FailedPrecondition
from shim import phases

SPANS = [
    ("start", 10.0, 10.1, "shim"),
    (phases.GUEST_BOOT, 10.5, 13.5, "shim"),
    ("kernel", 10.6, 12.0, "guest"),
    (phases.GUEST_SHARE, 13.5, 13.6, "shim"),
    (phases.GUEST_CREATE, 13.6, 13.9, "shim"),
    (phases.START_TASK, 14.0, 14.1, "shim"),
    (phases.DELETE, 14.5, 14.7, "shim"),
    (phases.DELETE, 14.7, 14.8, "shim"),
]


def test_the_guests_share_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    spans = [
        {"name": name, "start_s": start, "end_s": end, "where": where, "parent": None, "detail": ""}
        for name, start, end, where in SPANS
    ]
    path.write_text(json.dumps({"spans": spans}))
    waterfall = read_waterfall(path)
    assert waterfall.begin_s == 10.0
    assert waterfall.guest_boot_s == pytest.approx(3.0)
    # share 0.1, create 0.3, and 0.5 from the call to Start to the first call to Delete
    assert waterfall.guest_run_s == pytest.approx(0.9)


def test_a_kernel_that_counts_no_memory_is_told_of(tmp_path: Path) -> None:
    """As one without CONFIG_PROC_PAGE_MONITOR: nothing would weigh nothing."""
    for name in ("self", "17"):
        (tmp_path / name).mkdir()
    with pytest.raises(FailedPrecondition, match="CONFIG_PROC_PAGE_MONITOR"):
        memory_of([17], 256 << 20, procfs=tmp_path)


def test_memory_of_this_process_is_what_the_kernel_says() -> None:
    (memory,) = memory_of([os.getpid()], guest_memory_bytes=12345 << 30)
    assert 1 << 20 < memory.pss_bytes < 4 << 30
    assert memory.guest_ram_bytes == 0


def test_a_mapping_of_the_guests_size_is_guest_ram() -> None:
    size, touched = 64 << 20, 8 << 20
    fd = os.memfd_create("guest-ram")
    try:
        import mmap

        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as ram:
            ram.write(b"x" * touched)
            (memory,) = memory_of([os.getpid()], guest_memory_bytes=size)
    finally:
        os.close(fd)
    assert memory.guest_ram_bytes == touched
