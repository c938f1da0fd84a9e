"""Length of captions in words: a range, counting, and cutting at the end of a sentence."""

import re
from dataclasses import dataclass

from salmonn.score.text_spans import count_words

# A full stop with the quotes and brackets that close after it. In scripts without spaces none follows.
_STOP = re.compile(
    r"[.!?\u2026]+[\"'\u201d\u2019\u00bb)\]]*(?=\s|$)|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09\u3011\u300b]*"
)
_BLANK_LINE = re.compile(r"\n[ \t]*(?=\n)")
# A full stop after one of these does not end the sentence if a name or a number follows. A word in lower case never
# starts a sentence, whatever is before it.
_ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "prof", "st", "mt", "jr", "sr", "vs", "no", "nos", "fig", "approx", "ca", "nr", "hr", "fr",
    "bzw", "vgl", "z.b", "d.h", "e.g", "i.e", "a.m", "p.m", "sra", "dra", "mme", "mlle",
))  # fmt: skip


@dataclass(frozen=True)
class WordRange:
    """Smallest and largest number of words of a caption, as `count_words` counts them."""

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(
                f"the range of words {self} is impossible; give a smallest and a largest number from 1, such as 80-120"
            )

    def __str__(self) -> str:
        return f"{self.minimum}-{self.maximum}"

    @classmethod
    def parse(cls, text: str) -> "WordRange":
        """Read a range such as "80-120"; raises a ValueError for anything else."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*[-\u2013]\s*(\d{1,6})\s*", text)
        if match is None:
            raise ValueError(
                f"the range of words must be a smallest and a largest number, such as 80-120, got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))

    def distance(self, number: int) -> int:
        """Return by how many words a number is below the range (negative) or above it (positive); 0 within it."""
        return min(number - self.minimum, 0) + max(number - self.maximum, 0)


def sentence_ends(text: str) -> list[int]:
    """Return where the sentences of a text end, in characters; a doubtful full stop does not count."""
    ends = {match.end() for match in _STOP.finditer(text) if _is_end(text, match)}
    ends |= {len(text[: match.start()].rstrip()) for match in _BLANK_LINE.finditer(text)}
    return sorted(ends - {0})


def _is_end(text: str, stop: re.Match[str]) -> bool:
    """Return whether a full stop ends a sentence instead of an abbreviation, an initial or the number of a list."""
    following = text[stop.end() :].lstrip()
    if following[:1].islower():
        return False
    if not stop[0].startswith(".") or stop[0].startswith(".."):
        return True
    line = text[: stop.start()].rpartition("\n")[2]
    word = line.rpartition(" ")[2].lstrip("\"'(\u201c\u2018")
    is_list_number = word.isdigit() and line.strip() == word
    is_abbreviation = (len(word) == 1 and word.isupper()) or word.lower() in _ABBREVIATIONS
    return not is_list_number and not (is_abbreviation and following)


def cut_at_sentence(text: str, max_words: int) -> str:
    """Return the longest beginning of a text that ends with a sentence and has at most `max_words`; "" if none has."""
    beginnings = (text[:end] for end in reversed(sentence_ends(text)))
    return next((beginning for beginning in beginnings if count_words(beginning) <= max_words), "")


def drop_unfinished_sentence(text: str) -> str:
    """Return a text without the sentence that it breaks off in; the whole text if that is its only one."""
    ends = sentence_ends(text)
    return text[: ends[-1]] if ends else text
