"""Finding what is quoted: words of a caption, whatever their case, punctuation and spacing."""

import re
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+")
_GAP = re.compile(r"\.\.\.+|\u2026|\[\u2026\]")


def find_quote(quote: str, text: str, *, start: int = 0) -> tuple[int, int] | None:
    """Where a text holds the words of a quote: (start, end) in characters of the first place from `start` on.

    The words must follow one another; where the quote leaves some out, it says so by "...". A quote without words is
    found nowhere.
    """
    parts = [part for part in (_words(part) for part in _GAP.split(quote)) if part]
    places: list[tuple[int, int]] = []
    for part in parts:
        place = _find_words(tuple(word for word, _, _ in part), text, start=places[-1][1] if places else start)
        if place is None:
            return None
        places.append(place)
    return (places[0][0], places[-1][1]) if places else None


def _find_words(wanted: tuple[str, ...], text: str, *, start: int) -> tuple[int, int] | None:
    words = [word for word in _words(text) if word[1] >= start]
    for place in range(len(words) - len(wanted) + 1):
        if all(words[place + step][0] == word for step, word in enumerate(wanted)):
            return words[place][1], words[place + len(wanted) - 1][2]
    return None


@lru_cache(maxsize=1024)
def _words(text: str) -> list[tuple[str, int, int]]:
    return [(word[0].casefold(), *word.span()) for word in _WORD.finditer(text)]
