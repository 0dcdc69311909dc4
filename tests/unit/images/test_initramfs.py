"""The initramfs: the archive's format, and what /init does in which order."""

import stat

from hypothesis import given
from hypothesis import strategies as st

from images.initprogram import Call, Strings
from images.initramfs import BOOT_MARKS_VARIABLE, MOUNTS, Root, cpio, initramfs, steps

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


def test_init_loads_modules_before_it_mounts_the_root_and_then_becomes_the_program() -> None:
    plan = steps(["/b.ko", "/a.ko"], ROOT)
    opened = [s.arguments[0] for s in plan if s.call is Call.OPEN]
    assert opened[:3] == ["/marks", "/b.ko", "/a.ko"]
    last_module = max(i for i, s in enumerate(plan) if s.call is Call.FINIT_MODULE)
    root = next(i for i, s in enumerate(plan) if s.call is Call.MOUNT and s.arguments[0] == "/dev/vda")
    assert last_module < root
    program, arguments, environment = plan[-1].arguments
    assert plan[-1].call is Call.EXECVE
    assert (program, arguments) == ("/usr/bin/python3", Strings(ROOT.program))
    assert isinstance(environment, Strings)
    assert f"{BOOT_MARKS_VARIABLE}=3" in environment.values


def test_the_root_is_mounted_read_only() -> None:
    (mount,) = [s for s in steps([], ROOT) if s.call is Call.MOUNT and s.arguments[0] == "/dev/vda"]
    assert mount.arguments[2:4] == ("erofs", 1)


def test_every_file_system_of_the_agent_is_mounted_after_the_root_is_entered() -> None:
    plan = steps([], ROOT)
    entered = next(i for i, s in enumerate(plan) if s.call is Call.CHROOT)
    targets = [s.arguments[1] for s in plan[entered:] if s.call is Call.MOUNT]
    assert targets == [mount[1] for mount in MOUNTS]


def test_what_must_not_fail_has_a_complaint() -> None:
    must = {Call.FINIT_MODULE, Call.CHROOT, Call.EXECVE}
    plan = steps(["/a.ko"], ROOT)
    assert all(step.complaint for step in plan if step.call in must)
    mounts = [step for step in plan if step.call is Call.MOUNT and not step.complaint]
    assert [step.arguments[0] for step in mounts] == [
        "sysfs"
    ]  # for reading ahead; the agent mounts it if need be


def test_reading_ahead_never_ends_the_boot() -> None:
    root = Root("/dev/vda", "erofs", ("/init",), ("/big", "/bigger"))
    plan = steps([], root)
    ahead = [step for step in plan if step.call is Call.READAHEAD]
    assert len(ahead) == 2
    opened = {step.arguments[0]: step.complaint for step in plan if step.call is Call.OPEN}
    assert opened["/root/big"] == opened["/root/bigger"] == ""
    assert opened["/root/sys/block/vda/queue/read_ahead_kb"] == ""
