"""Compiles Python sources for the guest: sourceless .pyc files without doc strings, the same bytes each time.

The code that compiles runs in the guest's own Python (its bytecode is of another version than the
host's), straight from the unpacked packages. Must not know which sources an image needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from images.run import run

# argv: source directory, target directory, path in the guest, then relative paths of the files
_COMPILE = """
import os, py_compile, sys
source, target, guest, *files = sys.argv[1:]
for file in files:
    made = os.path.join(target, file + "c")
    os.makedirs(os.path.dirname(made), exist_ok=True)
    py_compile.compile(
        os.path.join(source, file), made, os.path.join(guest, file), doraise=True, optimize=2,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
"""


@dataclass(frozen=True, slots=True)
class GuestPython:
    """The Python of an unpacked tree of packages, run on the host through its own dynamic linker."""

    tree: Path
    version: str  # "3.13"

    @property
    def program(self) -> str:
        return f"usr/bin/python{self.version}"

    @property
    def library(self) -> str:
        return f"usr/lib/python{self.version}"

    def execute(self, code: str, *arguments: str | Path) -> bytes:
        libraries = self.tree / "usr/lib/x86_64-linux-gnu"
        return run(
            [
                libraries / "ld-linux-x86-64.so.2",
                *("--library-path", libraries, self.tree / self.program),
                *("-S", "-s", "-P", "-B", "-c", code, *arguments),
            ],
            environment={"PYTHONHOME": f"{self.tree}/usr", "PYTHONHASHSEED": "0"},
        )

    def compile(self, source: Path, target: Path, guest: str, files: Sequence[str]) -> None:
        """Compiles files (relative to source) to target/FILEc; guest is source's path in the guest."""
        self.execute(_COMPILE, source, target, guest, *sorted(files))


def find_python(tree: Path) -> GuestPython:
    link = (tree / "usr/bin/python3").readlink()
    return GuestPython(tree, link.name.removeprefix("python"))
