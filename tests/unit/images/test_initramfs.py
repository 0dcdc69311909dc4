"""The initramfs: the archive's format, and what is in it."""

import stat

from hypothesis import given
from hypothesis import strategies as st

from images.handover import Root
from images.initramfs import cpio, initramfs

ROOT = Root("/dev/vda", "erofs", ("/usr/bin/python3", "-I", "main.pyc"))


def unpack(archive: bytes) -> list[tuple[str, int, bytes]]:
    """A reader of the format, written from the kernel's documentation, not from our writer."""
    found: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name[-1] == 0
        at += -(-(110 + name_size) // 4) * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return found
        found.append((name[:-1].decode(), mode, archive[at : at + size]))
        at += -(-size // 4) * 4


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)


@given(st.lists(st.tuples(names.filter(lambda n: n != "TRAILER!!!"), st.integers(0, 0o177777), st.binary())))
def test_an_archive_holds_what_was_put_in(files: list[tuple[str, int, bytes]]) -> None:
    assert unpack(cpio(files)) == files


def test_the_initramfs_holds_init_and_the_modules_in_order() -> None:
    found = unpack(initramfs({"b.ko": b"B", "a.ko": b"A"}, ROOT))
    assert [name for name, _, _ in found] == ["init", "b.ko", "a.ko"]
    assert stat.S_ISREG(found[0][1])
    assert found[0][1] & 0o111
    assert found[0][2].startswith(b"\x7fELF")
    assert found[1][2] == b"B"
