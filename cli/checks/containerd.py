"""The containerd of this host: whether it answers, finds the shim, and knows the runtime for CRI."""

import os
import shutil
import socket
import struct
import tomllib
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from cli.checks.result import CheckContext, Result, failure, ok, warning
from rpc.api.types import Empty
from rpc.codec import Message, string
from rpc.errors import InvalidArgument

SHIM = "containerd-shim-casemate-v2"
RUNTIME = "io.containerd.casemate.v2"
# The CRI plugin's runtimes, by the config's version 2 and 3.
_CRI = (
    ("io.containerd.grpc.v1.cri", "containerd", "runtimes"),
    ("io.containerd.cri.v1.runtime", "containerd", "runtimes"),
)
_TIMEOUT_S = 5.0
_USUAL_CONFIG = "/etc/containerd/config.toml"


class VersionResponse(Message, name="containerd.services.version.v1.VersionResponse"):
    version: str = string(1)
    revision: str = string(2)


def containerd(context: CheckContext) -> Iterator[Result]:
    if not os.path.exists(context.containerd):
        where = "systemctl start containerd, or --address where it listens"
        fix = where if shutil.which("containerd") else "apt-get install containerd"
        yield failure("containerd", f"nothing listens at {context.containerd}", fix)
        return
    try:
        version = ask_version(context.containerd)
    except OSError as error:
        yield failure("containerd", f"no answer at {context.containerd}: {error}", "see its log")
        return
    yield ok("containerd", f"{version} at {context.containerd}")
    pid = daemon_pid(context.containerd)
    if pid is None:
        yield warning(
            "containerd's shim", "containerd's process cannot be seen from here", "sudo casemate check"
        )
        return
    yield _shim(pid)
    yield _stanza(pid)


def ask_version(path: str) -> str:
    """containerd's version by its gRPC API. Raises OSError."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(f"unix://{path}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(
            "/containerd.services.version.v1.Version/Version",
            request_serializer=Empty.encode,
            response_deserializer=VersionResponse.decode,
        )
        try:
            answer: VersionResponse = call(Empty(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise ConnectionError(error.details() if isinstance(error, grpc.Call) else str(error)) from None
    return answer.version


def daemon_pid(path: str) -> int | None:
    """Which process listens on the socket at path, as the kernel has it (unix(7), SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_S)
        try:
            probe.connect(path)
        except OSError:
            return None  # the check of containerd itself says so
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) or None  # 0: another PID namespace's


def _shim(pid: int) -> Result:
    """containerd looks for a shim on its own PATH, then beside its own binary."""
    name = "containerd's shim"
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        binary = os.readlink(f"/proc/{pid}/exe")
    except OSError as error:
        return warning(name, f"cannot be told: {error.strerror}", "sudo casemate check")
    path = next((entry[5:].decode() for entry in environment if entry.startswith(b"PATH=")), os.defpath)
    found = shutil.which(SHIM, path=f"{path}:{os.path.dirname(binary)}")
    if found is None:
        return failure(name, f"{SHIM} is not on containerd's PATH ({path})", "make install")
    return ok(name, found)


def _stanza(pid: int) -> Result:
    """Only CRI (Kubernetes) needs the runtime in containerd's config."""
    name = "containerd's config"
    config = _config_path(pid)
    fix = "see config/containerd/casemate.toml; ctr and nerdctl do without"
    try:
        tables = list(_read(config, set()))
    except FileNotFoundError:
        return warning(name, f"{config} does not exist: no runtime casemate for Kubernetes", fix)
    except (OSError, InvalidArgument) as error:
        return warning(name, str(error), "containerd itself may not start with it")
    for file, table in tables:
        for keys in _CRI:
            for runtime, stanza in _at(table, ("plugins", *keys)).items():
                if isinstance(stanza, dict) and stanza.get("runtime_type") == RUNTIME:
                    return ok(name, f"runtime {runtime} in {file}")
    return warning(name, f"no runtime of type {RUNTIME} in {config}: Kubernetes cannot ask for it", fix)


def _config_path(pid: int) -> str:
    """The --config of a running containerd, or the usual one."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("-c", "--config", "-config"):
            given = value if equals else next(iter(arguments[index + 1 :]), "")
            return os.path.join(os.readlink(f"/proc/{pid}/cwd"), given)
    return _USUAL_CONFIG


def _read(path: str, seen: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A containerd config and what it imports: globs, relative to the file that names them."""
    path = os.path.realpath(path)  # files may import each other
    if path in seen:
        return
    seen.add(path)
    try:
        table = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not TOML: {error}") from None
    yield path, table
    imports = table.get("imports")
    for pattern in imports if isinstance(imports, list) else []:
        for imported in sorted(glob(os.path.join(os.path.dirname(path), str(pattern)))):
            yield from _read(imported, seen)


def _at(table: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    for key in keys:
        value = table.get(key)
        if not isinstance(value, dict):
            return {}
        table = value
    return table
