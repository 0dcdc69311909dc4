"""How long `casemate gpu list` takes on the tree of a DGX H100 (tests/unit/vfio/machines.py), two GPUs held.

    .venv/bin/python -m tests.gpulist --rounds 20

Each round is a process that begins as the installed command does (scripts/product.py, LAUNCHER), and is told
where the tree is, and no other words of it. A time belongs to a machine: nothing asserts one.
"""

import argparse
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.unit.vfio.hosts import OWNER, POD
from tests.unit.vfio.machines import dgx_h100
from tests.unit.vfio.trees import Tree
from vfio import inventory
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.offer import offer

CHECKOUT = Path(__file__).resolve().parent.parent
GPUS_WANTED = 2
# After the launcher's words, in place of the host's directories those of the tree.
PROGRAM = """\
import sys
sys.path += {path!r}
from cli import gpu
gpu._SYSFS, gpu._PROC = {sys!r}, {proc!r}
from cli.main import app
try:
    app()
finally:
    if {modules!r}:
        print(*sorted(sys.modules), file=sys.stderr)
"""
# The look at the host alone, names from pci.ids included; without the imports.
INVENTORY = """\
import sys, time
sys.path += {path!r}
from vfio import inventory
before_s = time.perf_counter()
found = inventory.read({sys!r})
print(time.perf_counter() - before_s, len(found.functions))
"""


@dataclass(frozen=True, slots=True)
class Took:
    """In seconds: by the clock, and of processors."""

    wall_s: float
    cpu_s: float


class Stand:
    """A tree, and a ledger that says who has two of its GPUs; the configuration is the packaged one."""

    def __init__(self, directory: Path, proc: str) -> None:
        self.tree: Tree = dgx_h100(directory / "dgx")
        self._proc = proc or str(self.tree.proc)
        self._environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "CASEMATE_RUN_DIR": str(directory / "run"),
            "CASEMATE_CONFIG_DIR": str(directory / "etc"),
            "CASEMATE_LEDGER_DIR": str(directory / "ledger"),
        }
        (directory / "run").mkdir()
        host = offer(inventory.read(str(self.tree.sys)), sys=str(self.tree.sys))
        with Ledger(directory / "ledger") as ledger:
            ledger.claim(POD, OWNER, Wanted((Request(GPUS_WANTED, kind="gpu", vendor=0x10DE),)), host)

    def listed(self) -> tuple[str, Took]:
        """What `casemate gpu list` says, and what it took."""
        said, took = self._run(PROGRAM, "gpu", "list")
        return said.stdout, took

    def modules(self) -> set[str]:
        """All that it has imported when it is done."""
        said, _ = self._run(PROGRAM, "gpu", "list", modules=True)
        return set(said.stderr.splitlines()[-1].split())

    def inventory_s(self) -> float:
        """Of a process's first look, after import."""
        return float(self._run(INVENTORY)[0].stdout.split()[0])

    def _run(
        self, program: str, *words: str, modules: bool = False
    ) -> tuple[subprocess.CompletedProcess[str], Took]:
        path = [str(CHECKOUT), sysconfig.get_path("purelib"), "/usr/lib/python3/dist-packages"]
        code = program.format(path=path, sys=str(self.tree.sys), proc=self._proc, modules=modules)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        before_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-BIS", "-c", code, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
        )
        wall_s = time.perf_counter() - before_s
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return done, Took(wall_s, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)


@contextmanager
def stand(proc: str = "") -> Iterator[Stand]:
    with tempfile.TemporaryDirectory(prefix="casemate-gpulist-") as directory:
        yield Stand(Path(directory), proc)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpulist", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--proc", default="", help="look for open handles there: /proc for all of this machine's processes"
    )
    options = parser.parse_args(argv)
    # As installed, with bytecode.
    packages = [str(CHECKOUT / name) for name in ("cli", "config", "rpc", "vfio")]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *packages], check=True)
    with stand(options.proc) as made:
        made.listed()  # not counted: the configuration is read and cached
        took = [made.listed()[1] for _ in range(options.rounds)]
        read_s = [made.inventory_s() for _ in range(options.rounds)]
    for what, seconds in (
        ("casemate gpu list, by the clock", [each.wall_s for each in took]),
        ("casemate gpu list, of processors", [each.cpu_s for each in took]),
        ("inventory, after import", read_s),
    ):
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}, n = {len(seconds)}"
        print(f"{what:34}{median(seconds):8.3f} s  ({spread})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
