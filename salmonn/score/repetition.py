"""What a caption says again: `repeated_words` counts it, `repeated_spans` says where. No judge is needed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from salmonn.score.words import ARTICLES, WORD

_SENTENCE_END = re.compile(r"[.!?;:\n]+")
_CONJUNCTION = "and|then|while|whilst|before|after|until|but|meanwhile"
# A conjunction stays with the piece that it leads in; "and then" is one.
_CUT = re.compile(rf"\s*,\s*|(?<!\band)(?<!\bbut)\s+(?=(?:{_CONJUNCTION})\b)", re.IGNORECASE)
# What leads a clause in without being part of it.
_LEAD = re.compile(
    rf"\W*(?:(?:at the (?:start|end|same time|beginning)|in the end|after (?:that|this)|next|finally|first"
    rf"|afterwards|also|so|{_CONJUNCTION})\b\W*)*",
    re.IGNORECASE,
)
_PRONOUNS = frozenset(("it", "they", "he", "she", "this", "these"))
# With these a clause has a subject of its own; any other clause shares the subject of the clause before.
_SUBJECTS = frozenset(("a", "an", "the", "another", "there", "here", "we", "you", "i", "one", "some", "two", "three"))
# A shorter piece of a sentence ("red circle") may come again in good prose ("a red circle and a blue square").
_MIN_WORDS = 3
_LOOP = re.compile(r"\b(\w+(?: \w+){0,7}?)(?: \1){2,}\b")


def repeated_words(text: str) -> tuple[int, int]:
    """Words in clauses that came before in the same text, and all words.

    The text is cut at sentence ends, commas and conjunctions; clauses are compared without case, leading connectives
    and articles. In "A red star blinks. It moves up, and then the red star blinks. A red st" the clauses are "red star
    blinks", "it moves up", "red star blinks" (6 words with "and then the") and "red st": 6 of the 16 words stand in a
    clause that came before. The tail is cut off and begins an earlier clause, right after a repeated one: 9 of 16.

    A clause without a subject of its own ("it blinks", "then blinks") is repeated only if the subject's clause is the
    same. Pieces of a sentence below 3 words count only right after themselves. A phrase said three times or more in a
    row within a clause counts after its first time.
    """
    clauses = _cut(text)
    said_again = sum(
        clause.num_words if is_again else _looped_words(clause.words) for clause, is_again in _mark(clauses, text)
    )
    return said_again, sum(clause.num_words for clause in clauses)


def repeated_spans(text: str) -> list[tuple[int, int]]:
    """Where the words that `repeated_words` counts stand: (start, end) of characters, from left to right."""
    spans = []
    for clause, is_again in _mark(_cut(text), text):
        if is_again:
            spans.append((clause.start, clause.end))
        else:
            places = [word.span() for word in WORD.finditer(text, clause.start, clause.end)]
            own = places[len(places) - len(clause.words.split()) :]
            for loop in _LOOP.finditer(clause.words):
                first, last = (len(clause.words[:end].split()) for end in (loop.end(1), loop.end()))
                spans.append((own[first][0], own[last - 1][1]))
    return spans


def _mark(clauses: list["_Clause"], text: str) -> Iterator[tuple["_Clause", bool]]:
    """Each clause, and whether all of it was said before."""
    is_ended = re.search(r"[.!?]\W*$", text) is not None
    seen: set[tuple[str, ...]] = set()
    is_looping = False
    last: tuple[str, ...] | None = None
    for place, clause in enumerate(clauses):
        is_again = clause.key in seen and (clause.key == last or clause.is_whole or clause.is_long)
        if not is_ended and place == len(clauses) - 1:
            is_again |= _is_cut_off(clause, seen, is_looping=is_looping)
        yield clause, is_again
        is_looping, last = is_again or _looped_words(clause.words) > 0, clause.key
        seen.add(clause.key)


@dataclass(frozen=True)
class _Clause:
    key: tuple[str, ...]  # (subject's clause where it has none itself, own words without articles)
    words: str
    num_words: int
    start: int  # where it stands in the text
    end: int
    is_whole: bool = False  # a whole sentence
    is_long: bool = False


def _cut(text: str) -> list[_Clause]:
    clauses: list[_Clause] = []
    anchor, num_words, begin = "", 0, 0
    for first, last in _split(_SENTENCE_END, text, 0, len(text)):
        pieces = [
            (start, end, WORD.findall(_LEAD.sub("", text[start:end], count=1).lower()))
            for start, end in _split(_CUT, text, first, last)
        ]
        is_whole = sum(bool(words) for _, _, words in pieces) == 1
        is_first = True
        for start, end, words in pieces:
            # "Then, ..." and "At the start, ..." belong to the clause that they lead in.
            begin = begin if num_words else start
            num_words += len(WORD.findall(text, start, end))
            if not words:
                continue
            own = " ".join(word for word in words if word not in ARTICLES)
            is_pronoun = words[0] in _PRONOUNS
            leans = is_pronoun or (not is_first and words[0] not in _SUBJECTS)
            leans = leans and own != anchor  # "beep, beep, beep"
            anchor = anchor if leans else own
            is_long = is_pronoun or own.count(" ") + 1 >= _MIN_WORDS
            key = (anchor, own) if leans else (own,)
            clauses.append(_Clause(key, " ".join(words), num_words, begin, end, is_whole, is_long))
            num_words, is_first = 0, False
    if num_words:
        clauses.append(_Clause(("",), "", num_words, begin, len(text)))
    return clauses


def _split(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Like `pattern.split(text[start:end])`, with places in the text in place of pieces, without space around them."""
    cuts = [(start + cut.start(), start + cut.end()) for cut in pattern.finditer(text[start:end])]
    for first, last in zip([start, *(after for _, after in cuts)], [*(before for before, _ in cuts), end], strict=True):
        piece = text[first:last]
        yield first + len(piece) - len(piece.lstrip()), last - len(piece) + len(piece.rstrip())


def _looped_words(words: str) -> int:
    return sum(len(loop[0].split()) - len(loop[1].split()) for loop in _LOOP.finditer(words))


def _is_cut_off(clause: _Clause, seen: set[tuple[str, ...]], *, is_looping: bool) -> bool:
    """Whether the last clause begins an earlier one: of a loop that goes on, or long enough to tell."""
    if not (is_looping or clause.is_long):
        return False
    return any(key[:-1] == clause.key[:-1] and key[-1].startswith(clause.key[-1]) for key in seen)
