"""From scores to rates: missing, hallucination and total over a set, repetition, and accuracy on questions.

Rates are micro-averages (counts are summed over all clips before dividing; source: arXiv 2410.06682).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from salmonn.records import Caption, Reference, Score

_WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
_ARTICLES = frozenset(("a", "an", "the"))


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


def _content(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _ARTICLES]
