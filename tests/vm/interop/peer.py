"""Go's side of the interop tests, built once and cached by its sources; and the streaming service of
containerd/ttrpc's own tests, declared for ours.
"""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from rpc import codec
from rpc.api.types import Empty
from rpc.codec import Message
from rpc.method import Method
from scripts import golang

SOURCES = Path(__file__).parent / "go"
CACHE = Path(os.environ.get("CASEMATE_CACHE_DIR") or "/var/cache/casemate") / "go"
FLAGS = ("-trimpath", "-buildvcs=false", "-ldflags=-s -w")


def program() -> Path:
    """The executable. Two test runs at once build it once."""
    key = hashlib.sha256(repr(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    built = CACHE / key.hexdigest()[:16] / "interop"
    with open(CACHE / "interop.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(built)
    return built


def _build(built: Path) -> None:
    go = golang.ensure() / "go"
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = ["nice", str(go), "build", *FLAGS, "-o", f"{scratch}/interop", "."]
        done = subprocess.run(
            command, check=False, cwd=SOURCES, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise AssertionError(f"(cd {SOURCES} && {' '.join(command)}) failed:\n{done.stderr[-4000:]}")
        built.parent.mkdir(exist_ok=True)
        os.rename(f"{scratch}/interop", built)


_PACKAGE = "ttrpc.integration.streaming."
STREAMING = _PACKAGE + "Streaming"


class EchoPayload(Message, name=_PACKAGE + "EchoPayload"):
    seq: int = codec.uint32(1)
    msg: str = codec.string(2)


class Part(Message, name=_PACKAGE + "Part"):
    add: int = codec.int32(1)


class Sum(Message, name=_PACKAGE + "Sum"):
    sum: int = codec.int32(1)
    num: int = codec.int32(2)


ECHO = Method(STREAMING, "Echo", EchoPayload, EchoPayload)
ECHO_STREAM = Method(
    STREAMING, "EchoStream", EchoPayload, EchoPayload, client_streams=True, server_streams=True
)
SUM_STREAM = Method(STREAMING, "SumStream", Part, Sum, client_streams=True)
DIVIDE_STREAM = Method(STREAMING, "DivideStream", Sum, Part, server_streams=True)
ECHO_NULL = Method(STREAMING, "EchoNull", EchoPayload, Empty, client_streams=True)
ECHO_NULL_STREAM = Method(
    STREAMING, "EchoNullStream", EchoPayload, Empty, client_streams=True, server_streams=True
)
EMPTY_PAYLOAD_STREAM = Method(STREAMING, "EmptyPayloadStream", Empty, EchoPayload, server_streams=True)
