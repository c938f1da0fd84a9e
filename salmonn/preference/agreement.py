"""Agreement of a reward model with the source of its comparisons, next to controls that need no clip."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salmonn.preference.comparisons import AnswerGroup
from salmonn.score.stats import wilson_interval

MIN_LOOKING = 0.03  # accuracy above the blind twin below which a warning says that the model hardly looks


@dataclass(frozen=True)
class Agreement:
    """Share of held-out comparisons that are ordered as by their source, next to controls.

    Args:
        num_comparisons, num_clips: size of the held-out set.
        accuracy, low, high: share ordered alike, with its 95 % Wilson interval for the number of independent
            comparisons that would have the variance over clips: comparisons of one clip share captions.
        blind: the same of a reward model that was trained and evaluated with the features of other clips; None if there
            is none. Any accuracy above it comes from the clip.
        longest: the same for preferring the caption with more words; ties count one half.
    """

    num_comparisons: int
    num_clips: int
    accuracy: float
    low: float
    high: float
    longest: float
    blind: float | None = None


@dataclass(frozen=True)
class OrderedVotes:
    """Share of votes that a reward orders as they were cast.

    Args:
        num_votes: number of votes.
        accuracy: the share; ties count one half; None without votes.
        low, high: its 95 % Wilson interval, as that of `Agreement`; from 0 to 1 without votes.
    """

    num_votes: int
    accuracy: float | None
    low: float
    high: float


def measure_votes(margins: Tensor, clips: Sequence[Hashable]) -> OrderedVotes:
    """Return the share of positive margins (N,), of votes on these clips."""
    if not len(margins):
        return OrderedVotes(0, None, 0.0, 1.0)
    accuracy, number = share_positive(margins), effective_number(margins, clips)
    interval = wilson_interval(accuracy * number, number)
    return OrderedVotes(len(margins), accuracy, interval.low, interval.high)


def measure_agreement(groups: Sequence[AnswerGroup], margins: Tensor, blind: Tensor | None) -> Agreement:
    """Return the share of comparisons with a positive margin, next to the blind twin's and that of longer captions."""
    words = torch.tensor(
        [
            len(group.answers[better][0].split()) - len(group.answers[worse][0].split())
            for group in groups
            for better, worse in group.pairs
        ]
    )
    accuracy = share_positive(margins)
    clips = [group.example.video for group in groups for _ in group.pairs]
    number = effective_number(margins, clips)
    interval = wilson_interval(accuracy * number, number)
    return Agreement(
        num_comparisons=len(margins),
        num_clips=len(groups),
        accuracy=accuracy,
        low=interval.low,
        high=interval.high,
        longest=share_positive(words),
        blind=None if blind is None else share_positive(blind),
    )


def effective_number(margins: Tensor, clips: Sequence[Hashable]) -> float:
    """Return the number of independent comparisons whose share of positive margins would vary as much.

    It is at most that of the comparisons: their number over the design effect (Kish, Survey Sampling, 1965), with the
    variance of a ratio over clips. Where all comparisons are ordered alike, each clip counts once.

    Args:
        margins: margin of each comparison, (N,).
        clips: clip of each comparison.
    """
    correct = ((margins > 0).double() + 0.5 * (margins == 0).double()).tolist()
    share = sum(correct) / len(correct)
    excess = dict.fromkeys(clips, 0.0)  # clip -> sum of (correct - share)
    for clip, one in zip(clips, correct, strict=True):
        excess[clip] += one - share
    num_clips = len(excess)
    if share in (0, 1) or num_clips == 1:
        return num_clips
    variance = num_clips / (num_clips - 1) * sum(one**2 for one in excess.values()) / len(correct) ** 2
    return min(share * (1 - share) / max(variance, 1e-12), len(correct))


def share_positive(margins: Tensor) -> float:
    """Return the share of positive values; zeros count one half."""
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())


def describe_agreement(agreement: Agreement, *, of: str = "held-out") -> str:
    """Return the agreement as a sentence; `of` says which comparisons."""
    blind = "" if agreement.blind is None else f"; blind {100 * agreement.blind:.1f} %"
    return (
        f"agrees with {100 * agreement.accuracy:.1f} % ({100 * agreement.low:.1f} to {100 * agreement.high:.1f}) of "
        f"{agreement.num_comparisons} {of} comparisons of {agreement.num_clips} clips{blind}; "
        f"the longer caption {100 * agreement.longest:.1f} %"
    )


def describe_votes(votes: OrderedVotes) -> str:
    """Return the share with its interval, such as "78.1 % (70.2 to 84.5)"; a dash without votes."""
    if votes.accuracy is None:
        return "\N{EN DASH}"
    return f"{100 * votes.accuracy:.1f} % ({100 * votes.low:.1f} to {100 * votes.high:.1f})"


def looking_warning(agreement: Agreement) -> str | None:
    """Return a warning if a reward model is hardly better than its blind twin."""
    if agreement.blind is None or agreement.accuracy - agreement.blind >= MIN_LOOKING:
        return None
    return (
        f"the reward model is {100 * (agreement.accuracy - agreement.blind):+.1f} points from its blind twin, which is "
        "asked with other clips' features: it hardly looks at the clip, and training on its ratings would mainly teach "
        "to claim more. Use more labelled clips, pooling rich, or an adapter"
    )
