"""Which huge pages of the host's a machine's RAM may be made of: by its profile, the host, the pod's cgroup.

Who gets them is the ledger's to say (vfio/ledger/).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from config.settings import Profile
from rpc.errors import FailedPrecondition
from shim.shortage import Limit
from shim.vm.backing import words
from vfio.ledger.demand import HostNode, HugePages

REQUIRED, NEVER = "required", "never"
USUAL_BYTES = 2 << 20  # x86's, and what an error speaks of where the host has none at all


@dataclass(frozen=True, slots=True)
class Ram:
    """What a machine wants. hugepages: as a profile has it."""

    size_bytes: int
    hugepages: str

    @classmethod
    def of(cls, profile: Profile) -> "Ram":
        return cls(profile.memory_bytes, profile.hugepages)

    @property
    def must(self) -> bool:
        return self.hugepages == REQUIRED

    def choices(
        self, nodes: Iterable[HostNode], limit_of: Callable[[int], Limit | None]
    ) -> Iterator[HugePages | str]:
        """The largest first; words in place of those that it cannot have, whoever has them now.

        limit_of: what of a size the pod's cgroup may have.
        """
        if self.hugepages == NEVER:
            yield 'the profile says hugepages = "never"'
            return
        sizes = {size for node in nodes for size, pages in node.pages.items() if pages.total}
        if not sizes and not self.must:
            yield "this host has no huge pages"
            return
        for size in sorted(sizes or {USUAL_BYTES}, reverse=True):
            limit = limit_of(size)
            if self.size_bytes % size:
                yield f"{words(self.size_bytes)} are no whole number of {words(size)}"
            elif limit is not None and limit.size_bytes < self.size_bytes:
                yield f"of huge pages of {words(size)}, the cgroup {limit}"
            else:
                yield HugePages(self.size_bytes // size, size)


def none_would_do(reasons: Iterable[str]) -> FailedPrecondition:
    """What is wrong where they are a must, and no pod's end would help."""
    return FailedPrecondition(
        f'hugepages = "{REQUIRED}": {"; ".join(reasons)}',
        hint='choose a memory of whole huge pages, raise the limit, or set hugepages = "auto" in the profile',
    )
