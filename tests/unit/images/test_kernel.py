"""The ELF kernel inside a bzImage: every compression, and everything that can be wrong with it."""

import subprocess
from pathlib import Path
from struct import unpack_from

import pytest

from images.kernel import compact, find_kernel, vmlinux
from rpc.errors import FailedPrecondition
from tests.unit.images.fakes import PVH_NOTE, RELEASE, bzimage, compressed, elf, kernel_tree


def loaded(image: bytes) -> dict[int, bytes]:
    """physical address -> content as a loader would place it, zeros included."""
    phoff, count = unpack_from("<Q", image, 32)[0], unpack_from("<H", image, 56)[0]
    memory = {}
    for at in range(phoff, phoff + count * 56, 56):
        kind, _, offset, _, address, file_size, size, _ = unpack_from("<IIQQQQQQ", image, at)
        content = image[offset : offset + file_size]
        assert len(content) == file_size
        memory[address if kind == 1 else -kind] = content + bytes(size - file_size)
    return memory


@pytest.mark.parametrize("how", ["none", "xz", "gzip"])
def test_the_kernel_is_found_whatever_it_is_compressed_with(how: str) -> None:
    found = vmlinux(bzimage(compressed(elf(), how)))
    assert loaded(found) == loaded(elf())
    assert len(found) < len(elf())


def test_a_kernel_that_was_never_packed_is_taken_as_it_is() -> None:
    assert vmlinux(elf()) == compact(compact(elf())) == vmlinux(bzimage(compressed(elf(), "gzip")))


def test_a_kernel_compressed_with_zstd(tmp_path: Path) -> None:
    raw = elf(text=bytes(range(256)) * 40)
    payload = subprocess.run(["zstd", "-qc"], input=raw, capture_output=True, check=True).stdout
    assert loaded(vmlinux(bzimage(payload + len(raw).to_bytes(4, "little")))) == loaded(raw)


def test_the_entry_note_stays_where_the_headers_say() -> None:
    assert loaded(compact(elf()))[-4] == PVH_NOTE


def test_a_kernel_without_a_pvh_entry_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="PVH"):
        compact(elf(note=PVH_NOTE.replace(b"Xen", b"GNU")))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"\0" * 4096, "not a bzImage"),
        (b"", "not a bzImage"),
        (bzimage(compressed(elf(), "xz"))[:1700], "truncated"),
        (bzimage(b""), "truncated"),
        (bzimage(b"\x89LZO-something"), "compression is unknown"),
        (bzimage(b"\x7fELF" + b"\x01" * 200), "not a 64-bit ELF"),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes, says: str) -> None:
    with pytest.raises(FailedPrecondition, match=says):
        vmlinux(image)


def test_a_damaged_payload_is_refused() -> None:
    for how in ("xz", "gzip"):
        payload = compressed(elf(), how)
        with pytest.raises(FailedPrecondition):
            vmlinux(bzimage(payload[: len(payload) // 2]))


def test_the_kernel_of_a_tree(tmp_path: Path) -> None:
    kernel_tree(tmp_path, {})
    kernel = find_kernel(tmp_path)
    assert kernel.release == RELEASE
    assert kernel.modules.is_dir()


def test_a_tree_must_have_one_kernel(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    with pytest.raises(FailedPrecondition, match="found 0"):
        find_kernel(tmp_path)
    for name in ("vmlinuz-1", "vmlinux-2"):
        (tmp_path / "boot" / name).touch()
    with pytest.raises(FailedPrecondition, match="found 2"):
        find_kernel(tmp_path)
