"""The word that somebody probably meant. Only loaded once something is already wrong."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    matches = get_close_matches(word[:80], list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    found = nearest(word, known)
    return None if found is None else f"did you mean {found}?"
