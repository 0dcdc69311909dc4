"""A Go for the tests that hold us to containerd's own code: the machine's if new enough, else a pinned one.

The pinned toolchain is a module like any other: whatever Go is here fetches it through the module
proxy that the environment names, and its hash is checked against the one below.
"""

import json
import re
import tempfile
from pathlib import Path

from rpc.errors import CasemateError, DataLoss
from scripts.host import CACHE, CHECKOUT, executable, install_packages, run, say

PINNED = "1.26.8"
PINNED_SUM = "h1:ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM="
DEBIAN_PACKAGE = "golang-go"
LOCAL_ONLY = {"GOTOOLCHAIN": "local"}


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def needed(modules: list[Path]) -> str:
    """The newest `go` line of these go.mod files."""
    lines = (re.search(r"^go (\S+)", module.read_text(), re.MULTILINE) for module in modules)
    return max((line[1] for line in lines if line), key=number, default="1")


def version(go: Path) -> str:
    return run([go, "env", "GOVERSION"], env=LOCAL_ONLY, quiet=True).strip().removeprefix("go")


def on_this_machine() -> Path | None:
    by_hand = Path("/usr/local/go/bin/go")
    return executable("go") or (by_hand if by_hand.exists() else None)


def toolchain(go: Path) -> Path:
    """The pinned toolchain's go, fetched by another one."""
    module = f"golang.org/toolchain@v0.0.1-go{PINNED}.linux-amd64"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="go-") as scratch:
        (Path(scratch) / "go.mod").write_text("module casemate.test/toolchain\n")
        settings = {**LOCAL_ONLY, "GOFLAGS": "-mod=mod"}
        argv: list[str | Path] = [go, "mod", "download", "-json", module]
        answer = json.loads(run(argv, cwd=Path(scratch), env=settings, quiet=True))
    if answer["Sum"] != PINNED_SUM:
        raise DataLoss(f"{module} has the hash {answer['Sum']}, not {PINNED_SUM}")
    root = Path(answer["Dir"])
    for program in (root / "bin/go", root / "bin/gofmt", *(root / "pkg/tool").glob("*/*")):
        program.chmod(0o755)  # a module's archive carries no modes
    return root / "bin/go"


def ensure() -> Path:
    """The directory of a go that every go.mod below tests/ can be built with."""
    wanted = needed(list((CHECKOUT / "tests").rglob("go.mod")))
    go = on_this_machine()
    if go is None:
        install_packages([DEBIAN_PACKAGE])
        go = on_this_machine()
        if go is None:
            raise CasemateError(f"{DEBIAN_PACKAGE} is installed and no go is on the PATH")
    if number(version(go)) < number(wanted):
        say(f"{go} is Go {version(go)}, the tests need {wanted}: fetching Go {PINNED} as a module")
        go = toolchain(go)
    return go.parent
