"""Which version a program is: asked once, and again when its file changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition
from shim.vm import versions
from shim.vm.versions import check_qemu, version_text

Program = Callable[[str], str]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A program that notes each question and runs a line of shell."""

    def write(line: str) -> str:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\necho x >> {tmp_path}/asked\n{line}\n")
        path.chmod(0o755)
        return str(path)

    return write


def asked(tmp_path: Path) -> int:
    return (tmp_path / "asked").read_text().count("x")


def test_a_program_is_asked_once_while_it_stays_the_same(tmp_path: Path, program: Program) -> None:
    cache = tmp_path / "cache/version.json"
    path = program("echo version 1.2 $1")
    assert [version_text(path, cache) for _ in range(2)] == ["version 1.2 --version\n"] * 2
    assert asked(tmp_path) == 1
    assert version_text(program("echo version 1.30"), cache) == "version 1.30\n"
    assert asked(tmp_path) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 1, "text": 2}', "\x00"])
def test_a_cache_that_cannot_be_used_is_made_anew(tmp_path: Path, program: Program, text: str) -> None:
    cache = tmp_path / "version.json"
    cache.write_text(text)
    assert version_text(program("echo yes"), cache) == "yes\n"
    assert json.loads(cache.read_text())["text"] == "yes\n"
    (tmp_path / "file").touch()
    assert version_text(program("echo yes"), tmp_path / "file" / "version.json") == "yes\n"


def test_a_program_that_does_not_answer_says_nothing(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "ANSWER_S", 0.2)
    cache = tmp_path / "version.json"
    assert version_text(program("exec sleep 1000"), cache) == ""
    assert not cache.exists(), "it may answer the next time"


@pytest.mark.parametrize(
    ("said", "old"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", None),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", None),
        ("QEMU emulator version 7.1.0", "7.1"),
        ("QEMU emulator version 6.10.0", "6.10"),
        ("I am not telling", None),
    ],
)
def test_a_qemu_that_is_too_old_is_named_with_its_version(
    tmp_path: Path, program: Program, said: str, old: str | None
) -> None:
    path, cache = program(f"echo '{said}'"), tmp_path / "qemu.json"
    if old is None:
        check_qemu(path, cache)
        return
    with pytest.raises(FailedPrecondition, match=rf"QEMU {old} \({path}\) is too old: 7\.2 is the oldest"):
        check_qemu(path, cache)
