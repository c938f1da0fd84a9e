"""From scores to rates: errors, repetition, length, sound and order over a set, and accuracy on questions.

Rates are micro-averages (counts are summed over all captions before dividing; source: arXiv 2410.06682).
`docs/metrics.md` has the formulas, with a worked example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from salmonn.records import Caption, Reference, Score
from salmonn.score.words import ARTICLES, WORD


@dataclass(frozen=True)
class Rates:
    """Rates of a set, as fractions (0.42 is 42 %); hallucination and total can exceed 1.

    Args:
        missing, hallucination, total, repetition: see `rates`.
        qa_accuracy: share of questions that are answered right; None where none were asked.
        clips: number of videos.
        incorrect, hallucinated: the two parts of `hallucination`.
        words: mean length of a caption in words.
        cut_off: share of the captions that ran into their token limit.
        audio_share: see `audio_share`.
        order: see `temporal_order_tau`; from -1 to 1.
        captions: number of captions.
    """

    missing: float
    hallucination: float
    total: float
    repetition: float
    qa_accuracy: float | None = None
    clips: int = 0
    incorrect: float = 0.0
    hallucinated: float = 0.0
    words: float = 0.0
    cut_off: float = 0.0
    audio_share: float | None = None
    order: float | None = None
    captions: int = 0


def compute_rates(scores: Sequence[Score], *, qa_accuracy: float | None = None) -> Rates:
    """Rates over all scores: Missing = sum M / sum N, Hallucination = sum (I + H) / sum N, Total = their sum.

    Repetition is repeated words / all words.

    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("no scores: rates need at least one scored caption")
    num_events = max(sum(score.num_events for score in scores), 1)
    num_words = sum(score.num_words for score in scores)
    missing = sum(score.missing for score in scores) / num_events
    hallucination = sum(score.incorrect + score.hallucinated for score in scores) / num_events
    return Rates(
        missing=missing,
        hallucination=hallucination,
        total=missing + hallucination,
        repetition=sum(score.num_repeated_words for score in scores) / max(num_words, 1),
        qa_accuracy=qa_accuracy,
        clips=len({score.video for score in scores}),
        incorrect=sum(score.incorrect for score in scores) / num_events,
        hallucinated=sum(score.hallucinated for score in scores) / num_events,
        words=num_words / len(scores),
        cut_off=sum(not score.finished for score in scores) / len(scores),
        audio_share=audio_share(scores),
        order=temporal_order_tau(scores),
        captions=len(scores),
    )


def audio_share(scores: Sequence[Score]) -> float | None:
    """Of the events told, rightly or not, the share that is heard (speech is, too); None where none is told."""
    heard = [mention.event.is_audible for score in scores for mention in score.mentions]
    return sum(heard) / len(heard) if heard else None


def temporal_order_tau(scores: Sequence[Score]) -> float | None:
    """Kendall's tau of the order of telling against time: 1 is told in order, -1 backwards, 0 neither.

    Of all pairs of events that one caption tells, those count of which one precedes the other (`Event.precedes`),
    pooled over the captions: (pairs told in order - pairs told against it) / pairs. None where there is no such pair.
    """
    signs = [
        1 if first.event.precedes(second.event) else -1
        for score in scores
        for first, second in combinations(score.mentions, 2)
        if first.event.precedes(second.event) or second.event.precedes(first.event)
    ]
    return sum(signs) / len(signs) if signs else None


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
    return [word for word in WORD.findall(text.lower()) if word not in ARTICLES]
