"""What casemate keeps itself: guest images and the directory of running pods."""

import os
from collections.abc import Iterator
from pathlib import Path

from cli.checks.result import CheckContext, Result, failure, ok, warning
from images.store import ImageStore
from rpc.errors import CasemateError
from shim.paths import run_dir

_LEAST_FREE_BYTES = 64 << 20


def images(context: CheckContext) -> Iterator[Result]:
    """The image of every profile: there, and its files what the manifest says."""
    store = ImageStore(Path(context.settings.image_dir))
    default = context.settings.profiles[context.settings.default_profile].image
    wanted = {profile.image: profile.name for profile in context.settings.profiles.values()}
    for reference, profile in sorted(wanted.items()):
        name = f"image {reference}"
        try:
            image = store.resolve(reference)
            store.verify(image)
        except CasemateError as error:
            said = error.brief if reference == default else f"{error.brief} (profile {profile})"
            level = failure if reference == default else warning
            yield level(name, said, error.hint or "casemate image build")
        else:
            yield ok(name, f"{image.digest[:19]}, {image.size_bytes >> 20} MiB, verified")


def run_directory(context: CheckContext) -> Iterator[Result]:
    path = run_dir()
    existing = next(each for each in (path, *path.parents) if each.exists())
    try:
        space = os.statvfs(existing)
    except OSError as error:
        yield failure(str(path), error.strerror or str(error), None)
        return
    free = space.f_bavail * space.f_frsize
    if free < _LEAST_FREE_BYTES:
        yield failure(
            str(path), f"{free >> 20} MiB free", "pods need a few MiB each there: free some, or enlarge it"
        )
    else:
        yield ok(str(path), f"{free >> 20} MiB free")
