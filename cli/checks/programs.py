"""The programs and libraries that casemate drives: QEMU, libvirt, virtiofsd, firmware."""

import pwd
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from cli.checks.result import CheckContext, Result, failure, ok
from config import programs
from images.run import run
from rpc.errors import CasemateError

_QUERY_TIMEOUT_S = 10.0
_EMBEDDED_DRIVER = "libvirt_driver_qemu.so"


def qemu(context: CheckContext) -> Iterator[Result]:
    try:
        path = programs.qemu(context.settings)
        said = run([path, "--version"], timeout_s=_QUERY_TIMEOUT_S).decode(errors="replace")
    except CasemateError as error:
        yield failure("QEMU", str(error.brief), error.hint or error.details)
        return
    version = re.search(r"version (\d+)\.(\d+)(\.\d+)?", said)
    if version is None:
        yield failure("QEMU", f"{path} does not tell its version", "is it QEMU? see qemu in the config")
    elif (int(version[1]), int(version[2])) < programs.QEMU_LEAST:
        yield failure("QEMU", f"{version[0]} at {path}, too old", f"{_dotted(programs.QEMU_LEAST)} or newer")
    else:
        yield ok("QEMU", f"{version[0].removeprefix('version ')} at {path}")


def libvirt(context: CheckContext) -> Iterator[Result]:
    install = "apt-get install python3-libvirt libvirt-daemon-driver-qemu"
    try:
        import libvirt as binding
    except ImportError as error:
        yield failure("libvirt", f"its Python binding does not load: {error}", install)
        return
    number = binding.getVersion()  # 1_000_000 * major + 1_000 * minor + release
    version = (number // 1_000_000, number // 1_000 % 1_000, number % 1_000)
    if version[:2] < programs.LIBVIRT_LEAST:
        least = _dotted(programs.LIBVIRT_LEAST)
        yield failure("libvirt", f"{_dotted(version)}, too old", f"{least} or newer")
        return
    drivers = [
        path
        for directory in ("/usr/lib", "/usr/lib64")
        for path in context.path(directory).glob(f"**/libvirt/connection-driver/{_EMBEDDED_DRIVER}")
    ]
    if drivers:
        yield ok("libvirt", f"{_dotted(version)}, with its QEMU driver")
    else:
        yield failure("libvirt", f"{_dotted(version)}, without its QEMU driver ({_EMBEDDED_DRIVER})", install)


def versions(context: CheckContext) -> dict[str, tuple[int, int] | None]:
    """What shim/vm/versions.py compares; None of what is not there, or does not say."""
    found: dict[str, tuple[int, int] | None] = {"QEMU": None, "libvirt": None}
    try:
        said = run([programs.qemu(context.settings), "--version"], timeout_s=_QUERY_TIMEOUT_S)
        if version := re.search(rb"version (\d+)\.(\d+)", said):
            found["QEMU"] = int(version[1]), int(version[2])
    except CasemateError:
        pass  # a line of its own says why
    try:
        import libvirt as binding

        number = binding.getVersion()
        found["libvirt"] = number // 1_000_000, number // 1_000 % 1_000
    except ImportError:
        pass
    return found


def virtiofsd(context: CheckContext) -> Iterator[Result]:
    yield _file("virtiofsd", lambda: programs.virtiofsd(context.settings), executable=True)


def firmware(context: CheckContext) -> Iterator[Result]:
    yield _file("firmware", lambda: programs.firmware(context.settings), executable=False)


def qemu_user(context: CheckContext) -> Iterator[Result]:
    """libvirt's QEMU driver looks its own user up when it starts, whether it is used or not."""
    wanted = context.settings.qemu_user
    for name in dict.fromkeys(("libvirt-qemu", "libvirt-qemu" if wanted == "auto" else wanted)):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            yield failure(
                f"user {name}",
                "does not exist",
                f"adduser --system --no-create-home --group {name}",
            )
        else:
            yield ok(f"user {name}", f"uid {entry.pw_uid}")


def _file(name: str, find: Callable[[], str], *, executable: bool) -> Result:
    import os

    try:
        path = find()
    except CasemateError as error:
        return failure(name, error.brief, error.hint)
    if executable and not os.access(path, os.X_OK):
        return failure(name, f"{path} is not executable", f"chmod a+x {path}")
    return ok(name, str(Path(path)))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
