"""The file server is started as each of its two kinds wants it, with the socket and nothing else of ours."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rpc.errors import Unavailable
from shim.vm import open_files, virtiofsd
from tests.unit.rpc.wires import run, until

C = "virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
RUST = "virtiofsd 1.13.0"
Program = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A virtiofsd that says its version, or else what it was given; then takes one connection."""

    def write(version: str) -> Path:
        path = tmp_path / "virtiofsd"
        path.write_text(
            f"""#!/usr/bin/python3 -ISE
import os, socket, sys
if sys.argv[1:] == ["--version"]:
    with open("{tmp_path}/asked", "a") as file:
        file.write("x")
    print("{version}")
    raise SystemExit
print(*sys.argv[1:], sep="\\n", flush=True)
with socket.socket(fileno=3) as listener:
    connection, _ = listener.accept()
    print("connected", connection.recv(10).decode(), flush=True)
"""
        )
        path.chmod(0o755)
        return path

    return write


@pytest.mark.parametrize("own_files", [True, False])
@pytest.mark.parametrize(("version", "is_c"), [(C, True), (RUST, False)])
def test_each_kind_is_given_its_own_options(
    tmp_path: Path, program: Program, version: str, is_c: bool, own_files: bool
) -> None:
    async def life() -> None:
        path, log, address = program(version), tmp_path / "log", tmp_path / "share.sock"
        files = virtiofsd.start(
            str(path),
            tmp_path / "served",
            address,
            log,
            os.getuid(),
            tmp_path / "cache.json",
            131072,
            own_files=own_files,
        )
        assert stat.S_IMODE(address.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.connect(str(address))
            qemu.sendall(b"hello")
            await files.exited.wait()
        assert files.status == 0, files.words()
        *arguments, said = log.read_text().splitlines()
        assert said == "connected hello"
        assert arguments[0] == "--fd=3"
        wanted = f"source={tmp_path}/served" if is_c else f"--shared-dir={tmp_path}/served"
        assert wanted in arguments
        assert ("sandbox=namespace" if is_c else "--sandbox=namespace") in arguments
        assert ("announce_submounts" if is_c else "--announce-submounts") in arguments
        kept = {"cache=always", "timeout=1"} if own_files else {"cache=auto"}
        assert {word for word in arguments if "cache" in word or "timeout" in word} == (
            kept if is_c else {"--cache=auto"}
        )
        assert any("thread-pool" in argument for argument in arguments) is not is_c
        assert "--rlimit-nofile=131072" in arguments

    run(life())


def test_no_more_files_are_asked_for_than_may_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Rust virtiofsd does not start where it may not raise its limit."""

    def refuse(_: int, __: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 20000))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert open_files.allowed(131072) == 20000
    assert open_files.allowed(4096) == 4096
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert open_files.allowed(131072) == 131072
    assert raised == [(1024, 131072)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    assert open_files.allowed(131072) == 131072


def test_its_kind_is_asked_once_and_again_when_the_program_changes(tmp_path: Path, program: Program) -> None:
    cache = tmp_path / "cache" / "virtiofsd.json"
    path = str(program(C))
    assert virtiofsd.is_c(path, cache)
    assert virtiofsd.is_c(path, cache)
    assert (tmp_path / "asked").read_text() == "x"
    program(RUST)
    assert not virtiofsd.is_c(path, cache)
    assert not virtiofsd.is_c(path, cache)
    assert (tmp_path / "asked").read_text() == "xx"
    assert json.loads(cache.read_text())["text"].startswith("virtiofsd 1")


@pytest.mark.parametrize("text", ["", "[]", '{"key": null}'])
def test_a_cache_that_cannot_be_used_is_made_anew(tmp_path: Path, program: Program, text: str) -> None:
    cache = tmp_path / "virtiofsd.json"
    cache.write_text(text)
    assert virtiofsd.is_c(str(program(C)), cache)
    assert json.loads(cache.read_text())["text"].startswith("virtiofsd version")
    (tmp_path / "file").touch()
    assert virtiofsd.is_c(str(program(C)), tmp_path / "file" / "virtiofsd.json")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"virtiofsd: /nowhere/virtiofsd cannot be executed") as caught:
        virtiofsd.start(
            "/nowhere/virtiofsd",
            tmp_path,
            tmp_path / "s",
            tmp_path / "log",
            os.getuid(),
            tmp_path / "c",
            1,
            own_files=True,
        )
    assert caught.value.hint
    assert not (tmp_path / "s").exists()


def test_the_socket_is_virtiofsds_alone_afterwards(tmp_path: Path, program: Program) -> None:
    """The shim must not keep it open: QEMU's connection would wait for ever if virtiofsd died."""

    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        address = tmp_path / "share.sock"
        files = virtiofsd.start(
            str(program(RUST)),
            tmp_path,
            address,
            tmp_path / "log",
            os.getuid(),
            tmp_path / "c",
            1 << 17,
            own_files=False,
        )
        await until(lambda: "--fd=3" in (tmp_path / "log").read_text())
        await files.end()
        assert len(os.listdir("/proc/self/fd")) == before
        with socket.socket(socket.AF_UNIX) as qemu, pytest.raises(ConnectionRefusedError):
            qemu.connect(str(address))

    run(life())
