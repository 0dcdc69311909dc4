"""The containerds of the vm tests, and their clients: a distribution's, or built from the Go module proxy.

What is built is pinned by tests/vm/go/NAME/go.mod and go.sum, and cached by their content. It knows
nothing of the tests.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.instance import Binaries, system_binaries
from images.packages import Request, fetch
from scripts import golang

MODULES = Path(__file__).parent / "go"
CACHE = Path(os.environ.get("CASEMATE_CACHE_DIR") or "/var/cache/casemate") / "containerd"
FLAGS = ("-trimpath", "-ldflags=-s -w", "-buildvcs=false")
TAGS = "-tags=no_btrfs no_devmapper no_zfs no_aufs"
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr")
NVCDI = "nvcdi"
CDICHECK = "cdicheck"
KUBERNETES = "kubernetes"
KUBERNETES_PROGRAMS = ("kubelet", "kube-apiserver", "kubectl", "server")
"""The last one is etcd's name for itself."""
CRICTL, NERDCTL = "crictl", "nerdctl"
DOCKER = Request(("docker.io", "docker-cli", "tini"))


class NotHereError(Exception):
    """A containerd that only a distribution has, and this machine's is another. The text is for a person."""


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
    cached. Raises NotHereError for one that cannot be built.
    """
    wanted = VERSIONS[name]
    if wanted.system_will_do:
        system = system_binaries()
        if system is not None and system.version.startswith(wanted.line):
            return Binaries(name, system.version, system.directory)
    module = MODULES / name
    if not module.is_dir():
        # 1.6.36 was tried: built by today's Go it ends with "protobuf tag not enough fields in Status.state".
        raise NotHereError(f"containerd {wanted.line}x is a package of Debian 12, and not of this machine")
    directory = _built(module, (*FLAGS, TAGS), PROGRAMS)
    return Binaries(name, _pinned_version(module), directory)


def crictl() -> Path:
    """The client of Kubernetes' container runtime interface, which no Debian has: built once and cached."""
    return _built(MODULES / CRICTL, FLAGS, (CRICTL,)) / CRICTL


def nvcdi() -> Path:
    """NVIDIA's own making of CDI specifications (tests/vm/go/nvcdi/main.go), built once and cached. Raises
    NotHereError where there is no C compiler, which NVML's binding takes."""
    if shutil.which("gcc") is None:
        raise NotHereError("NVIDIA's container toolkit takes a C compiler, and this machine has no gcc")
    return _built(MODULES / NVCDI, FLAGS, (NVCDI,), cgo=True) / NVCDI


def cdicheck() -> Path:
    """Says whether a CDI specification is valid (tests/vm/go/cdicheck/main.go): built once and cached."""
    return _built(MODULES / CDICHECK, FLAGS, (CDICHECK,)) / CDICHECK


def kubernetes() -> Path:
    """A directory with the programs of a node, an API server, its etcd and kubectl: built once and cached.

    That takes two processors six minutes, so it is not among what main() has.
    """
    return _built(MODULES / KUBERNETES, (*FLAGS, "-tags=grpcnotrace"), KUBERNETES_PROGRAMS)


def nerdctl() -> Path:
    """containerd's own client for people, which no Debian has: built once and cached."""
    return _built(MODULES / NERDCTL, FLAGS, (NERDCTL,)) / NERDCTL


def docker() -> Path:
    """A directory with Debian's Docker Engine below usr/, which this machine's libraries will do for.

    That of Debian 13, as Debian 12's (20.10) knows no runtime by its name at containerd's. Raises
    FailedPrecondition with apt's words.
    """
    return fetch(DOCKER).path


def _built(module: Path, flags: tuple[str, ...], programs: tuple[str, ...], *, cgo: bool = False) -> Path:
    """A directory with the tools that a module names."""
    key = hashlib.sha256()
    sources = [path.read_bytes() for path in sorted(module.rglob("*.go"))]
    for text in (
        *((module / "go.mod").read_bytes(), (module / "go.sum").read_bytes(), repr(flags).encode()),
        *sources,
    ):
        key.update(hashlib.sha256(text).digest())
    CACHE.mkdir(parents=True, exist_ok=True)
    directory = CACHE / f"{module.name}-{key.hexdigest()[:16]}"
    with open(CACHE / f"{module.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once build it once
        if not directory.is_dir():
            _build(module, directory, flags, programs, cgo=cgo)
    return directory


def _pinned_version(module: Path) -> str:
    text = (module / "go.mod").read_text()
    found = re.search(r"^\s*(?:require )?github\.com/containerd/containerd(?:/v2)? v(\S+)", text, re.M)
    if found is None:
        raise BuildError(f"{module / 'go.mod'} requires no containerd")
    return found[1]


def _build(
    module: Path, directory: Path, flags: tuple[str, ...], programs: tuple[str, ...], *, cgo: bool
) -> None:
    go = str(golang.ensure() / "go")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as scratch:
        settings = {"CGO_ENABLED": str(int(cgo)), "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}
        environment = {**os.environ, **settings}
        _run(["nice", "-n", "10", go, "build", *flags, "-o", f"{scratch}/out/", "tool"], module, environment)
        missing = [name for name in programs if not Path(scratch, "out", name).is_file()]
        if missing:
            raise BuildError(f"building {module.name} gave no {', '.join(missing)}")
        os.rename(Path(scratch, "out"), directory)


def _run(argv: list[str], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(argv, check=False, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"(cd {cwd} && {' '.join(argv)}) returned {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    """Have them all: `python -m tests.vm.builds`, for `make test` to do while other things run."""
    for name in VERSIONS:
        try:
            print(provide(name), flush=True)
        except NotHereError as reason:
            print(reason, flush=True)
    print(crictl(), flush=True)
    try:
        print(nvcdi(), flush=True)
    except NotHereError as reason:
        print(reason, flush=True)
    print(cdicheck(), flush=True)
    print(nerdctl(), flush=True)
    print(docker(), flush=True)


if __name__ == "__main__":
    main()
