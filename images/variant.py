"""Guest images that have more than the others: what they are called, and what their driver is made of.

Must not know how they are made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Variant(StrEnum):
    """What an image has beyond every other: the driver for the devices of one vendor."""

    NVIDIA = "nvidia"
    AMD = "amd"

    def of(self, name: str) -> str:
        """The name of the image that is like the one of this name, and has it."""
        return f"{name}-{self}"


@dataclass(frozen=True, slots=True)
class Driver:
    """modules: files, for one kernel, beside those of its package. tree: unpacked packages. versions: of all
    packages that made it."""

    version: str
    modules: tuple[Path, ...]
    tree: Path
    versions: Mapping[str, str]
