"""Metrics of a set of captions: errors, repetition, length, audio share, order; and accuracy on questions.

Rates are micro-averages: counts are summed over all captions before dividing (arXiv 2410.06682). `docs/metrics.md` has
the formulas with a worked example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from salmonn.records import Caption, Reference, Score
from salmonn.score.text_spans import ARTICLES, WORD

# Numerator and denominator of each measure, to be summed over captions. Lower is better for all of them.
Measures = Mapping[str, tuple[Callable[[Score], int], Callable[[Score], int]]]
MEASURES: Measures = {
    "missing": (lambda score: score.missing, lambda score: score.num_events),
    "hallucination": (lambda score: score.incorrect + score.hallucinated, lambda score: score.num_events),
    "incorrect": (lambda score: score.incorrect, lambda score: score.num_events),
    "hallucinated": (lambda score: score.hallucinated, lambda score: score.num_events),
    "total": (lambda score: score.missing + score.incorrect + score.hallucinated, lambda score: score.num_events),
    "repetition": (lambda score: score.num_repeated_words, lambda score: score.num_words),
}


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
    measures = compute_measures(scores)
    measures["total"] = measures["missing"] + measures["hallucination"]  # exactly the sum of what is shown
    return Rates(
        **measures,
        qa_accuracy=qa_accuracy,
        clips=len({score.video for score in scores}),
        words=sum(score.num_words for score in scores) / len(scores),
        cut_off=sum(not score.finished for score in scores) / len(scores),
        audio_share=audio_share(scores),
        order=temporal_order_tau(scores),
        captions=len(scores),
    )


def compute_measures(scores: Sequence[Score]) -> dict[str, float]:
    """Return each of the `MEASURES`: the sum of its numerators / the sum of its denominators, at least 1."""
    return {
        name: sum(map(numerator, scores)) / max(sum(map(denominator, scores)), 1)
        for name, (numerator, denominator) in MEASURES.items()
    }


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
