"""Debian's kernel source, built by Debian's compiler from allnoconfig and a fragment: the test bed's kernel,
and the guest's tuned one.

Must not know whose kernel it is, nor where the compiler came from.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from images.rootspace import Rootspace
from rpc.errors import FailedPrecondition

SOURCE, OUTPUT = "/usr/src/linux", "/usr/src/build"
CONFIG = ".config"
NICENESS = 10  # it takes minutes of every processor


def commands(target: str, settings: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Shell scripts that configure and that build: a part of the recipe. settings: make's variables."""
    given = "".join(f" {shlex.quote(f'{name}={value}')}" for name, value in (settings or {}).items())
    make = f"make --silent{given} --directory {SOURCE} O={OUTPUT}"
    configure = f"""\
set -e
mkdir {SOURCE} {OUTPUT}
tar --extract --file /usr/src/linux-source-*.tar.xz --strip-components=1 --directory {SOURCE}
{make} KCONFIG_ALLCONFIG={OUTPUT}.config allnoconfig
"""
    return configure, f'{make} --jobs="$(nproc)" {target}'


def build(
    toolchain: Path,
    fragment: str,
    target: str,
    scratch: Path,
    settings: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Path:
    """Makes target (bzImage, "vmlinux modules"), and returns the directory below scratch that it is in.

    toolchain: a root file system with compiler, make and the package linux-source. scratch: a directory on
    one file system, which needs 2 GB. log: where the tools' words go, if not where ours go.
    Raises FailedPrecondition, naming the lines of the fragment that the kernel's own rules turned down.
    """
    changes, work, root = (scratch / name for name in ("changes", "work", "root"))
    output = changes / OUTPUT.lstrip("/")
    for directory in (output.parent, work, root):
        directory.mkdir(parents=True)
    (changes / f"{OUTPUT.lstrip('/')}.config").write_text(fragment)
    space = Rootspace(root, (toolchain,), changes, work)
    configure, make = commands(target, settings)
    space.check(["sh", "-c", configure], log=log)
    check(fragment, (output / CONFIG).read_text())
    space.check(["sh", "-c", make], niceness=NICENESS, log=log)
    return output


def check(fragment: str, configuration: str) -> None:
    """Raises FailedPrecondition unless every line of a fragment holds in a finished configuration."""
    if refused := unmet(fragment, configuration):
        raise FailedPrecondition(
            "the kernel's own rules turn down what its fragment asks for",
            details="\n".join(refused),
            hint="what does each depend on? see its Kconfig file",
        )


def unmet(fragment: str, configuration: str) -> list[str]:
    """Lines of a fragment that do not hold in a finished configuration; an option it lacks is not set."""
    held = set(configuration.splitlines())
    options = {line.partition("=")[0] for line in held if line.startswith("CONFIG_")}

    def holds(line: str) -> bool:
        off = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        return off[1] not in options if off else line.startswith("#") or line in held

    return [line for line in fragment.splitlines() if line and not holds(line)]
