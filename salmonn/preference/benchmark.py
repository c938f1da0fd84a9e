"""Reward benchmark: how often a reward prefers the correct answer, by scenario: `salmonn reward-benchmark FILES`.

    items = read_items([Path("data/reward_pairs.jsonl")])
    outcomes = rate_items(items, JudgeReward(RuleJudge(), repetition_weight=1.0))
    result = summarize(items, outcomes, name="rule")

A reward rates each answer separately, or compares two of them, in both orders (`pairwise.py`). Its accuracy is reported
with three controls that do not see the clip: preferring the longer answer, the shorter one, and the reward itself with
the features of another clip ("blind"). `docs/reward_benchmark.md` describes the data, the counting and results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from salmonn.preference.benchmark_items import TIES, BenchmarkItem, clip_name
from salmonn.preference.rating import Rating, Reward
from salmonn.records import Caption, Reference, Unscored
from salmonn.score.judge import ProgressCallback, ScoringTask
from salmonn.score.stats import Interval, wilson_interval

FORMAT = 1  # of the JSON file
COLUMNS = ("", "pairs", "right %", "95 %", "ties %", "unscored", "longer %", "shorter %", "blind %")
ALL = "all"
_Z = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Outcome:
    """How a reward values the answers of an item; higher is better.

    Args:
        chosen: values of the correct answers.
        rejected: values of the wrong ones.
        reason: why they are missing; both are empty then.
    """

    chosen: tuple[float, ...] = ()
    rejected: tuple[float, ...] = ()
    reason: str = ""

    @property
    def credit(self) -> float:
        """Share of correct answers among those with the highest value: 1 is right, 0 is wrong.

        With one correct answer this is 1/n if n answers share the highest value, as in RewardBench 2; 0 if unscored.
        """
        if not self.chosen:
            return 0.0
        best = max(self.chosen + self.rejected)
        return self.chosen.count(best) / (self.chosen + self.rejected).count(best)

    @property
    def is_tie(self) -> bool:
        """Whether a correct and a wrong answer share the highest value."""
        return 0 < self.credit < 1


@dataclass(frozen=True)
class Row:
    """Accuracy on a group of items.

    Args:
        items: number of items.
        accuracy: mean credit; of the subset Ties its own score.
        interval: 95 % Wilson interval of the mean credit; None where the accuracy is another figure.
        ties: number of items without a preference.
        unscored: number of items that the reward could not value; they count as wrong.
        longer, shorter: accuracy of preferring the answer with more words, or fewer.
        blind: accuracy of the same reward with the features of another clip; None if it has not been measured.
    """

    items: int
    accuracy: float
    interval: Interval | None
    ties: int
    unscored: int
    longer: float
    shorter: float
    blind: float | None = None

    @property
    def is_void(self) -> bool:
        """Whether the blind reward is as accurate, so that the accuracy does not depend on the clip."""
        return self.blind is not None and self.blind >= self.accuracy


@dataclass(frozen=True)
class Bias:
    """Difference in accuracy between pairs whose better answer is longer, and shorter, with its 95 % interval.

    Faults change the length: omissions make an answer shorter, hallucinations longer. So pairs are compared within each
    subset, and subsets are weighted by n m / (n + m) for n and m pairs (Mantel-Haenszel risk difference; variance:
    Greenland and Robins 1985). A tie counts one half.
    """

    difference: float
    interval: Interval


@dataclass(frozen=True)
class BenchmarkResult:
    """Results of a reward.

    Args:
        reward: name of the reward.
        subsets: rows by subset.
        scenarios: rows by scenario, over all its items (micro average).
        total: row over all items (micro average).
        macro: mean accuracy of the scenarios.
        macro_blind: the same of the blind reward.
        length_bias: None if no subset has pairs of both kinds.
        first_share: share of verdicts for the answer that was shown first; None if answers were valued alone.
        inconsistent: number of pairs whose verdict changed with the order; None as above.
        credits: credit of each item, in the order of the items.
        blind_credits: credits of the blind reward.
        unscored: ids of the items that could not be valued, with the reason.
        format: version of the file.
    """

    reward: str
    subsets: dict[str, Row]
    scenarios: dict[str, Row]
    total: Row
    macro: float
    macro_blind: float | None
    length_bias: Bias | None
    first_share: float | None
    inconsistent: int | None
    credits: dict[str, float]
    blind_credits: dict[str, float]
    unscored: tuple[Unscored, ...] = ()
    format: int = FORMAT


def rate_items(
    items: Sequence[BenchmarkItem],
    reward: Reward,
    *,
    clips: Sequence[BenchmarkItem] | None = None,
    batch_size: int = 1,
    progress: ProgressCallback | None = None,
) -> list[Outcome]:
    """Let a reward rate the answers of all items.

    Args:
        items: items with events, or with clips, as the reward needs.
        reward: rates captions. Their `video` is what `clip_name` returns.
        clips: for each item the item whose clip is shown; by default itself.
        batch_size: number of items in a call of the reward. A reward that compares the captions of a clip with one
            another needs 1, because several items may be about the same clip.
        progress: called with the number of items just rated.
    """
    shown = items if clips is None else clips
    outcomes = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        tasks = [_make_tasks(item, clip) for item, clip in zip(batch, shown[start : start + batch_size], strict=True)]
        reasons = [_check(reward, own[0].reference) for own in tasks]
        rated = [task for own, reason in zip(tasks, reasons, strict=True) if not reason for task in own]
        results = iter(reward.rate(rated) if rated else [])
        for item, reason in zip(batch, reasons, strict=True):
            own = [] if reason else [next(results) for _ in item.answers]
            outcomes.append(_to_outcome(item, own, reason))
        if progress:
            progress(len(batch))
    return outcomes


def _make_tasks(item: BenchmarkItem, shown: BenchmarkItem) -> list[ScoringTask]:
    reference = Reference(clip_name(shown), item.events)
    return [
        ScoringTask(reference, Caption(reference.video, text, item.prompt, sample=sample, modality=shown.use))
        for sample, text in enumerate(item.answers)
    ]


def _check(reward: Reward, reference: Reference) -> str:
    """Return why a reward cannot rate captions against a reference; "" if it can."""
    try:
        reward.check(reference)
    except ValueError as error:
        return str(error)
    return ""


def _to_outcome(item: BenchmarkItem, results: Sequence[Rating | Unscored], reason: str) -> Outcome:
    failed = [result.reason for result in results if isinstance(result, Unscored)]
    if reason or failed:
        return Outcome(reason=reason or failed[0])
    values = tuple(result.value for result in results if isinstance(result, Rating))
    return Outcome(values[: len(item.chosen)], values[len(item.chosen) :])


def choose_other_clips(items: Sequence[BenchmarkItem]) -> list[BenchmarkItem]:
    """Return for each item another one of its subset, with another clip; its clip is shown to the blind reward.

    Where an item withholds the sound or the picture, the other clip is shown with both, since the point of the item is
    that something is missing.

    Raises:
        ValueError: an item has no clip, or a subset has one clip only.
    """
    by_subset: dict[str, list[BenchmarkItem]] = {}
    for item in items:
        if item.clip is None:
            raise ValueError(
                f"item {item.id} of {item.subset} has no clip, which a reward model needs: compare its answers by a "
                "language model, with --judge openai"
            )
        by_subset.setdefault(item.subset, []).append(item)
    others = {}
    for subset, members in by_subset.items():
        for place, item in enumerate(members):
            rotated = members[place + 1 :] + members[:place]
            other = next((one for one in rotated if one.clip != item.clip), None)
            if other is None:
                raise ValueError(f"all items of {subset} are about the same clip: the blind control needs another one")
            others[id(item)] = BenchmarkItem(
                other.id, other.subset, other.prompt, other.chosen, other.rejected, clip=other.clip
            )
    return [others[id(item)] for item in items]


def summarize(
    items: Sequence[BenchmarkItem],
    outcomes: Sequence[Outcome],
    *,
    name: str,
    blind: Sequence[Outcome] | None = None,
    orders: Sequence[tuple[float, float]] | None = None,
) -> BenchmarkResult:
    """Return the results of a reward.

    Args:
        items: the items.
        outcomes: how the reward values their answers.
        name: name of the reward.
        blind: the same with other clips.
        orders: of a pairwise reward, the share of each verdict for the answer shown first, in both orders.
    """
    groups: dict[str, dict[str, list[int]]] = {"subset": {}, "scenario": {}}
    for place, item in enumerate(items):
        groups["subset"].setdefault(item.subset, []).append(place)
        groups["scenario"].setdefault(item.scenario or item.subset, []).append(place)

    def row(places: Sequence[int], *, is_ties: bool = False) -> Row:
        own = [items[place] for place in places]
        chosen = [outcomes[place] for place in places]
        shown = None if blind is None else [blind[place] for place in places]
        return _make_row(own, chosen, shown, is_ties=is_ties)

    subsets = {subset: row(places, is_ties=subset == TIES) for subset, places in groups["subset"].items()}
    scenarios = {scenario: row(places, is_ties=scenario == TIES) for scenario, places in groups["scenario"].items()}
    blinds = [one.blind for one in scenarios.values() if one.blind is not None]
    verdicts = [share for pair in orders or () for share in pair]
    keys = [f"{item.subset}/{item.id}" for item in items]
    return BenchmarkResult(
        reward=name,
        subsets=subsets,
        scenarios=scenarios,
        total=row(range(len(items))),
        macro=mean(one.accuracy for one in scenarios.values()),
        macro_blind=mean(blinds) if blinds else None,
        length_bias=_length_bias(items, outcomes),
        first_share=mean(verdicts) if verdicts else None,
        inconsistent=None if orders is None else sum(first + second != 1 for first, second in orders),
        credits={key: one.credit for key, one in zip(keys, outcomes, strict=True)},
        blind_credits={key: one.credit for key, one in zip(keys, blind, strict=True)} if blind else {},
        unscored=tuple(Unscored(key, one.reason) for key, one in zip(keys, outcomes, strict=True) if one.reason),
    )


def _make_row(
    items: Sequence[BenchmarkItem], outcomes: Sequence[Outcome], blind: Sequence[Outcome] | None, *, is_ties: bool
) -> Row:
    longer = [_by_length(item) for item in items]
    shorter = [_by_length(item, sign=-1) for item in items]

    def accuracy(values: Sequence[Outcome]) -> float:
        if is_ties:
            return ties_score([(item.id, one.chosen, one.rejected) for item, one in zip(items, values, strict=True)])
        return mean(one.credit for one in values)

    return Row(
        items=len(items),
        accuracy=accuracy(outcomes),
        interval=None if is_ties else wilson_interval(sum(one.credit for one in outcomes), len(items)),
        ties=sum(one.is_tie for one in outcomes),
        unscored=sum(not one.chosen for one in outcomes),
        longer=accuracy(longer),
        shorter=accuracy(shorter),
        blind=None if blind is None else accuracy(blind),
    )


@dataclass(frozen=True)
class _Margins:
    """Margins between the worst correct and the best wrong answer, and between the best and the worst correct one."""

    to_wrong: float
    among_correct: float


def ties_score(items: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> float:
    """Return the score of RewardBench 2 (arXiv 2506.01937) for prompts with several correct answers, up to 1.01.

    Correct answers should outscore wrong ones, and by more than they differ from one another.

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


def _by_length(item: BenchmarkItem, *, sign: int = 1) -> Outcome:
    """Return the outcome of preferring the longer answer, or the shorter one, in words."""
    lengths = tuple(float(sign * len(text.split())) for text in item.answers)
    return Outcome(lengths[: len(item.chosen)], lengths[len(item.chosen) :])


def _length_bias(items: Sequence[BenchmarkItem], outcomes: Sequence[Outcome]) -> Bias | None:
    """Return the bias over scored pairs; None if no subset has pairs of both kinds."""
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for item, outcome in zip(items, outcomes, strict=True):
        preferred = _by_length(item).credit
        if len(item.answers) == 2 and outcome.chosen and preferred != 0.5:
            groups.setdefault(item.subset, ([], []))[0 if preferred else 1].append(outcome.credit)
    weighted = variance = weights = 0.0
    for longer, shorter in groups.values():
        if longer and shorter:
            weight = len(longer) * len(shorter) / (len(longer) + len(shorter))
            weights += weight
            weighted += weight * (mean(longer) - mean(shorter))
            variance += weight**2 * sum(mean(one) * (1 - mean(one)) / len(one) for one in (longer, shorter))
    if not weights:
        return None
    difference, reach = weighted / weights, _Z * math.sqrt(variance) / weights
    return Bias(difference, Interval(difference - reach, difference + reach))


def table_rows(result: BenchmarkResult) -> list[list[tuple[str, ...]]]:
    """Return the table as groups of rows with the cells that `COLUMNS` names."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def cells(name: str, row: Row) -> tuple[str, ...]:
        interval = f"{percent(row.interval.low)} - {percent(row.interval.high)}" if row.interval else "-"
        scored = row.items - row.unscored
        ties = percent(row.ties / scored if scored else None)
        figures = (percent(row.longer), percent(row.shorter), percent(row.blind))
        return (name, str(row.items), percent(row.accuracy), interval, ties, str(row.unscored), *figures)

    groups = [[cells(name, row) for name, row in result.subsets.items()]]
    if result.scenarios.keys() != result.subsets.keys():
        rows = result.scenarios.items()
        groups.append([cells(f"{name} (void)" if row.is_void else name, row) for name, row in rows])
    number = str(len(result.credits))
    macro = ("mean of scenarios", number, percent(result.macro), *["-"] * 5, percent(result.macro_blind))
    groups.append([cells(f"{ALL} (void)" if result.total.is_void else ALL, result.total), macro])
    return groups


def table_notes(result: BenchmarkResult) -> list[str]:
    """Return lines about void scenarios and biases."""
    notes = [
        f"{name} is void: with the clip the reward is right in {100 * row.accuracy:.1f} %, with another clip in "
        f"{100 * (row.blind or 0):.1f} %, so it does not use the clip there"
        for name, row in [*result.scenarios.items(), (ALL, result.total)]
        if row.is_void
    ]
    if result.length_bias:
        # Adding 0 turns -0.0 into 0.0.
        bias = result.length_bias
        point, low, high = (
            round(100 * value, 1) + 0.0 for value in (bias.difference, bias.interval.low, bias.interval.high)
        )
        notes.append(f"length bias, points for the longer answer: {point:+.1f} ({low:+.1f} to {high:+.1f})")
    if result.first_share is not None:
        notes.append(
            f"verdicts for the answer shown first: {100 * result.first_share:.1f} %; verdicts that changed with the "
            f"order: {result.inconsistent}"
        )
    return notes
