"""Finding what is quoted: words of a caption, whatever their case, punctuation, spacing and accents' encoding."""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from salmonn.score.words import WORD

_GAP = re.compile(r"\.\.\.+|\u2026|\[\u2026\]")
_PART = re.compile(r"['\u2019\-]")


def find_quote(quote: str, text: str, *, start: int = 0) -> tuple[int, int] | None:
    """Where a text holds the words of a quote: (start, end) in characters of the first place from `start` on.

    The words must follow one another; where the quote leaves some out, it says so by "...". A quote without words, such
    as an emoji, must be there as it stands; an empty one is found nowhere.
    """
    parts = [part for part in (_words(part) for part in _GAP.split(quote)) if part]
    if not parts:
        place = text.find(quote.strip(), start) if quote.strip(" .\u2026") else -1
        return None if place < 0 else (place, place + len(quote.strip()))
    places: list[tuple[int, int]] = []
    for part in parts:
        found = _find_words(tuple(word for word, _, _ in part), text, start=places[-1][1] if places else start)
        if found is None:
            return None
        places.append(found)
    return places[0][0], places[-1][1]


def find_all(quote: str, text: str) -> Iterator[tuple[int, int]]:
    """All places where a text holds the words of a quote, from left to right; they may overlap."""
    place = find_quote(quote, text)
    while place:
        yield place
        place = find_quote(quote, text, start=place[0] + 1)


def count_words(text: str) -> int:
    """Number of words of a text."""
    return len(_words(text))


def _find_words(wanted: tuple[str, ...], text: str, *, start: int) -> tuple[int, int] | None:
    words = [word for word in _words(text) if word[1] >= start]
    for place in range(len(words) - len(wanted) + 1):
        if all(words[place + step][0] == word for step, word in enumerate(wanted)):
            return words[place][1], words[place + len(wanted) - 1][2]
    return None


@lru_cache(maxsize=1024)
def _words(text: str) -> list[tuple[str, int, int]]:
    """Words with their places; "low-pitched" is two, since some write it so."""
    words = []
    for found in WORD.finditer(text):
        first = found.start()
        for part in _PART.split(found[0]):
            words.append((unicodedata.normalize("NFC", part).casefold(), first, first + len(part)))
            first += len(part) + 1
    return words
