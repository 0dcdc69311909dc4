"""What is wrong with a command is found out before it is executed, in runc's words."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import executables
from agent.executables import Command, User
from agent.ids import Ids
from rpc.errors import CasemateError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied

HERE = Path("/proc/self/exe").resolve()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A container's root with a copy of nothing: programs are headers of ELF files."""
    for name in ("bin", "etc", "lib", "work"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def root_fd(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def put(root: Path, name: str, content: bytes, mode: int = 0o755) -> None:
    (root / name).write_bytes(content)
    (root / name).chmod(mode)


def program(interpreter: str = "", machine: int = 62) -> bytes:
    """A 64-bit ELF file with at most one program header."""
    path = interpreter.encode() + b"\0"
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + (2).to_bytes(2, "little") + machine.to_bytes(2, "little")
    header += (1).to_bytes(4, "little") + bytes(8) + (64).to_bytes(8, "little") + bytes(8 + 4)
    header += (64).to_bytes(2, "little") + (56).to_bytes(2, "little")
    header += (1 if interpreter else 0).to_bytes(2, "little") + bytes(6)
    entry = (3).to_bytes(4, "little") + bytes(4) + (120).to_bytes(8, "little") + bytes(16)
    entry += len(path).to_bytes(8, "little") + bytes(16)
    return header + entry + path


NATIVE = {"x86_64": 62, "aarch64": 183}[os.uname().machine]
FOREIGN, FOREIGN_NAME = (183, "aarch64") if NATIVE == 62 else (62, "x86_64")


def test_program_in_the_path_is_found(root: Path, root_fd: int) -> None:
    put(root, "bin/tool", program(machine=NATIVE))
    command = Command("tool", path="/usr/bin:/bin")
    assert executables.find(root_fd, command) == "/bin/tool"
    executables.check(root_fd, command)


def test_first_executable_in_the_path_wins(root: Path, root_fd: int) -> None:
    put(root, "etc/tool", b"", 0o644)
    put(root, "lib/tool", program(machine=NATIVE))
    put(root, "bin/tool", program(machine=NATIVE))
    assert executables.find(root_fd, Command("tool", path="/etc:/lib:/bin")) == "/lib/tool"


def test_relative_command_starts_at_the_working_directory(root: Path, root_fd: int) -> None:
    put(root, "work/tool", program(machine=NATIVE))
    assert executables.find(root_fd, Command("./tool", cwd="/work")) == "/work/./tool"


def test_symbolic_links_stay_inside_the_root(root: Path, root_fd: int) -> None:
    put(root, "lib/real", program(machine=NATIVE))
    (root / "bin/absolute").symlink_to("/lib/real")
    (root / "bin/escape").symlink_to(f"../../../../../..{HERE}")
    executables.check(root_fd, Command("absolute", path="/bin"))
    with pytest.raises(NotFound):
        executables.check(root_fd, Command("escape", path="/bin"))


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        (Command("nosuch", path="/bin"), NotFound, 'exec: "nosuch": executable file not found in $PATH'),
        (
            Command("/bin/nosuch"),
            NotFound,
            'exec: "/bin/nosuch": stat /bin/nosuch: no such file or directory',
        ),
        (Command("/etc/text"), PermissionDenied, 'exec: "/etc/text": permission denied'),
        (Command("text", path="/bin:/etc"), PermissionDenied, 'exec: "text": permission denied'),
        (Command("/etc"), PermissionDenied, 'exec: "/etc": is a directory'),
        (Command("/etc/text/x"), PermissionDenied, 'exec: "/etc/text/x": not a directory'),
    ],
)
def test_missing_and_refused_files_are_told_as_runc_does(
    root: Path, root_fd: int, command: Command, error: type[CasemateError], words: str
) -> None:
    put(root, "etc/text", b"text", 0o644)
    with pytest.raises(error) as caught:
        executables.check(root_fd, command)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (
            program(machine=FOREIGN),
            FailedPrecondition,
            f"exec /bin/x: built for {FOREIGN_NAME}, this machine",
        ),
        (program("/lib/ld.so", NATIVE), NotFound, "exec /bin/x: its interpreter /lib/ld.so: no such file"),
        (b"#!/bin/nosuch -x\necho", NotFound, "exec /bin/x: its interpreter /bin/nosuch: no such file"),
        (b"#!\n", FailedPrecondition, "exec /bin/x: exec format error"),
        (b"echo hello", FailedPrecondition, "exec /bin/x: exec format error"),
        (b"", FailedPrecondition, "exec /bin/x: exec format error"),
        (b"\x7fELF", FailedPrecondition, "exec /bin/x: exec format error"),
    ],
    ids=["machine", "linker", "script", "empty script line", "text", "empty", "cut"],
)
def test_files_that_the_kernel_would_refuse(
    root: Path, root_fd: int, content: bytes, error: type[CasemateError], words: str
) -> None:
    put(root, "bin/x", content)
    with pytest.raises(error) as caught:
        executables.check(root_fd, Command("x", path="/bin"))
    assert words in str(caught.value)


def test_script_and_program_whose_interpreters_exist_are_fine(root: Path, root_fd: int) -> None:
    put(root, "lib/ld.so", program(machine=NATIVE))
    put(root, "bin/program", program("/lib/ld.so", NATIVE))
    put(root, "bin/script", b"#! /bin/program -x\n")
    executables.check(root_fd, Command("program", path="/bin"))
    executables.check(root_fd, Command("script", path="/bin"))


@pytest.mark.parametrize(
    ("user", "mode", "allowed"),
    [
        (User(), 0o100, True),
        (User(), 0o001, True),
        (User(), 0o644, False),
        (User(7, [8]), 0o700, False),
        (User(7, [8]), 0o701, True),
        (User(7, [os.getgid()]), 0o710, True),
        (User(7, [os.getgid()]), 0o701, False),
        (User(os.getuid() or 7, []), 0o611, bool(not os.getuid())),
    ],
)
def test_mode_bits_count_for_the_user(root: Path, root_fd: int, user: User, mode: int, allowed: bool) -> None:
    put(root, "bin/x", program(machine=NATIVE), mode)
    command = Command("x", path="/bin", user=user)
    if allowed:
        assert executables.find(root_fd, command) == "/bin/x"
    else:
        with pytest.raises(PermissionDenied):
            executables.find(root_fd, command)


def test_command_is_read_from_an_oci_process() -> None:
    command = Command.of(
        {
            "args": ["tool", "argument"],
            "cwd": "/work",
            "env": ["A=b", "PATH=/first", "PATH=/last"],
            "user": {"uid": 5, "gid": 6, "additionalGids": [7]},
        }
    )
    assert (command.name, command.cwd, command.path) == ("tool", "/work", "/last")
    assert (command.user.uid, list(command.user.gids)) == (5, [6, 7])


def test_command_without_environment_has_the_usual_path() -> None:
    assert Command.of({"args": ["x"]}).path == executables.DEFAULT_PATH


@pytest.mark.parametrize("process", [{}, {"args": None}, {"args": []}, {"args": [""]}, {"args": "sh"}])
def test_process_without_arguments_is_invalid(process: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="no arguments"):
        executables.check_arguments(process)


MAPPED = Ids([(0, 100000, 65536)], [(0, 200000, 65536)])


@pytest.mark.parametrize(
    ("user", "owner", "mode", "allowed"),
    [
        (User(0, [0], MAPPED), (100000, 200000), 0o700, True),
        (User(0, [0], MAPPED), (0, 0), 0o700, False),  # root has no privilege over what has no place there
        (User(0, [0], MAPPED), (0, 0), 0o701, True),
        (User(7, [8], MAPPED), (100007, 200000), 0o100, True),
        (User(7, [8], MAPPED), (100000, 200008), 0o010, True),
        (User(7, [8], MAPPED), (7, 8), 0o110, False),
    ],
)
def test_who_may_execute_goes_by_the_ids_inside(
    user: User, owner: tuple[int, int], mode: int, allowed: bool
) -> None:
    uid, gid = owner
    status = os.stat_result((stat.S_IFREG | mode, 0, 0, 1, uid, gid, 0, 0, 0, 0))
    assert user.may_execute(status) is allowed
