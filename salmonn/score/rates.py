"""From scores to rates: missing, hallucination and total over a set, repetition, and accuracy on questions.

Rates are micro-averages (counts are summed over all clips before dividing; source: arXiv 2410.06682). `repeated_words`
needs no judge and reads any text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from salmonn.records import Caption, Reference, Score

_WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
_ARTICLES = frozenset(("a", "an", "the"))
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


@dataclass(frozen=True)
class Rates:
    """Rates of a set, as fractions (0.42 is 42 %); hallucination and total can exceed 1. `clips` counts videos."""

    missing: float
    hallucination: float
    total: float
    repetition: float
    qa_accuracy: float | None = None
    clips: int = 0


def rates(scores: Sequence[Score], *, qa_accuracy: float | None = None) -> Rates:
    """Rates over all scores: Missing = sum M / sum N, Hallucination = sum (I + H) / sum N, Total = their sum.

    Repetition is repeated words / all words.

    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("no scores: rates need at least one scored caption")
    num_events = max(sum(score.num_events for score in scores), 1)
    missing = sum(score.missing for score in scores) / num_events
    hallucination = sum(score.incorrect + score.hallucinated for score in scores) / num_events
    num_words = sum(score.num_words for score in scores)
    return Rates(
        missing=missing,
        hallucination=hallucination,
        total=missing + hallucination,
        repetition=sum(score.num_repeated_words for score in scores) / max(num_words, 1),
        qa_accuracy=qa_accuracy,
        clips=len({score.video for score in scores}),
    )


def qa_accuracy(references: Mapping[str, Reference], answers: Sequence[Caption]) -> float:
    """Share of the references' questions that are answered by exact match, apart from case, punctuation and articles.

    An answer's `prompt` is its question. A question without an answer counts as wrong.

    Raises:
        ValueError: there is no question; or an answer to a question that is not in the references, or a second one.
    """
    truths = {
        (video, question.question): question.answer
        for video, reference in references.items()
        for question in reference.questions
    }
    if not truths:
        raise ValueError("the references hold no questions")
    given: dict[tuple[str, str], str] = {}
    for answer in answers:
        key = answer.video, answer.prompt
        if key not in truths or key in given:
            what = "is answered twice" if key in given else "is not in the references"
            raise ValueError(f"{answer.video}: the question {answer.prompt!r} {what}")
        given[key] = answer.text
    right = sum(_content(given[key]) == _content(truth) for key, truth in truths.items() if key in given)
    return right / len(truths)


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
    is_ended = re.search(r"[.!?]\W*$", text) is not None
    seen: set[tuple[str, ...]] = set()
    repeated, is_looping = 0, False
    last: tuple[str, ...] | None = None
    for place, clause in enumerate(clauses):
        is_again = clause.key in seen and (clause.key == last or clause.is_whole or clause.is_long)
        if not is_ended and place == len(clauses) - 1:
            is_again |= _is_cut_off(clause, seen, is_looping=is_looping)
        looped = clause.num_words if is_again else _looped_words(clause.words)
        repeated, is_looping, last = repeated + looped, looped > 0, clause.key
        seen.add(clause.key)
    return repeated, sum(clause.num_words for clause in clauses)


@dataclass(frozen=True)
class _Clause:
    key: tuple[str, ...]  # (subject's clause where it has none itself, own words without articles)
    words: str
    num_words: int
    is_whole: bool  # a whole sentence
    is_long: bool


def _cut(text: str) -> list[_Clause]:
    clauses: list[_Clause] = []
    anchor, num_words = "", 0
    for sentence in _SENTENCE_END.split(text):
        pieces = [(piece, _WORD.findall(_LEAD.sub("", piece, count=1).lower())) for piece in _CUT.split(sentence)]
        is_whole = sum(bool(words) for _, words in pieces) == 1
        is_first = True
        for piece, words in pieces:
            # "Then, ..." and "At the start, ..." belong to the clause that they lead in.
            num_words += len(_WORD.findall(piece))
            if not words:
                continue
            own = " ".join(word for word in words if word not in _ARTICLES)
            is_pronoun = words[0] in _PRONOUNS
            leans = is_pronoun or (not is_first and words[0] not in _SUBJECTS)
            leans = leans and own != anchor  # "beep, beep, beep"
            anchor = anchor if leans else own
            is_long = is_pronoun or own.count(" ") + 1 >= _MIN_WORDS
            clauses.append(_Clause((anchor, own) if leans else (own,), " ".join(words), num_words, is_whole, is_long))
            num_words, is_first = 0, False
    if num_words:
        clauses.append(_Clause(("",), "", num_words, is_whole=False, is_long=False))
    return clauses


def _looped_words(words: str) -> int:
    return sum(len(loop[0].split()) - len(loop[1].split()) for loop in _LOOP.finditer(words))


def _is_cut_off(clause: _Clause, seen: set[tuple[str, ...]], *, is_looping: bool) -> bool:
    """Whether the last clause begins an earlier one: of a loop that goes on, or long enough to tell."""
    if not (is_looping or clause.is_long):
        return False
    return any(key[:-1] == clause.key[:-1] and key[-1].startswith(clause.key[-1]) for key in seen)


def _content(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _ARTICLES]
