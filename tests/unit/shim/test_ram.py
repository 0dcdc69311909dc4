"""RAM as a sparse file: what is data is copied to where it was, what is empty costs nothing."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.vm import ram
from shim.vm.ram import BLOCK_BYTES, copy_without_zeros, extents, fill, make_ram, ram_directory

MIB = 1 << 20
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@contextmanager
def ram_file(path: Path, size: int, data: dict[int, bytes] | None = None) -> Iterator[int]:
    """A descriptor of a file of this size with data at some offsets and holes elsewhere."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, size)
        for offset, content in (data or {}).items():
            os.pwrite(fd, content, offset)
        yield fd
    finally:
        os.close(fd)


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def scattered() -> dict[int, bytes]:
    """Runs of one block to two copies, at places a seed decides."""
    some = random.Random(7)  # noqa: S311 - the same each time
    sizes = (1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, ram.COPY_BYTES + BLOCK_BYTES, 2 * ram.COPY_BYTES)
    return {number * 20 * MIB + BLOCK_BYTES: some.randbytes(size) for number, size in enumerate(sizes)}


def test_the_copy_is_what_the_template_is_and_as_sparse(tmp_path: Path) -> None:
    data = scattered()
    with ram_file(tmp_path / "a", 128 * MIB, data) as source, ram_file(tmp_path / "b", 128 * MIB) as target:
        fill(source, target)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert allocated(target) <= allocated(source) + 16 * BLOCK_BYTES
        assert allocated(target) < 32 * MIB
        assert list(extents(target)) == list(extents(source))
        assert len(list(extents(target))) == len(data)


def test_data_at_the_very_ends_are_copied(tmp_path: Path) -> None:
    size = 8 * MIB
    edges = {0: b"first", size - 4: b"last"}
    with ram_file(tmp_path / "a", size, edges) as source, ram_file(tmp_path / "b", size) as target:
        fill(source, target)
        assert (os.pread(target, 5, 0), os.pread(target, 4, size - 4)) == (b"first", b"last")


@pytest.mark.parametrize("data", [{}, {0: b"x" * MIB}], ids=["empty", "full"])
def test_ram_without_holes_or_without_data(tmp_path: Path, data: dict[int, bytes]) -> None:
    with ram_file(tmp_path / "a", MIB, data) as source, ram_file(tmp_path / "b", MIB) as target:
        fill(source, target)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("size", [0, MIB - BLOCK_BYTES, 2 * MIB])
def test_ram_of_another_size_is_refused_before_anything_is_copied(tmp_path: Path, size: int) -> None:
    data = {0: b"x"} if size else {}
    with ram_file(tmp_path / "a", size, data) as source, ram_file(tmp_path / "b", MIB) as target:
        with pytest.raises(OSError, match=f"RAM has {size} bytes, expected {MIB}"):
            fill(source, target)
        assert list(extents(target)) == []


def test_a_template_that_ends_while_it_is_copied_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {0: b"x" * 4 * MIB}
    with ram_file(tmp_path / "a", 4 * MIB, data) as source, ram_file(tmp_path / "b", 4 * MIB) as target:
        monkeypatch.setattr(ram, "COPY_BYTES", MIB)
        send = os.sendfile

        def cut(to: int, of: int, offset: int, count: int) -> int:
            os.truncate(tmp_path / "a", 2 * MIB)
            return send(to, of, offset, count)

        monkeypatch.setattr(os, "sendfile", cut)
        with pytest.raises(OSError, match=f"RAM ended at {2 * MIB}, expected {4 * MIB}"):
            fill(source, target)


def test_a_disk_that_cannot_be_read_is_not_taken_for_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, how: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with open(__file__, "rb") as file:
        monkeypatch.setattr(os, "lseek", fail)
        with pytest.raises(OSError, match="Input/output error"):
            list(extents(file.fileno()))


def test_blocks_of_zeros_are_left_out(tmp_path: Path) -> None:
    """Memory that the guest wrote zeros to is data to the file system, and is not saved."""
    block = b"\1" * BLOCK_BYTES
    data = {0: bytes(4 * MIB), 4 * MIB: block, 4 * MIB + BLOCK_BYTES: bytes(MIB), 7 * MIB: b"\0" * 9 + b"\2"}
    with ram_file(tmp_path / "a", 8 * MIB, data) as source, ram_file(tmp_path / "b", 0) as target:
        assert copy_without_zeros(source, target) == 2 * BLOCK_BYTES
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert allocated(target) == 2 * BLOCK_BYTES


def test_what_is_scattered_is_saved_and_comes_back(tmp_path: Path) -> None:
    size = 128 * MIB
    with ram_file(tmp_path / "a", size, scattered()) as memory, ram_file(tmp_path / "b", 0) as saved:
        copy_without_zeros(memory, saved)
        with ram_file(tmp_path / "c", size) as restored:
            fill(saved, restored)
            assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_disk_that_takes_only_a_part_gets_the_rest_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing would not be noticed later: a template's digests are of what was written."""
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: written(fd, data[:5000], offset))
    content = random.Random(1).randbytes(MIB)  # noqa: S311 - the same each time
    with ram_file(tmp_path / "b", 0) as target:
        (tmp_path / "a").write_bytes(content)
        with open(tmp_path / "a", "rb") as source:
            assert copy_without_zeros(source.fileno(), target) == MIB
        assert (tmp_path / "b").read_bytes() == content


@root
def test_rams_directory_takes_one_guests_ram_and_is_gone_with_it(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with ram_directory(path, MIB + ram.SLACK_BYTES):
        file = path / "libvirt/qemu/vm/pc.ram"
        fd = make_ram(file, MIB, 1234)
        assert (file.stat().st_uid, file.stat().st_mode & 0o777, file.stat().st_size) == (1234, 0o600, MIB)
        assert os.pwrite(fd, b"x" * MIB, 0) == MIB
        with open(file, "ab") as more, pytest.raises(OSError, match="No space left"):
            more.write(bytes(2 * MIB))
            more.flush()
        os.close(fd)
    assert not path.exists()
    assert str(path) not in Path("/proc/self/mounts").read_text()


@root
def test_what_libvirt_made_of_rams_directory_before_us_goes_with_it(tmp_path: Path) -> None:
    """It makes them when it is opened, which may be a moment before or after."""
    path = tmp_path / "ram"
    (path / "libvirt/qemu").mkdir(parents=True)
    with ram_directory(path, MIB + ram.SLACK_BYTES):
        assert os.listdir(path) == []
    assert not path.exists()


@root
def test_rams_directory_is_gone_after_a_failure_too(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with pytest.raises(ZeroDivisionError), ram_directory(path, MIB), open(path / "held", "wb"):
        raise ZeroDivisionError
    assert not path.exists()


def test_ram_that_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    file = tmp_path / "qemu" / "pc.ram"
    os.close(make_ram(file, MIB, os.getuid()))
    with pytest.raises(FileExistsError):
        make_ram(file, MIB, os.getuid())
    assert len(os.listdir("/proc/self/fd")) == before
