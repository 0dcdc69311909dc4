"""What a guest's first program does in which order, from an initramfs and from the root itself."""

import pytest

from images.handover import BOOT_MARKS_VARIABLE, MOUNTS, Root, from_initramfs, from_root
from images.initprogram import Call, Step, Strings

ROOT = Root("/dev/vda", "erofs", ("/usr/bin/python3", "-I", "main.pyc"))
BOTH = pytest.mark.parametrize("plan", [from_initramfs(["/a.ko"], ROOT), from_root(ROOT)])


def test_init_loads_modules_before_it_mounts_the_root_and_then_becomes_the_program() -> None:
    plan = from_initramfs(["/b.ko", "/a.ko"], ROOT)
    opened = [s.arguments[0] for s in plan if s.call is Call.OPEN]
    assert opened[:2] == ["/b.ko", "/a.ko"]
    last_module = max(i for i, s in enumerate(plan) if s.call is Call.FINIT_MODULE)
    root = next(i for i, s in enumerate(plan) if s.call is Call.MOUNT and s.arguments[0] == "/dev/vda")
    assert last_module < root
    program, arguments, environment = plan[-1].arguments
    assert plan[-1].call is Call.EXECVE
    assert (program, arguments) == ("/usr/bin/python3", Strings(ROOT.program))
    assert isinstance(environment, Strings)
    assert f"{BOOT_MARKS_VARIABLE}=3" in environment.values


def test_the_root_is_mounted_read_only() -> None:
    (mount,) = [s for s in from_initramfs([], ROOT) if s.call is Call.MOUNT and s.arguments[0] == "/dev/vda"]
    assert mount.arguments[2:4] == ("erofs", 1)


def test_every_file_system_of_the_agent_is_mounted_after_the_root_is_entered() -> None:
    plan = from_initramfs([], ROOT)
    entered = next(i for i, s in enumerate(plan) if s.call is Call.CHROOT)
    targets = [s.arguments[1] for s in plan[entered:] if s.call is Call.MOUNT]
    assert targets == [mount[1] for mount in MOUNTS]


def test_what_must_not_fail_has_a_complaint() -> None:
    must = {Call.FINIT_MODULE, Call.CHROOT, Call.EXECVE}
    plan = from_initramfs(["/a.ko"], ROOT)
    assert all(step.complaint for step in plan if step.call in must)
    mounts = [step for step in plan if step.call is Call.MOUNT and not step.complaint]
    assert [step.arguments[0] for step in mounts] == [
        "sysfs"
    ]  # for reading ahead; the agent mounts it if need be


def test_reading_ahead_never_ends_the_boot() -> None:
    root = Root("/dev/vda", "erofs", ("/init",), ("/big", "/bigger"))
    plan = from_initramfs([], root)
    ahead = [step for step in plan if step.call is Call.READAHEAD]
    assert len(ahead) == 2
    opened = {step.arguments[0]: step.complaint for step in plan if step.call is Call.OPEN}
    assert opened["/root/big"] == opened["/root/bigger"] == ""
    assert opened["/root/sys/block/vda/queue/read_ahead_kb"] == ""


def test_from_the_root_nothing_is_loaded_and_no_root_is_changed() -> None:
    plan = from_root(ROOT)
    assert {step.call for step in plan}.isdisjoint({Call.FINIT_MODULE, Call.CHROOT, Call.UNLINK})
    assert [s.arguments[1] for s in plan if s.call is Call.MOUNT] == ["/sys", *(mount[1] for mount in MOUNTS)]


def test_from_the_root_files_are_read_ahead_where_they_are() -> None:
    plan = from_root(Root("/dev/vda", "erofs", ("/init",), ("/big",)))
    opened = [step.arguments[0] for step in plan if step.call is Call.OPEN]
    assert opened == ["/sys/block/vda/queue/read_ahead_kb", "/big"]


@BOTH
def test_the_marks_are_three_in_the_file_that_the_program_is_told_of(plan: list[Step]) -> None:
    assert plan[0].call is Call.MEMFD_CREATE  # the first file that is opened: its number is 3
    written = [step.arguments[0] for step in plan if step.call is Call.WRITE and step.arguments[2] == 16]
    assert written == [3, 3, 3]
    environment = plan[-1].arguments[2]
    assert isinstance(environment, Strings)
    assert f"{BOOT_MARKS_VARIABLE}=3" in environment.values
