"""Repetition inside a caption, found by rules: `count_repeated_words` and `find_repeated_spans`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from salmonn.score.text_spans import ARTICLES, WORD, CharSpan

_SENTENCE_END = re.compile(r"[.!?;:\n]+")
_CONJUNCTION = "and|then|while|whilst|before|after|until|but|meanwhile"
# A conjunction stays with the clause that it introduces; "and then" is one conjunction.
_CUT = re.compile(rf"\s*,\s*|(?<!\band)(?<!\bbut)\s+(?=(?:{_CONJUNCTION})\b)", re.IGNORECASE)
# Connectives that introduce a clause without being part of it.
_LEAD = re.compile(
    rf"\W*(?:(?:at the (?:start|end|same time|beginning)|in the end|after (?:that|this)|next|finally|first"
    rf"|afterwards|also|so|{_CONJUNCTION})\b\W*)*",
    re.IGNORECASE,
)
_PRONOUNS = frozenset(("it", "they", "he", "she", "this", "these"))
# A clause that starts with one of these has its own subject; any other shares the subject of the previous clause.
_SUBJECTS = frozenset(("a", "an", "the", "another", "there", "here", "we", "you", "i", "one", "some", "two", "three"))
# Shorter parts of a sentence ("red circle") recur in good prose too ("a red circle and a blue square").
_MIN_WORDS = 3
_RUN = re.compile(r"\w+")
_LOOP = re.compile(r"\b(\w+(?: \w+){0,7}?)(?: \1){2,}\b")


def count_repeated_words(text: str) -> tuple[int, int]:
    """Return the number of words in clauses that repeat an earlier clause of the text, and the number of all words.

    The text is split at sentence ends, commas and conjunctions; clauses are compared without case, leading connectives
    and articles. In "A red star blinks. It moves up, and then the red star blinks. A red st" the clauses are "red star
    blinks", "it moves up", "red star blinks" (6 words with "and then the") and "red st": 6 of the 16 words are in a
    repeated clause. The last clause is cut off and starts like an earlier one, right after a repeated one: 9 of 16.

    A clause without its own subject ("it blinks", "then blinks") is repeated only if the clause with its subject is the
    same. Parts of a sentence with fewer than 3 words count only directly after themselves. A phrase that occurs three
    times or more in a row within a clause counts from its second occurrence.
    """
    clauses = list_clauses(text)
    num_repeated = sum(
        clause.num_words if is_repeated else _count_looped_words(clause.words)
        for clause, is_repeated in _mark_repeated(clauses, text)
    )
    return num_repeated, sum(clause.num_words for clause in clauses)


def find_repeated_spans(text: str) -> list[CharSpan]:
    """Return the places of the words that `count_repeated_words` counts, from left to right."""
    spans = []
    for clause, is_repeated in _mark_repeated(list_clauses(text), text):
        if is_repeated:
            spans.append((clause.start, clause.end))
        else:
            places = _own_words(clause, text)
            for loop in _LOOP.finditer(clause.words):
                first, last = (len(clause.words[:end].split()) for end in (loop.end(1), loop.end()))
                spans.append((places[first][0], places[last - 1][1]))
    return spans


def find_clauses(text: str) -> list[CharSpan]:
    """Return the places of the clauses of a text, without the words that introduce them, from left to right."""
    clauses = [(clause, _own_words(clause, text)) for clause in list_clauses(text)]
    return [(words[0][0], max(clause.end, words[-1][1])) for clause, words in clauses if words]


def remove_clauses(text: str, spans: Sequence[CharSpan]) -> str:
    """Remove the clauses whose own words all lie in the given places, and the conjunctions that introduce them.

    "A star appears, and a low tone is heard. Then a low tone is heard while the star moves." without its second tone is
    "A star appears, and a low tone is heard. The star moves." Clauses that another one depends on are kept: those
    before a pronoun ("it moves up") or a verb without a subject.
    """
    clauses = list_clauses(text)
    places = [_own_words(clause, text) for clause in clauses]
    removed = [
        bool(words) and all(any(start <= word[0] and word[1] <= end for start, end in spans) for word in words)
        for words in places
    ]
    # From the right, so that a chain of dependent clauses is kept or removed as a whole.
    for index in range(len(clauses) - 2, -1, -1):
        removed[index] &= removed[index + 1] or not clauses[index + 1].is_dependent
    kept, sentences = "", list(_split(_SENTENCE_END, text, 0, len(text)))
    for number, (start, end) in enumerate(sentences):
        after = sentences[number + 1][0] if number + 1 < len(sentences) else len(text)
        sentence, was_removed = "", False
        for index, clause in enumerate(clauses):
            if not start <= clause.start < end:
                continue
            if removed[index]:
                was_removed = True
            elif sentence:
                sentence += text[clauses[index - 1].end : clause.start] + text[clause.start : clause.end]
            elif was_removed:
                first = places[index][0][0] if places[index] else clause.start
                sentence = text[first].upper() + text[first + 1 : clause.end]
            else:
                sentence = text[start : clause.end]
        kept += sentence + text[end:after] if sentence else ""
    return kept.strip()


def _own_words(clause: "ClauseSpan", text: str) -> list[CharSpan]:
    """Return the places of a clause's words without those that introduce it."""
    places = [word.span() for word in WORD.finditer(text, clause.start, clause.end)]
    return places[len(places) - len(clause.words.split()) :]


@dataclass(frozen=True)
class ClauseSpan:
    """A clause of a text.

    Args:
        key: own words, in lower case and without articles; after those of the clause whose subject it shares, if any.
        words: own words, in lower case.
        num_words: number of words, with those that introduce the clause.
        start, end: place in the text, with the words that introduce it.
        is_sentence: whether it is a whole sentence.
        is_long: whether it is long enough to be compared with clauses elsewhere in the text.
        is_dependent: whether it shares the subject of a clause before.
    """

    key: tuple[str, ...]
    words: str
    num_words: int
    start: int
    end: int
    is_sentence: bool = False
    is_long: bool = False
    is_dependent: bool = False


def _mark_repeated(clauses: list[ClauseSpan], text: str) -> Iterator[tuple[ClauseSpan, bool]]:
    """Yield each clause, and whether all of it repeats an earlier one."""
    ends_properly = re.search(r"[.!?]\W*$", text) is not None
    seen: set[tuple[str, ...]] = set()
    is_looping = False
    previous: tuple[str, ...] | None = None
    for number, clause in enumerate(clauses, start=1):
        is_repeated = clause.key in seen and (clause.key == previous or clause.is_sentence or clause.is_long)
        # A truncated last clause counts if it begins an earlier one and continues a loop, or is long enough to be sure.
        if number == len(clauses) and not ends_properly and (is_looping or clause.is_long):
            is_repeated |= any(key[:-1] == clause.key[:-1] and key[-1].startswith(clause.key[-1]) for key in seen)
        yield clause, is_repeated
        is_looping, previous = is_repeated or _count_looped_words(clause.words) > 0, clause.key
        seen.add(clause.key)


def list_clauses(text: str) -> list[ClauseSpan]:
    """Split a text at sentence ends, commas and conjunctions; a last one without words of its own has an empty key."""
    clauses: list[ClauseSpan] = []
    subject, num_words, clause_start = "", 0, 0
    for sentence_start, sentence_end in _split(_SENTENCE_END, text, 0, len(text)):
        parts = [
            (start, end, WORD.findall(_LEAD.sub("", text[start:end], count=1).lower()))
            for start, end in _split(_CUT, text, sentence_start, sentence_end)
        ]
        is_sentence = sum(bool(words) for _, _, words in parts) == 1
        is_first = True
        for start, end, words in parts:
            # "Then, ..." and "At the start, ..." belong to the clause that they introduce.
            clause_start = clause_start if num_words else start
            num_words += len(WORD.findall(text, start, end))
            if not words:
                continue
            own = " ".join(word for word in words if word not in ARTICLES)
            is_pronoun = words[0] in _PRONOUNS
            shares_subject = is_pronoun or (not is_first and words[0] not in _SUBJECTS)
            shares_subject = shares_subject and own != subject  # "beep, beep, beep"
            subject = subject if shares_subject else own
            is_long = is_pronoun or own.count(" ") + 1 >= _MIN_WORDS
            key = (subject, own) if shares_subject else (own,)
            clauses.append(
                ClauseSpan(key, " ".join(words), num_words, clause_start, end, is_sentence, is_long, shares_subject)
            )
            num_words, is_first = 0, False
    if num_words:
        clauses.append(ClauseSpan(("",), "", num_words, clause_start, len(text)))
    return clauses


def _split(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[CharSpan]:
    """Split text[start:end] like `pattern.split`, but yield the places of the parts, without surrounding space."""
    cuts = [(start + cut.start(), start + cut.end()) for cut in pattern.finditer(text[start:end])]
    for first, last in zip([start, *(after for _, after in cuts)], [*(before for before, _ in cuts), end], strict=True):
        part = text[first:last]
        yield first + len(part) - len(part.lstrip()), last - len(part) + len(part.rstrip())


def _count_looped_words(words: str) -> int:
    runs = _RUN.findall(words)
    if len(runs) - len(set(runs)) < 2:  # no word occurs three times, which is much faster to see
        return 0
    return sum(len(loop[0].split()) - len(loop[1].split()) for loop in _LOOP.finditer(words))
