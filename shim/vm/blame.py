"""Whether a template is to blame for a pod that could not be restored from it, and had to be booted.

It is discarded for that, and until another one is made all pods like this one are booted: no pod is to have
that done by being slow. It must not know how machines are made.
"""

from typing import Self

from rpc.errors import CasemateError, DeadlineExceeded, Unavailable


class TemplateUnusable(Unavailable):
    """This template cannot be restored from: a boot might work. waited_s: for how long in vain; None where it
    was refused."""

    waited_s: float | None = None

    @classmethod
    def because(cls, brief: str, error: CasemateError, limit_s: float) -> Self:
        """error: of what had limit_s to go well."""
        unusable = cls(brief, str(error))
        if isinstance(error, DeadlineExceeded):
            unusable.waited_s = limit_s
        return unusable


def is_excused(error: CasemateError, booted_s: float) -> bool:
    """booted_s: how long the boot took instead. Where a pod may use little of a processor (by its cgroup),
    all is slow."""
    waited_s = error.waited_s if isinstance(error, TemplateUnusable) else None
    return waited_s is not None and booted_s >= waited_s
