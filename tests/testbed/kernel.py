"""The bed's kernel: Debian's source of it, built with nothing but what kernel.config asks for, no modules.

Must not know what runs on it.
"""

import shutil
from pathlib import Path

from images import kbuild
from tests.testbed import cache, debian

FRAGMENT = Path(__file__).with_name("kernel.config")
IMAGE = "bzImage"


def ensure() -> Path:
    """The bzImage, cached for this fragment and this toolchain."""
    toolchain, fragment = debian.toolchain(), FRAGMENT.read_text()

    def build(target: Path) -> None:
        output = kbuild.build(toolchain, fragment, IMAGE, target.parent)
        shutil.copyfile(output / f"arch/x86/boot/{IMAGE}", target / IMAGE)
        shutil.copyfile(output / kbuild.CONFIG, target / "config")

    return cache.entry("kernel", recipe(toolchain, fragment), build) / IMAGE


def missing() -> bool:
    """Whether ensure() would build it, which takes 15 minutes."""
    toolchain = debian.place_of("toolchain", debian.TOOLCHAIN_PACKAGES)
    return not cache.place("kernel", recipe(toolchain, FRAGMENT.read_text())).is_dir()


def recipe(toolchain: Path, fragment: str) -> list[str]:
    """What a kernel is known by."""
    return [toolchain.name, *kbuild.commands(IMAGE), fragment]
