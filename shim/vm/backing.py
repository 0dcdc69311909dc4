"""What the RAM of a machine with devices is made of: which pages, of which NUMA nodes of the host's.

That also says which nodes the guest has: one for each of these. It must not know who has a page.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from config.cpulist import numbers

MIB = 1 << 20
STRICT, PREFERRED, ANYWHERE = "strict", "preferred", ""
"""Where a node's memory is: nowhere else, elsewhere if there is none left, wherever the kernel likes."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A NUMA node of the guest's. host: the number of the host's that it stands for. cpus: of the host's, on
    which its CPUs run; none leaves that open."""

    host: int
    memory_bytes: int
    policy: str = PREFERRED
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Backing:
    """page_bytes: the size of its huge pages; 0 for ordinary ones, and why. cells: by their numbers in the
    guest, which has no nodes without any."""

    page_bytes: int = 0
    why: str = ""
    cells: tuple[Cell, ...] = ()

    def cell_of(self, node: int | None) -> int | None:
        """The guest's number of a node of the host's."""
        return next((number for number, cell in enumerate(self.cells) if cell.host == node), None)

    def of_nobody(self) -> "Backing":
        """The same nodes of the guest's, wherever their memory and CPUs are."""
        return Backing(0, "", tuple(replace(each, policy=ANYWHERE, cpus=()) for each in self.cells))

    def __str__(self) -> str:
        pages = f"huge pages of {words(self.page_bytes)}" if self.page_bytes else "ordinary pages"
        at = f", NUMA nodes {', '.join(str(cell.host) for cell in self.cells)}" if self.cells else ""
        return pages + at + (f" ({self.why})" if self.why else "")


def cells_of(memory_bytes: int, nodes: Sequence[int], allowed: Collection[int]) -> tuple[Cell, ...]:
    """Of ordinary pages, evenly; a strict policy would have the kernel end QEMU where a node is full.

    allowed: which nodes' memory this process may have at all.
    """
    mib, count = memory_bytes // MIB, len(nodes)
    return tuple(
        Cell(node, share(mib, index, count) * MIB, PREFERRED if node in allowed else ANYWHERE)
        for index, node in enumerate(nodes)
    )


def share(total: int, index: int, of: int) -> int:
    """What one of several has of it; the first have what is left over."""
    return total // of + (index < total % of)


def cpus_of(vcpus: int, cells: int) -> Iterator[range]:
    """Of each cell, in blocks; the last ones may have none."""
    first = 0
    for index in range(cells):
        count = share(vcpus, index, cells)
        yield range(first, first + count)
        first += count


def words(page_bytes: int) -> str:
    """2 MiB, 1 GiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", MIB)):
        if page_bytes % size == 0:
            return f"{page_bytes // size} {unit}"
    return f"{page_bytes >> 10} KiB"


def allowed_nodes(proc: str) -> list[int]:
    """Whose memory this process may have (proc(5))."""
    return _allowed(proc, "Mems_allowed_list:")


def allowed_cpus(proc: str) -> list[int]:
    """On which this process may run (proc(5))."""
    return _allowed(proc, "Cpus_allowed_list:")


def _allowed(proc: str, name: str) -> list[int]:
    with open(f"{proc}/self/status", encoding="utf-8", errors="replace") as file:
        said = next((line.partition(":")[2].strip() for line in file if line.startswith(name)), "")
    return numbers(said)
