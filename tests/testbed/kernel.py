"""The bed's kernel: Debian's source of it, built with nothing but what kernel.config asks for, no modules.

Must not know what runs on it.
"""

import re
import shutil
from pathlib import Path

from rpc.errors import FailedPrecondition
from scripts.rootspace import Rootspace
from tests.testbed import cache, debian

FRAGMENT = Path(__file__).with_name("kernel.config")
IMAGE = "bzImage"
SOURCE, OUTPUT = "/usr/src/linux", "/usr/src/build"
CONFIGURE = f"""\
set -e
mkdir {SOURCE} {OUTPUT}
tar --extract --file /usr/src/linux-source-*.tar.xz --strip-components=1 --directory {SOURCE}
make --silent --directory {SOURCE} O={OUTPUT} KCONFIG_ALLCONFIG={OUTPUT}.config allnoconfig
"""
BUILD = f'make --silent --directory {SOURCE} O={OUTPUT} --jobs="$(nproc)" {IMAGE}'
NICENESS = 10  # it takes minutes of every processor


def ensure() -> Path:
    """The bzImage, cached for this fragment and this toolchain."""
    toolchain = debian.toolchain()

    def build(target: Path) -> None:
        changes, work, root = (target.with_name(name) for name in ("changes", "work", "root"))
        for directory in (changes / "usr/src", work, root):
            directory.mkdir(parents=True)
        shutil.copyfile(FRAGMENT, changes / f"{OUTPUT.lstrip('/')}.config")
        space = Rootspace(root, (toolchain,), changes, work)
        space.check(["sh", "-c", CONFIGURE])
        output = changes / OUTPUT.lstrip("/")
        if refused := unmet(FRAGMENT.read_text(), (output / ".config").read_text()):
            raise FailedPrecondition(
                "the kernel's own rules turn down what kernel.config asks for",
                details="\n".join(refused),
                hint="what does each depend on? see its Kconfig file",
            )
        space.check(["sh", "-c", BUILD], niceness=NICENESS)
        shutil.copyfile(output / f"arch/x86/boot/{IMAGE}", target / IMAGE)
        shutil.copyfile(output / ".config", target / "config")

    recipe = [toolchain.name, CONFIGURE, BUILD, FRAGMENT.read_text()]
    return cache.entry("kernel", recipe, build) / IMAGE


def unmet(fragment: str, configuration: str) -> list[str]:
    """Lines of a fragment that do not hold in a finished configuration; an option it lacks is not set."""
    held = set(configuration.splitlines())
    options = {line.partition("=")[0] for line in held if line.startswith("CONFIG_")}

    def holds(line: str) -> bool:
        off = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        return off[1] not in options if off else line.startswith("#") or line in held

    return [line for line in fragment.splitlines() if line and not holds(line)]
