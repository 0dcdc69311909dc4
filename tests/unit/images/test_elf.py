"""Shared libraries of ELF files, tried on this machine's own programs."""

import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.elf import is_elf, libraries, needed
from rpc.errors import FailedPrecondition
from tests.unit.images.fakes import HOST_LIBRARIES, elf

TRUE = Path("/usr/bin/true").read_bytes()


def test_a_program_needs_the_c_library() -> None:
    assert "libc.so.6" in needed(TRUE)
    assert is_elf(TRUE)
    assert not is_elf(b"#!/bin/sh")


def test_a_static_program_needs_nothing() -> None:
    assert needed(elf()) == []


def test_libraries_are_followed() -> None:
    found = libraries([Path(sys.executable).resolve(), Path("/usr/bin/true")], [HOST_LIBRARIES])
    assert {"libc.so.6", "ld-linux-x86-64.so.2"} <= set(found)
    assert all(path.exists() for path in found.values())


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"needs libc\.so\.6"):
        libraries([Path("/usr/bin/true")], [tmp_path])


@given(st.integers(4, len(TRUE) - 1), st.binary(max_size=40))
def test_a_damaged_file_is_an_error_or_is_read(at: int, noise: bytes) -> None:
    damaged = TRUE[:at] + noise + TRUE[at + len(noise) + 7 :]
    with suppress(FailedPrecondition):
        assert isinstance(needed(damaged), list)
