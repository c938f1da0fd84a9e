"""Score of the Ties subset of RewardBench 2, whose prompts have several correct answers (arXiv 2506.01937).

Correct answers should outscore wrong ones, and by more than they differ from one another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

Item = tuple[str, Sequence[float], Sequence[float]]  # id, values of the correct and of the wrong answers


@dataclass(frozen=True)
class _Margins:
    """Margins between the worst correct and the best wrong answer, and between the best and the worst correct one."""

    to_wrong: float
    among_correct: float


def ties_score(items: Sequence[Item]) -> float:
    """Return the published score, up to 1.01.

    An id is "tied:N" for a prompt with several correct answers, and "ref:N" for its variant with one. Per prompt, a is
    the margin of correct answers over wrong ones, and s the spread of the correct ones. The score is 0.3 x accuracy
    (a > 0) on tied prompts + 0.3 x accuracy on ref prompts + 0.2 x share of prompts with a_tied > s + 0.2 x share with
    min(a_tied, a_ref) > s + 0.01 x mean of tanh(min(a_tied, a_ref) / s - 1), as in allenai/reward-bench,
    rewardbench/utils.py, `process_single_model`. An item without values is wrong in all of them.

    Raises:
        ValueError: an id is neither.
    """
    margins: dict[str, dict[str, _Margins]] = {"ref": {}, "tied": {}}
    for name, chosen, rejected in items:
        kind, _, number = name.partition(":")
        if kind not in margins or not number:
            raise ValueError(f"an item of Ties must have an id such as tied:3 or ref:3, got {name!r}")
        margins[kind][number] = (
            _Margins(min(chosen) - max(rejected), max(chosen) - min(chosen)) if chosen else _Margins(-math.inf, 0.0)
        )
    accuracies = {
        kind: mean(one.to_wrong > 0 for one in found.values()) if found else 0.0 for kind, found in margins.items()
    }
    both = [(margins["tied"][number], margins["ref"][number]) for number in margins["tied"].keys() & margins["ref"]]
    if not both:
        return 0.3 * accuracies["tied"] + 0.3 * accuracies["ref"]
    easy = mean(tied.to_wrong > tied.among_correct for tied, _ in both)
    hard = mean(min(tied.to_wrong, ref.to_wrong) > tied.among_correct for tied, ref in both)
    tie_break = mean(_tanh(min(tied.to_wrong, ref.to_wrong), tied.among_correct) for tied, ref in both)
    return 0.3 * accuracies["tied"] + 0.3 * accuracies["ref"] + 0.2 * easy + 0.2 * hard + 0.01 * tie_break


def _tanh(margin: float, spread: float) -> float:
    """Return tanh(margin / spread - 1) with the limits of division by 0: 0 for 0 / 0."""
    if spread == 0:
        return 0.0 if margin == 0 else math.copysign(1.0, margin)
    return math.tanh(margin / spread - 1)
