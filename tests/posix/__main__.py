"""Tries every place by every way and writes docs/filesystems.md: what `make posix` becomes.

What is asked for in part is printed.
"""

import argparse
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from bench import ways
from bench.stand import Stand, scratch_directory
from config.load import load
from config.programs import virtiofsd
from images import oci
from images.packages import Form, Request, fetch
from images.store import ImageStore
from rpc.errors import CasemateError, FailedPrecondition
from scripts.host import CHECKOUT, main_guard, run, say
from tests.posix import page, programs, trying
from tests.posix.places import PLACES, ROOT, Place
from tests.posix.trying import Tried

IMAGE = "localhost/casemate/posix:latest"
RUNC, VIRTIOFS, NINEP = "runc", "casemate-virtiofs", "casemate-9p"
WHERE: dict[str, Sequence[Place]] = {RUNC: PLACES, VIRTIOFS: PLACES, NINEP: (ROOT,)}
"""9p is for a container's root (docs/architecture.md); a tmpfs and a disk are the guest's own either way."""


OURS, NAMES = [VIRTIOFS, NINEP], [place.name for place in PLACES]
PAGE = CHECKOUT / "docs/filesystems.md"
LACKING = re.compile(r'files = 9p, but ([^:;("\n]+)')
"""What designer.py says of a machine that cannot have it."""


def archive(directory: Path) -> Path:
    """The demo's image, with the programs in it."""
    layer = directory / "layer.tar"
    shutil.copyfile(fetch(Request(oci.DEMO_PACKAGES, Form.INSTALLED)).path, layer)
    with tarfile.open(layer, "a") as tar:
        for name, (content, mode) in trying.files(programs.ensure()).items():
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mode = len(content), mode
            tar.addfile(member, BytesIO(content))
    made = directory / "image.tar"
    oci.write_archive(oci.OciImage(IMAGE), layer, made)
    return made


def try_way(name: str, image: Path, places: Sequence[Place]) -> list[Tried]:
    """Raises FailedPrecondition if this machine cannot run it."""
    with Stand([ways.parse(name)], image, say) as stand:
        stand.warm_up()
        done = []
        for place in places:
            say(f"{name}: {place.name}")
            done.append(trying.try_all(stand.runners[name], place))
        return done


def facts() -> dict[str, str]:
    """What the page says of this machine."""
    settings = load()
    guest = ImageStore(Path(settings.image_dir)).resolve(settings.profiles[settings.default_profile].image)
    server = run([virtiofsd(settings), "--version"], quiet=True).splitlines()[0]
    return {
        "pjdfstest": str(programs.PJDFSTEST),
        "fsx": str(programs.FSX),
        "kernel": str(guest.manifest["kernel"]),
        "virtiofsd": server,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make posix", description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=OURS, default=OURS, help="beside runc; all unless given")
    parser.add_argument("--places", nargs="+", choices=NAMES, default=NAMES, help="all unless given")
    parser.add_argument("--json", type=Path, help="write what came out there, too")
    asked = parser.parse_args()
    try:
        return run_all(asked)
    except CasemateError as error:
        return main_guard(error)


def run_all(asked: argparse.Namespace) -> int:
    found: list[Tried] = []
    left_out: dict[str, str] = {}
    with scratch_directory() as scratch:
        image = archive(scratch)
        for name in (RUNC, *asked.ways):
            places = [one for one in WHERE[name] if one.name in asked.places]
            try:
                found += try_way(name, image, places)
            except FailedPrecondition as error:
                lacking = LACKING.search(f"{error.details}")
                if lacking is None:
                    raise
                left_out[name] = lacking[1].strip()
                say(f"{name} is left out: {left_out[name]}")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
    made = page.page(found, left_out, facts())
    if (asked.ways, asked.places) == (OURS, NAMES):
        PAGE.write_text(made)
    else:
        print(made)
    new = page.unexplained(found)
    for one in new:
        say(f"{one.way}, {one.place}: {one.test}: {one.ours}")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
