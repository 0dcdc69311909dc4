"""The ways a container can be started that are compared, as the command line names them.

    [LABEL=]NAME[@CHECKOUT]

NAME is one of KNOWN or containerd's own name of a runtime (io.containerd.runsc.v1). CHECKOUT is another
checkout of casemate, whose shim and guest image are used. It computes; what is started is stand.py's.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.instance import CHECKOUT, RUNTIME
from images.kernel import KernelKind
from rpc.errors import InvalidArgument, NotFound

RUNC = "io.containerd.runc.v2"
KATA = "io.containerd.kata.v2"
TUNED = KernelKind.TUNED.value  # the name of a guest image with a kernel of that kind
# One is taken at a time, and the next is there before the next turn: as small as it can be without a wait.
POOL = 2
UNIFIED = Path("/sys/fs/cgroup/unified")
SEARCH_PATH = (
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/kata/bin:/opt/kata/runtime-rs/bin"
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a containerd must be given for a way; ways with the same share one.

    template, image, files: the keys of casemate's profiles, empty for their defaults. without_mounts: of the
    host's. casemated: whether it runs beside. pool: how many machines it keeps for pods to come.
    """

    checkout: Path = CHECKOUT
    template: str = ""
    image: str = ""
    files: str = ""
    without_mounts: tuple[str, ...] = ()
    casemated: bool = False
    pool: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """programs: what must be installed beside containerd's shim of the runtime."""

    name: str
    runtime: str
    options: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    surroundings: Surroundings = field(default_factory=Surroundings)

    @property
    def is_casemate(self) -> bool:
        return self.runtime == RUNTIME

    @property
    def shim(self) -> str:
        """The name of the executable that containerd looks for (its runtime/v2 naming)."""
        *_, name, version = self.runtime.split(".")
        return f"containerd-shim-{name}-{version}"


def without_empty_unified(unified: Path = UNIFIED) -> tuple[str, ...]:
    """crun takes the empty v2 hierarchy of a hybrid host for the one that it shall use, and fails."""
    hybrid = (unified / "cgroup.procs").exists()
    return (str(unified),) if hybrid else ()


def known() -> dict[str, Way]:
    return {
        way.name: way
        for way in (
            Way("runc", RUNC, programs=("runc",)),
            Way(
                "crun",
                RUNC,
                options=("--runc-binary", "crun"),
                programs=("crun",),
                surroundings=Surroundings(without_mounts=without_empty_unified()),
            ),
            Way("casemate", RUNTIME),
            Way("casemate-boot", RUNTIME, surroundings=Surroundings(template="off")),
            Way("casemate-node", RUNTIME, surroundings=Surroundings(casemated=True)),
            Way("casemate-pool", RUNTIME, surroundings=Surroundings(casemated=True, pool=POOL)),
            Way("casemate-virtiofs", RUNTIME, surroundings=Surroundings(files="virtiofs")),
            Way("casemate-9p", RUNTIME, surroundings=Surroundings(files="9p")),
            Way("casemate-tuned", RUNTIME, surroundings=Surroundings(image=TUNED)),
            Way("casemate-tuned-boot", RUNTIME, surroundings=Surroundings(template="off", image=TUNED)),
            Way("kata", KATA),
        )
    }


def parse(text: str) -> Way:
    """The way that one word of the command line means. Raises InvalidArgument."""
    label, _, rest = text.rpartition("=")
    name, at, checkout = rest.partition("@")
    way = known().get(name)
    if way is None:
        if not name.startswith("io.containerd.") or name.count(".") < 3:
            raise InvalidArgument(
                f"{name or text!r} is no runtime",
                hint=f"one of {', '.join(known())}, or a name such as io.containerd.runsc.v1",
            )
        way = Way(name, name)
    surroundings = way.surroundings
    if at:
        directory = Path(checkout).resolve()
        if not way.is_casemate or not (directory / "shim" / "bootstrap.py").is_file():
            raise InvalidArgument(f"{text}: {checkout} is no checkout of casemate")
        if surroundings.casemated and not (directory / "node" / "main.py").is_file():
            raise InvalidArgument(f"{text}: the checkout {checkout} has no casemated")
        if surroundings.image:
            raise InvalidArgument(f"{text}: another checkout has its own guest image", hint="leave out @...")
        surroundings = replace(surroundings, checkout=directory)
    return Way(label or way.name, way.runtime, way.options, way.programs, surroundings)


def parse_all(words: Sequence[str]) -> list[Way]:
    """Raises InvalidArgument for a word that means nothing, or a label that two have."""
    ways = [parse(word) for word in words]
    names = [way.name for way in ways]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument(f"two runtimes are called {name}", hint=f"LABEL={name} gives one a label")
    return ways


def check_installed(ways: Sequence[Way], directory: Path) -> None:
    """directory: containerd's own. Raises NotFound for what containerd would not find."""
    path = f"{directory}:{os.environ.get('PATH', '')}:{SEARCH_PATH}"
    for way in ways:
        for program in (*(() if way.is_casemate else (way.shim,)), *way.programs):
            if shutil.which(program, path=path) is None:
                raise NotFound(f"{way.name}: {program} is not installed", hint="leave this runtime out")


def path_of(way: Way, directory: Path) -> str:
    """The directory of its shim, for containerd's PATH; empty where containerd's own PATH has it."""
    found = None if way.is_casemate else shutil.which(way.shim, path=f"{directory}:{SEARCH_PATH}")
    return str(Path(found).parent) if found else ""
