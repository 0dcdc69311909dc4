"""What is shown of an instance's kernel when it failed."""

from tests.testbed.machine import FEW, MANY, last_words

QUIET = [f"line {number}" for number in range(40)]


def test_without_any_trouble_it_is_the_last_lines() -> None:
    assert last_words("\n".join(QUIET)) == QUIET[-FEW:]


def test_from_the_first_trouble_on_it_is_all() -> None:
    trouble = ["BUG: unable to handle page fault for address: ffff887f9185b018", "Kernel panic - not syncing"]
    text = [*QUIET[:20], trouble[0], *QUIET[20:], trouble[1]]
    assert last_words("\n".join(text)) == text[20:]


def test_of_much_it_is_the_beginning_and_the_end() -> None:
    text = ["Oops: 0000", *(f"line {number}" for number in range(4 * MANY)), "Kernel panic - not syncing"]
    shown = last_words("\n".join(text))
    assert shown == text[:MANY] + text[-FEW:]
