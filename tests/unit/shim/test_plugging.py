"""Devices plugged into a restored machine: which can be, and its RAM in huge pages."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shim.vm.backing import STRICT, Backing, Cell
from shim.vm.blame import TemplateUnusable
from shim.vm.passthrough import Function
from shim.vm.plugging import as_json, fill_pages, from_json, hole_bytes, why_booted
from shim.vm.plugging import windows as room

MIB = 1 << 20
GIB = 1 << 30
GPU = Function("0000:3b:00.0", "an H100", "gpu", 12, "vfio0", 0, 0, bar_bytes=128 * GIB, ips=("10.0.0.2/24",))
OTHER = replace(GPU, address="0000:3c:00.0", port=1)
CELLS = (Cell(0, 64 * MIB), Cell(1, 64 * MIB))


@pytest.mark.parametrize(
    ("functions", "backing", "memory_bytes", "why"),
    [
        ((GPU,), None, 16 * GIB, ""),
        ((GPU, OTHER), Backing(2 * MIB, cells=CELLS[:1]), 128 * MIB, ""),
        ((GPU,), None, 16 * GIB + MIB, "more than 16 GiB"),
        ((GPU, OTHER), Backing(cells=CELLS), 128 * MIB, "several NUMA nodes"),
        ((GPU, replace(GPU, function=1, several=True)), None, 128 * MIB, "several functions"),
    ],
)
def test_why_a_machine_is_booted(
    functions: tuple[Function, ...], backing: Backing | None, memory_bytes: int, why: str
) -> None:
    said = why_booted(functions, backing, memory_bytes)
    assert why in said
    assert bool(said) == bool(why)


@pytest.mark.parametrize(
    ("high", "low", "windows"),
    [
        (0, 16 << 10, (2 * MIB, 2 * MIB)),
        (128 * GIB + 48 * MIB, 0, (2 * MIB, 256 * GIB)),
        (64 * MIB, 16 * MIB + (512 << 10), (32 * MIB, 64 * MIB)),
    ],
)
def test_a_port_has_room_for_the_largest_of_what_may_be_behind_it(
    high: int, low: int, windows: tuple[int, int]
) -> None:
    functions = (replace(GPU, bar_bytes=high, low_bytes=low), replace(OTHER, bar_bytes=1 * MIB))
    assert room(functions) == windows
    hole = hole_bytes(functions, 7)
    assert hole >= 7 * 2 * windows[1]
    assert hole & (hole - 1) == 0
    assert hole >= 32 * GIB


def test_another_process_is_told_the_same() -> None:
    backing = Backing(2 * MIB, "", (Cell(1, 128 * MIB, STRICT, (4, 5)),))
    for shape in (((GPU, OTHER), backing), ((GPU,), None)):
        assert from_json(json.loads(json.dumps(as_json(*shape)))) == shape


@contextmanager
def memory(name: str, size: int) -> Iterator[int]:
    """As a QEMU has its guest's RAM, here in ordinary pages: which of them makes no difference to it."""
    fd = os.memfd_create(name)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def template(path: Path, data: dict[int, bytes], size: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    for offset, content in data.items():
        os.pwrite(fd, content, offset)
    return fd


def test_a_templates_ram_is_copied_into_another_process(tmp_path: Path) -> None:
    size = 32 * MIB
    data = {0: b"first" * 1000, 9 * MIB + 4096: os.urandom(9 * MIB), size - 4096: b"x" * 4096}
    source = template(tmp_path / "ram", data, size)
    try:
        with memory("memory-backend-memfd", size) as fd:
            fill_pages(source, os.getpid(), size)
            with mmap.mmap(fd, size) as found:
                assert found[:] == os.pread(source, size, 0)
    finally:
        os.close(source)


@pytest.mark.parametrize("name", ["another", "memory-backend-memfd"])
def test_ram_that_is_elsewhere_is_not_written_to(tmp_path: Path, name: str) -> None:
    source = template(tmp_path / "ram", {0: b"data"}, 4 * MIB)
    try:
        with memory(name, 2 * MIB) as fd:
            with pytest.raises(TemplateUnusable, match="elsewhere"):
                fill_pages(source, os.getpid(), 4 * MIB)
            assert os.pread(fd, 4, 0) == b"\0\0\0\0"
    finally:
        os.close(source)


def test_a_template_of_another_size_is_refused(tmp_path: Path) -> None:
    source = template(tmp_path / "ram", {0: b"data"}, 4 * MIB)
    try:
        with memory("memory-backend-memfd", 2 * MIB), pytest.raises(OSError, match="expected 2097152"):
            fill_pages(source, os.getpid(), 2 * MIB)
    finally:
        os.close(source)
