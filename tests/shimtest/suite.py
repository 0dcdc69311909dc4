"""A checkout of containerd's shimtest: what it is, built, and run in one private installation of ours.

It knows how its programs are called; what they say is read by outcomes.py.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.instance import Instance
from rpc.errors import NotFound
from scripts.host import run
from tests.shimtest.changes import CHANGES, NO_SIGURG
from tests.shimtest.outcomes import CONFIG

REPOSITORY = "github.com/containerd/shimtest"
SHIM = "containerd-shim-casemate-v2"


@dataclass(frozen=True, slots=True)
class Suite:
    """commit: as git describes it, with its date. tests: the test binary. program: its containers'."""

    commit: str
    tests: Path
    program: Path


def build(checkout: Path, into: Path) -> Suite:
    """Raises NotFound for a checkout that is none, CasemateError with git's or Go's words.

    The checkout stays as it is. Go fetches modules as the environment says (GOPROXY, GOFLAGS).
    """
    module = checkout / "go.mod"
    if not module.is_file() or f"module {REPOSITORY}\n" not in module.read_text():
        raise NotFound(f"{checkout} is no checkout of {REPOSITORY}", hint="make shimtest SUITE=/path/to/one")
    overlay = into / "overlay.json"
    overlay.write_text(json.dumps({"Replace": changed(checkout, into)}))
    git: list[str | Path] = ["git", "-c", f"safe.directory={checkout}", "-C", checkout]
    commit = run([*git, "describe", "--always", "--abbrev=10", "--dirty"], quiet=True)
    date = run([*git, "show", "-s", "--format=%cs"], quiet=True)
    suite = Suite(f"{commit.strip()} of {date.strip()}", into / "shimtest.test", into / "testbin")
    go = ["nice", "-n", "10", "go"]
    static = {"CGO_ENABLED": "0"}
    run(
        [*go, "build", f"-ldflags=-s -w {NO_SIGURG}", "-o", suite.program, "./cmd/testbin"],
        cwd=checkout,
        env=static,
    )
    run([*go, "test", "-c", "-overlay", overlay, "-o", suite.tests, "."], cwd=checkout)
    return suite


def changed(checkout: Path, into: Path) -> dict[str, str]:
    """The files of CHANGES, and those that stand for them. Raises NotFound for one that is not as it was."""
    texts = {change.file: (checkout / change.file).read_text() for change in CHANGES}
    for change in CHANGES:
        if texts[change.file].count(change.old) != 1:
            raise NotFound(f"{change.file} of the suite has changed: not once {change.old.strip()!r}")
        texts[change.file] = texts[change.file].replace(change.old, change.new)
    for name, text in texts.items():
        (into / name).write_text(text)
    return {str(checkout / name): str(into / name) for name in texts}


def lines(suite: Suite, instance: Instance, tests: str, timeout_s: int, *, short: bool) -> Iterator[str]:
    """What `go tool test2json` makes of a run, as it is said.

    tests: an expression as of `go test -run`. short: without Stress, which takes what time there is.
    """
    config = instance.work / f"{CONFIG}.json"
    shim = str(instance.base / "bin" / SHIM)
    settings = {"shim_binary": shim, "format_mounts": True, "provide_network": True}
    config.write_text(json.dumps(settings))
    argv = instance.inside(
        str(suite.tests),
        "-test.v=test2json",
        f"-test.run={tests}",
        f"-test.timeout={timeout_s}s",
        f"-test.short={str(short).lower()}",
        f"-shimtest.config={config}",
    )
    environment = {**instance.env(), "SHIMTEST_TESTBIN": str(suite.program)}
    with (
        subprocess.Popen(
            argv, env=environment, cwd=instance.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as running,
        subprocess.Popen(
            ["go", "tool", "test2json"], stdin=running.stdout, stdout=subprocess.PIPE, text=True
        ) as reading,
    ):
        assert running.stdout is not None
        assert reading.stdout is not None
        running.stdout.close()  # the reader has it, and is to be told of the end
        yield from reading.stdout
