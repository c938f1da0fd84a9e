"""Groups of captions for GRPO: all rated samples of a clip, with their advantages. Imports no torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from salmonn.preference.rating import Rating
from salmonn.records import Caption, Reference

_SMALLEST_DEVIATION = 1e-4  # added to the standard deviation, as in TRL


@dataclass(frozen=True)
class CaptionGroup:
    """Samples of one clip and prompt.

    Args:
        captions: the samples.
        advantages: rating of each sample in standard deviations above the mean of the group; at most 0 for one that was
            cut off at the token limit, which would teach the model not to stop.
        ground_truth: reference caption, for cross-entropy.
    """

    captions: tuple[Caption, ...]
    advantages: tuple[float, ...]
    ground_truth: str = ""


def make_groups(
    captions: Sequence[Caption], ratings: Sequence[Rating], references: Mapping[str, Reference]
) -> list[CaptionGroup]:
    """Group the rated captions by clip and compute advantages (arXiv 2402.03300, section 4.1.2).

    A caption's advantage is (rating - mean) / standard deviation of the ratings of its clip; the deviation is that of
    a sample, with n - 1. Clips whose captions are all rated the same teach nothing and are left out, as in DAPO
    (arXiv 2503.14476).

    Args:
        captions: sampled captions, several of each clip; those without a rating, or that were cut off before their
            first word, are left out.
        ratings: ratings of these captions, matched by video and sample.
        references: video -> reference annotation, whose caption becomes the ground truth.
    """
    value_of = {(rating.video, rating.sample): rating.value for rating in ratings}
    by_video: dict[str, list[Caption]] = {}
    for caption in captions:
        if (caption.video, caption.sample) in value_of and (caption.text or caption.finished):
            by_video.setdefault(caption.video, []).append(caption)
    groups = []
    for video, group in by_video.items():
        values = [value_of[video, caption.sample] for caption in group]
        if len(set(values)) < 2:
            continue
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        advantages = tuple(
            min((value - mean) / (deviation + _SMALLEST_DEVIATION), math.inf if caption.finished else 0.0)
            for caption, value in zip(group, values, strict=True)
        )
        groups.append(CaptionGroup(tuple(group), advantages, references[video].caption))
    return groups
