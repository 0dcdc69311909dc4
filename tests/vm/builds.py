"""The containerd versions the vm tests run on: the distribution's, or built from the Go module proxy.

What is built is pinned by tests/vm/go/NAME/go.mod and go.sum, and cached by their content. It knows
nothing of the tests.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.instance import Binaries, system_binaries

MODULES = Path(__file__).parent / "go"
CACHE = Path(os.environ.get("CASEMATE_CACHE_DIR") or "/var/cache/casemate") / "containerd"
TAGS = "no_btrfs no_devmapper no_zfs no_aufs no_cri"
FLAGS = ("-trimpath", "-ldflags=-s -w", "-buildvcs=false", f"-tags={TAGS}")
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr")

GO_VERSION = "1.26.8"
"""Used where the machine's own Go is older than a go.mod asks for (Debian's always is)."""

GO_SUM = "h1:ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM="
"""go.sum's hash of golang.org/toolchain@v0.0.1-go1.26.8.linux-amd64."""


class BuildError(Exception):
    """A containerd could not be had; the text says what failed, in the tool's own words."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A containerd release line, and whether the distribution's package will do for it."""

    name: str
    line: str
    system_will_do: bool


VERSIONS = {
    wanted.name: wanted
    for wanted in (
        Wanted("v1.6", "1.6.", system_will_do=True),  # Debian 12
        Wanted("v1.7", "1.7.", system_will_do=True),  # Debian 13
        Wanted("v2", "2.", system_will_do=False),
    )
}


def provide(name: str) -> Binaries:
    """The executables of a containerd line: the system's if it is of that line, else built once and
    cached.
    """
    wanted = VERSIONS[name]
    if wanted.system_will_do:
        system = system_binaries()
        if system is not None and system.version.startswith(wanted.line):
            return Binaries(name, system.version, system.directory)
    module = MODULES / name
    key = hashlib.sha256()
    for text in (module / "go.mod").read_bytes(), (module / "go.sum").read_bytes(), repr(FLAGS).encode():
        key.update(hashlib.sha256(text).digest())
    CACHE.mkdir(parents=True, exist_ok=True)
    directory = CACHE / f"{name}-{key.hexdigest()[:16]}"
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once build it once
        if not directory.is_dir():
            _build(module, directory)
    return Binaries(name, _pinned_version(module), directory)


def _pinned_version(module: Path) -> str:
    text = (module / "go.mod").read_text()
    found = re.search(r"^\s*(?:require )?github\.com/containerd/containerd(?:/v2)? v(\S+)", text, re.M)
    if found is None:
        raise BuildError(f"{module / 'go.mod'} requires no containerd")
    return found[1]


def _build(module: Path, directory: Path) -> None:
    go = _go(module)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as scratch:
        environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}
        _run([*NICE, go, "build", *FLAGS, "-o", f"{scratch}/out/", "tool"], module, environment)
        missing = [name for name in PROGRAMS if not Path(scratch, "out", name).is_file()]
        if missing:
            raise BuildError(f"building {module.name} gave no {', '.join(missing)}")
        os.rename(Path(scratch, "out"), directory)


NICE = ("nice", "-n", "10")


def _go(module: Path) -> str:
    """A Go that is new enough for this module: the machine's, or the pinned toolchain, fetched by the
    machine's.
    """
    found = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin:/usr/lib/go/bin")
    if found is None:
        raise BuildError("no Go here to build containerd with (Debian: apt-get install golang-go)")
    asked = re.search(r"^go (\S+)", (module / "go.mod").read_text(), re.M)
    here = re.search(
        r"go(\d\S*)", _run([found, "env", "GOVERSION"], module, {**os.environ, "GOTOOLCHAIN": "local"})
    )
    if asked is None or here is None:
        raise BuildError(f"cannot tell which Go {module} needs, or which {found} is")
    if _number(here[1]) >= _number(asked[1]):
        return found
    return _toolchain(found)


def _toolchain(go: str) -> str:
    """The pinned Go toolchain from the module proxy; any Go can fetch it, its hash is checked here as
    well.
    """
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="go-") as scratch:
        (Path(scratch) / "go.mod").write_text("module casemate.test/toolchain\n")
        module = f"golang.org/toolchain@v0.0.1-go{GO_VERSION}.linux-amd64"
        environment = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
        answer = json.loads(_run([go, "mod", "download", "-json", module], Path(scratch), environment))
    if answer["Sum"] != GO_SUM:
        raise BuildError(f"{module} has the hash {answer['Sum']}, not {GO_SUM}")
    root = Path(answer["Dir"])
    for program in root / "bin" / "go", *(root / "pkg" / "tool").glob("*/*"):
        program.chmod(0o755)  # a module's zip carries no modes
    return str(root / "bin" / "go")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _run(argv: list[str], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(argv, check=False, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"(cd {cwd} && {' '.join(argv)}) returned {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    """Have them all: `python -m tests.vm.builds`, for `make test` to do while other things run."""
    for name in VERSIONS:
        print(provide(name), flush=True)


if __name__ == "__main__":
    main()
