"""Things that take minutes to make, kept by the digest of their recipe, and never half there.

    HOME/KIND-DIGEST/     one finished thing; whoever finds it may use it
    HOME/.KIND-*          one that is being made; left by somebody who was killed, it is swept away
    HOME/KIND.lock        held by whoever makes one

Must not know what the things are.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from images.files import locked

KEPT = 2  # of a kind: that of the checkout, and that of the commit it is compared with


def entry(
    home: Path, kind: str, recipe: object, make: Callable[[Path], None], say: Callable[[str], None]
) -> Path:
    """The thing of this kind and recipe (anything that json takes).

    make fills an empty directory, which becomes the thing if it returns. It may take minutes, so say is
    told when it begins and when it is done.
    """
    path = place(home, kind, recipe)
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / f"{kind}.lock"):
        if not path.exists():
            for left in home.glob(f".{kind}-*"):
                shutil.rmtree(left)
            say(f"building the {kind}")
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=f".{kind}-", dir=home) as scratch:
                made = Path(scratch, "made")
                made.mkdir()
                make(made)
                made.rename(path)
            say(f"{path} took {time.monotonic() - start:.0f} s")
        os.utime(path)  # the newest is the one used last
        for old in entries(home, kind)[KEPT:]:
            shutil.rmtree(old)
    return path


def place(home: Path, kind: str, recipe: object) -> Path:
    """Where it is, if it is there."""
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return home / f"{kind}-{digest}"


def entries(home: Path, kind: str) -> list[Path]:
    """All finished ones of a kind, the one used last first."""
    return sorted(home.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
