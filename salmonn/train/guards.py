"""When the rounds of mrDPO end before their number: with words, and with the best model, not with a bad one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salmonn.records import Comparison
from salmonn.train.run_log import STEPS_NAME, RunSummary, read_steps


@dataclass(frozen=True)
class EarlyStopConfig:
    """When the rounds end. In the first round that ends the run; later the best model so far is kept.

    Args:
        min_pairs: fewest pairs that a round may have; none asks for those of one step.
        min_margin: what the chosen answers' reward must exceed the rejected ones' by, in the mean of a round's last
            quarter: a round that stays below it has not learnt what its pairs say. None asks for nothing.
        max_worsening: how much higher than the best so far the held-out Total may be after a round, as a fraction.
    """

    min_pairs: int | None = None
    min_margin: float | None = 0.0
    max_worsening: float = 0.05


class RoundFailedError(ValueError):
    """A round cannot give a better model."""


def require_pairs(pairs: Sequence[Comparison], early_stopping: EarlyStopConfig, *, batch_size: int, name: str) -> None:
    """Raise RoundFailedError where a round has too few pairs."""
    least = max(1, batch_size if early_stopping.min_pairs is None else early_stopping.min_pairs)
    if len(pairs) < least:
        raise RoundFailedError(
            f"{name} found {len(pairs)} pairs of captions that differ enough, and {least} are asked for "
            "(early_stopping.min_pairs): sample more captions (pairs.num_samples), at a higher temperature, or "
            "accept a smaller gap (pairs.min_gap)"
        )


def require_margin(folder: Path, early_stopping: EarlyStopConfig) -> None:
    """Raise RoundFailedError where a trained round does not tell chosen from rejected, by its log of steps."""
    if early_stopping.min_margin is None:
        return
    margins = [step["margin"] for step in read_steps(folder / STEPS_NAME)]
    late = margins[-max(1, len(margins) // 4) :]
    if (margin := sum(late) / len(late)) <= early_stopping.min_margin:
        raise RoundFailedError(
            f"{folder.name} has not learnt to tell chosen from rejected captions: their rewards differ by {margin:.4f} "
            f"at its end, and early_stopping.min_margin is {early_stopping.min_margin}. Look at "
            f"{folder / 'pairs.jsonl'}, take more steps or a higher learning rate"
        )


def stop_reason(summary: RunSummary, early_stopping: EarlyStopConfig) -> str | None:
    """Why the rounds end, where the last of them is too much worse than the best before; none where it is not."""
    *before, last = [summary.sft.total, *(rates.total for rates in summary.rounds)]
    if last <= min(before) + early_stopping.max_worsening:
        return None
    return (
        f"after round {len(summary.rounds)} the held-out Total is {last:.3f}, and was {min(before):.3f}: more than "
        f"early_stopping.max_worsening {early_stopping.max_worsening} worse"
    )


def best_round(summary: RunSummary) -> int | None:
    """The number of the round with the least held-out Total; none where a guard ended the rounds and none is better
    than the start."""
    totals = [rates.total for rates in summary.rounds]
    if summary.stopped and min(totals) >= summary.sft.total:
        return None
    return totals.index(min(totals)) + 1
