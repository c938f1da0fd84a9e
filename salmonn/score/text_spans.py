"""Words of a text in any language, and quotes located in it.

Quotes match regardless of case, punctuation, spacing and the encoding of accents.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

CharSpan = tuple[int, int]  # start and end, in characters

# Scripts without spaces between words, where each character counts as a word: Chinese, Japanese, Thai, Lao, Burmese,
# Khmer.
_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_COMBINING = "\u0300-\u036f"  # accents of decomposed text
_LETTER = rf"[^\W_{_SINGLE}][{_COMBINING}]*"
WORD = re.compile(rf"(?:{_LETTER})+(?:['\u2019\-](?:{_LETTER})+)*|[{_SINGLE}]")
ARTICLES = frozenset(("a", "an", "the"))

_ELLIPSIS = re.compile(r"\.\.\.+|\u2026|\[\u2026\]")
_WORD_JOINER = re.compile(r"['\u2019\-]")


def find_quote(quote: str, text: str, *, start: int = 0) -> CharSpan | None:
    """Return the first place at or after `start` where a text contains the words of a quote.

    The words must be adjacent, except where the quote has "...". A quote without words, such as an emoji, must occur
    literally; an empty one is never found.
    """
    parts = [words for part in _ELLIPSIS.split(quote) if (words := [word for word, _, _ in _split_words(part)])]
    if not parts:
        place = text.find(quote.strip(), start) if quote.strip(" .\u2026") else -1
        return None if place < 0 else (place, place + len(quote.strip()))
    spans: list[CharSpan] = []
    for part in parts:
        span = _find_words(part, text, start=spans[-1][1] if spans else start)
        if span is None:
            return None
        spans.append(span)
    return spans[0][0], spans[-1][1]


def find_all_quotes(quote: str, text: str) -> Iterator[CharSpan]:
    """Yield all places where a text contains the words of a quote, from left to right; they may overlap."""
    place = find_quote(quote, text)
    while place:
        yield place
        place = find_quote(quote, text, start=place[0] + 1)


def count_words(text: str) -> int:
    """Return the number of words; "low-pitched" counts as two, because some write it so."""
    words = WORD.findall(text)
    return len(words) + sum(len(_WORD_JOINER.findall(word)) for word in words)


def overlap(span: CharSpan, other: CharSpan) -> bool:
    """Return whether two spans share a character."""
    return span[0] < other[1] and other[0] < span[1]


def _find_words(quote: list[str], text: str, *, start: int) -> CharSpan | None:
    words = [word for word in _split_words(text) if word[1] >= start]
    for first in range(len(words) - len(quote) + 1):
        if all(words[first + step][0] == word for step, word in enumerate(quote)):
            return words[first][1], words[first + len(quote) - 1][2]
    return None


@lru_cache(maxsize=1024)
def _split_words(text: str) -> list[tuple[str, int, int]]:
    """Return the normalized words of a text with their start and end."""
    words = []
    for found in WORD.finditer(text):
        start = found.start()
        for part in _WORD_JOINER.split(found[0]):
            words.append((unicodedata.normalize("NFC", part).casefold(), start, start + len(part)))
            start += len(part) + 1
    return words
