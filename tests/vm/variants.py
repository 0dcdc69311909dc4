"""Guest images of the variants, for tests that are skipped where nobody has made what they take."""

import os
from pathlib import Path

import pytest

from images import builder
from images.image import GuestImage
from images.store import ImageStore
from images.variant import Variant

VARIABLE = "CASEMATE_TEST_VARIANT"
"""Variants to be built for their tests, separated by commas."""


def image(variant: Variant, store: Path, *, kept: bool) -> GuestImage:
    """Of this checkout. Skips the test if it was not asked for, and what takes its time is not kept here."""
    if variant not in os.environ.get(VARIABLE, "").split(",") and not kept:
        pytest.skip(f"what the image variant {variant} takes is not here: {VARIABLE}={variant} has it made")
    options = builder.Options(variant=variant)
    images = ImageStore(store)
    return builder.current(images, options) or builder.build(images, options).image
