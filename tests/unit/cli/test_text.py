"""What a guest writes never reaches the terminal as anything but text."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cli.text import Cleaner, clean, one_line

HARMLESS = {"\n", "\t"}


def is_safe(text: str) -> bool:
    return all(
        character in HARMLESS or not (ord(character) < 32 or 127 <= ord(character) < 160)
        for character in text
    ) and not any(character in text for character in "\u202e\u2066\u2028\ufeff\u200b")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain\ttext\nüñ✓", "plain\ttext\nüñ✓"),
        ("line\r\n", "line\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[H\x1b[?25l!", "!"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]52;c;cm0gLXJm\x1b\\x", "x"),  # the clipboard
        ("\x1bcreset", "reset"),
        ("\x1b(0x", "x"),
        ("back\bspace", "back\\x08space"),
        ("over\rwrite", "over\\x0dwrite"),
        ("\x9b31m", "\\x9b31m"),  # CSI in one byte
        ("\x1bP+q\x1b\\", "\\x1bP+q\\x1b\\"),  # DCS: unknown ones stay visible
        ("\x7f\x00", "\\x7f\\x00"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@given(st.text(alphabet=st.characters() | st.sampled_from("\x1b[]\x07;m\\\r0")))
def test_clean_text_is_safe_and_stays_as_it_is(text: str) -> None:
    once = clean(text)
    assert is_safe(once)
    assert clean(once) == once


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_text_without_control_characters_is_untouched(text: str) -> None:
    assert clean(text) == text


def test_one_line_is_one_line() -> None:
    assert one_line(" a\n\tb\x0b c\r\n") == "a b c"
    assert one_line(None) == "None"


stream = st.binary(max_size=60) | st.lists(
    st.sampled_from(
        [b"\x1b", b"[31m", b"]0;t", b"\x07", b"\r", b"\n", b"a", "ü".encode(), b"\xff", b"\x1b[0m"]
    )
).map(b"".join)


@given(stream, st.lists(st.integers(0, 60), max_size=5))
@example(b"\r\x1b[@\n", [2])
@example(b"\r\x1b[@\n", [4])
def test_a_stream_cut_anywhere_is_safe_and_complete(data: bytes, cuts: list[int]) -> None:
    cleaner = Cleaner()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    text = "".join(cleaner.feed(data[start:end]) for start, end in pairwise(edges)) + cleaner.feed(
        b"", last=True
    )
    assert is_safe(text)
    # Cut or not, nothing is lost: the same as in one piece.
    assert text == clean(data.decode(errors="backslashreplace"))


def test_an_endless_sequence_is_not_kept_for_ever() -> None:
    cleaner = Cleaner()
    said = "".join(cleaner.feed(b"\x1b]0;" if number == 0 else b"x" * 100) for number in range(10))
    assert len(said) > 500


def test_invalid_utf8_is_shown() -> None:
    assert Cleaner().feed(b"\xff\xfe", last=True) == "\\xff\\xfe"
