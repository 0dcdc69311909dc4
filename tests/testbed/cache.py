"""Where what the bed is made of is kept between runs.

Must not know what the things are, nor how they are kept (images/entries.py does).
"""

from collections.abc import Callable
from pathlib import Path

from images import entries
from scripts.host import CACHE, say

HOME = CACHE / "testbed"


def entry(kind: str, recipe: object, build: Callable[[Path], None]) -> Path:
    """The bed's part of this kind and recipe (images.entries.entry)."""
    return entries.entry(HOME, kind, recipe, build, lambda text: say(f"testbed: {text}"))


def place(kind: str, recipe: object) -> Path:
    """Where entry() has it, if it has been built."""
    return entries.place(HOME, kind, recipe)
