"""Lists of CPUs, or of NUMA nodes, as the kernel writes them: 0-3,8. It must not know what they are for."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_CPUS = 8192  # that Linux can be built for on x86 (CONFIG_NR_CPUS)


def numbers(text: str) -> list[int]:
    """Of what the kernel wrote; [] of nothing."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def ranges(of: "Iterable[int]") -> str:
    """0-3,8 of 0, 1, 2, 3, 8 in any order."""
    runs: list[list[int]] = []
    for number in sorted(of):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def checked(text: str) -> str:
    """What an operator wrote, in order and each number once; "" stays. Raises ValueError."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(",") if text.strip() else ():
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        if not all(
            end.isascii() and end.isdecimal() and len(end) <= 4 and int(end) < MOST_CPUS for end in ends
        ):
            raise ValueError(f'{text[:80]!r} is not a list of CPUs such as "2-7,10"')
        if int(ends[1]) < int(ends[0]):
            raise ValueError(f"{part!r} ends before it begins")
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    return ranges(found)
