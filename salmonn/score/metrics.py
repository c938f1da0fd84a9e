"""Metrics of a set of captions: errors, repetition, length, audio share, order; and accuracy on questions.

Rates are micro-averages: counts are summed over all captions before dividing (arXiv 2410.06682). `docs/metrics.md` has
the formulas with a worked example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from salmonn.records import Caption, Reference, Score
from salmonn.score.text_spans import ARTICLES, WORD


@dataclass(frozen=True)
class Rates:
    """Metrics of a set, as fractions (0.42 is 42 %); hallucination and total can exceed 1.

    Args:
        missing, hallucination, total, repetition: see `compute_rates`.
        qa_accuracy: share of questions with a correct answer; None without questions.
        clips: number of videos.
        incorrect, hallucinated: the two parts of `hallucination`.
        words: mean caption length in words.
        cut_off: share of captions that reached their token limit.
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
    """Return Missing = sum M / sum N, Hallucination = sum (I + H) / sum N, Total = their sum, and the other metrics.

    Repetition is the number of repeated words / the number of all words.

    Raises:
        ValueError: there are no scores.
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
    """Return the share of audible events (sound or speech) among all mentioned events; None if none is mentioned."""
    audible = [mention.event.is_audible for score in scores for mention in score.mentions]
    return sum(audible) / len(audible) if audible else None


def temporal_order_tau(scores: Sequence[Score]) -> float | None:
    """Return Kendall's tau between the order of mentions and time: 1 in order, -1 reversed, 0 unrelated.

    The pairs are those of events mentioned in the same caption where one precedes the other (`Event.precedes`), pooled
    over captions: (concordant pairs - discordant pairs) / pairs. None without such a pair. (`scipy.stats.kendalltau`
    needs a total order with ties; events that overlap, or have no times, only have a partial order.)
    """
    signs = [
        1 if first.event.precedes(second.event) else -1
        for score in scores
        for first, second in combinations(score.mentions, 2)
        if first.event.precedes(second.event) or second.event.precedes(first.event)
    ]
    return sum(signs) / len(signs) if signs else None


def qa_accuracy(references: Mapping[str, Reference], answers: Sequence[Caption]) -> float:
    """Return the share of questions answered by exact match, ignoring case, punctuation and articles.

    Args:
        references: references with questions, by video.
        answers: captions whose `prompt` is a question; a question without an answer counts as wrong.

    Raises:
        ValueError: there are no questions; or an answer has no question in the references, or is a second one.
    """
    truths = {
        (video, question.question): question.answer
        for video, reference in references.items()
        for question in reference.questions
    }
    if not truths:
        raise ValueError("the references have no questions")
    given: dict[tuple[str, str], str] = {}
    for answer in answers:
        key = answer.video, answer.prompt
        if key not in truths or key in given:
            problem = "is answered twice" if key in given else "is not in the references"
            raise ValueError(f"{answer.video}: the question {answer.prompt!r} {problem}")
        given[key] = answer.text

    def content(text: str) -> list[str]:
        return [word for word in WORD.findall(text.lower()) if word not in ARTICLES]

    return sum(content(given[key]) == content(truth) for key, truth in truths.items() if key in given) / len(truths)
