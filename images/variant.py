"""Guest images that have more than the others: what they are called. Must not know how they are made."""

from enum import StrEnum


class Variant(StrEnum):
    """What an image has beyond every other: the driver for the devices of one vendor."""

    NVIDIA = "nvidia"

    def of(self, name: str) -> str:
        """The name of the image that is like the one of this name, and has it."""
        return f"{name}-{self}"
