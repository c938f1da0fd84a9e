"""Benchmark of a judge on labelled pairs of captions: `salmonn judge-benchmark PAIRS`.

    result = run_benchmark(read_labelled_pairs("data/judge_pairs.jsonl"), RuleJudge())
    benchmark_rows(result)

Each caption is judged by itself, as in scoring and in mrDPO; the one with the lower Total is preferred, or with equal
Totals the one with less repetition. `docs/judge_benchmark.md` describes the shipped pairs and the rule judge's results.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from salmonn.records import Caption, Event, Reference, Score, Unscored, read_records
from salmonn.score.judge import Judge, ProgressCallback, ScoringTask
from salmonn.score.stats import wilson_interval

Better = Literal["first", "second", "tie"]
FaultPosition = Literal["", "start", "middle", "end"]

_TIE_ACCEPTED = "padding"  # kind of fault that need not cost anything, as long as it is not rewarded
_Z = 1.959964  # standard deviations of a 95 % interval
COLUMNS = ("", "pairs", "right %", "95 %", "ties %", "unscored", "right of scored %", "gap off by")


@dataclass(frozen=True)
class LabelledPair:
    """Two captions of a clip, and which one is better.

    Args:
        events: events of the clip, in order of time.
        first, second: captions.
        better: which caption is better, or tie.
        gap: number of additional errors in the worse caption.
        kind: kind of fault; for "padding" a tie is right, too.
        where: third of the caption that contains the fault; "" if unknown.
        seed, index: seed and index of the synthetic clip; None for other clips.
    """

    events: tuple[Event, ...]
    first: str
    second: str
    better: Better
    gap: int = 0
    kind: str = "other"
    where: FaultPosition = ""
    seed: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.gap < 0 or (self.gap and self.better == "tie"):
            raise ValueError(
                f"gap must be at least 0, and 0 for a tie, got {self.gap}: name the better caption in `better`"
            )

    @property
    def longer_or_shorter(self) -> str:
        """Return whether the better caption is "longer" or "shorter" in words; "" for equal length or a tie."""
        first, second = len(self.first.split()), len(self.second.split())
        if first == second or self.better == "tie":
            return ""
        return "longer" if (first > second) == (self.better == "first") else "shorter"


@dataclass(frozen=True)
class DecisionCounts:
    """Counts of a judge's decisions on some pairs, and shares of them (None without pairs).

    Args:
        pairs: number of pairs.
        right: number decided as labelled.
        ties: number without a preference.
        unscored: number with a caption or reference that could not be judged; none of them is right.
        gap_error: mean |judge's gap - labelled gap| in events, over scored pairs with a gap; None if there are none.
        accuracy: share of right decisions on all pairs.
        interval: 95 % Wilson interval of `accuracy`.
        scored_accuracy: share of right decisions on scored pairs.
    """

    pairs: int
    right: int
    ties: int
    unscored: int
    gap_error: float | None
    accuracy: float | None
    interval: tuple[float, float] | None
    scored_accuracy: float | None


@dataclass(frozen=True)
class Bias:
    """Difference in accuracy between two groups of scored pairs, with its 95 % interval.

    Faults change the length: omissions make a caption shorter, hallucinations longer. So groups are compared within
    each kind of fault, and kinds are weighted by n m / (n + m) for n and m pairs (Mantel-Haenszel risk difference;
    variance: Greenland and Robins 1985).
    """

    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class BenchmarkResult:
    """Results of a judge.

    Args:
        judge, prompt_hash: name of the judge, and hash of its prompts or version of its rules.
        total: counts over all pairs.
        kinds: counts by kind of fault.
        position: counts by the position of the better caption: "first", "second".
        length: counts by whether the better caption is "longer" or "shorter" than the other, in words.
        where: counts by the third of the caption that contains the fault.
        position_bias: accuracy with the better caption first minus accuracy with it second; None if no kind of fault
            has both.
        length_bias: accuracy with the better caption longer minus accuracy with it shorter; None as above.
        reversed: number of decisions for the worse of two captions that differ in length.
        reversed_longer: number of those that prefer the longer caption.
        unscored: pairs that could not be judged ("pair 3", counted from 1), with the reason.
    """

    judge: str
    prompt_hash: str
    total: DecisionCounts
    kinds: dict[str, DecisionCounts]
    position: dict[str, DecisionCounts]
    length: dict[str, DecisionCounts]
    where: dict[str, DecisionCounts]
    position_bias: Bias | None
    length_bias: Bias | None
    reversed: int
    reversed_longer: int
    unscored: tuple[Unscored, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return all results for a JSON file."""
        return asdict(self)


def read_labelled_pairs(path: Path | str) -> list[LabelledPair]:
    """Read labelled pairs from JSONL.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is invalid, or the file is empty.
    """
    pairs = read_records(path, LabelledPair)
    if not pairs:
        raise ValueError(f"{path} has no pairs: generate some with tools/judge_pairs.py")
    return pairs


def run_benchmark(
    pairs: Sequence[LabelledPair], judge: Judge, *, seed: int = 0, progress: ProgressCallback | None = None
) -> BenchmarkResult:
    """Let a judge decide all pairs.

    Args:
        pairs: labelled pairs.
        judge: judge; it gets all captions at once and may judge them concurrently.
        seed: random seed of the judge.
        progress: called with the number of captions just finished, of two per pair.
    """
    tasks, judged, rejected = [], [], {}
    for number, pair in enumerate(pairs):
        reference = Reference(f"pair {number + 1}", pair.events)
        try:
            judge.check(reference)
        except ValueError as error:
            rejected[number] = Unscored(reference.video, str(error))
        else:
            judged.append(number)
            tasks += [
                ScoringTask(reference, Caption(reference.video, text, sample=sample))
                for sample, text in enumerate((pair.first, pair.second))
            ]
    if progress and rejected:
        progress(2 * len(rejected))
    results = judge.judge(tasks, seed=seed, progress=progress)
    by_pair = dict(zip(judged, zip(results[::2], results[1::2], strict=True), strict=True))
    decisions = [_decide(pair, *by_pair.get(number, ())) for number, pair in enumerate(pairs)]
    failed = [result for result in results if isinstance(result, Unscored)]

    turned = [decision.pair for decision in decisions if decision.is_reversed and decision.pair.longer_or_shorter]
    return BenchmarkResult(
        judge=judge.name,
        prompt_hash=judge.prompt_hash,
        total=_count(decisions),
        kinds=_count_groups(decisions, lambda decision: decision.pair.kind),
        position=_count_groups(decisions, lambda decision: decision.pair.better, names=("first", "second")),
        length=_count_groups(decisions, lambda decision: decision.pair.longer_or_shorter, names=("longer", "shorter")),
        where=_count_groups(decisions, lambda decision: decision.pair.where, names=("start", "middle", "end")),
        position_bias=_bias(decisions, lambda decision: decision.pair.better, names=("first", "second")),
        length_bias=_bias(decisions, lambda decision: decision.pair.longer_or_shorter, names=("longer", "shorter")),
        reversed=len(turned),
        reversed_longer=sum(pair.longer_or_shorter == "shorter" for pair in turned),
        unscored=(*rejected.values(), *failed),
    )


@dataclass(frozen=True)
class _Decision:
    """The caption that a judge prefers (None: unscored), and by how many events it favours the labelled one."""

    pair: LabelledPair
    preferred: Better | None = None
    gap: int = 0

    @property
    def is_right(self) -> bool:
        return self.preferred == self.pair.better or (self.preferred == "tie" and self.pair.kind == _TIE_ACCEPTED)

    @property
    def is_reversed(self) -> bool:
        return not self.is_right and self.preferred in ("first", "second") and self.pair.better != "tie"


def _decide(pair: LabelledPair, *results: Score | Unscored) -> _Decision:
    scores = [result for result in results if isinstance(result, Score)]
    if len(scores) < 2:
        return _Decision(pair)
    first, second = ((score.total, score.repetition) for score in scores)
    preferred: Better = "tie" if first == second else "first" if first < second else "second"
    errors = [score.missing + score.incorrect + score.hallucinated for score in scores]
    return _Decision(pair, preferred, (errors[1] - errors[0]) * (-1 if pair.better == "second" else 1))


def _count_groups(
    decisions: Sequence[_Decision], group: Callable[[_Decision], str], *, names: Sequence[str] | None = None
) -> dict[str, DecisionCounts]:
    """Return counts by group; without names, all groups in order of occurrence."""
    names = list(dict.fromkeys(map(group, decisions))) if names is None else names
    return {name: _count([decision for decision in decisions if group(decision) == name]) for name in names}


def _count(decisions: Sequence[_Decision]) -> DecisionCounts:
    num_pairs, scored = len(decisions), [decision for decision in decisions if decision.preferred]
    num_right = sum(decision.is_right for decision in decisions)
    errors = [abs(decision.gap - decision.pair.gap) for decision in scored if decision.pair.gap]
    interval = wilson_interval(num_right, num_pairs)
    return DecisionCounts(
        pairs=num_pairs,
        right=num_right,
        ties=sum(decision.preferred == "tie" for decision in decisions),
        unscored=num_pairs - len(scored),
        gap_error=sum(errors) / len(errors) if errors else None,
        accuracy=num_right / num_pairs if num_pairs else None,
        interval=(interval.low, interval.high) if num_pairs else None,
        scored_accuracy=num_right / len(scored) if scored else None,
    )


def _bias(decisions: Sequence[_Decision], group: Callable[[_Decision], str], *, names: tuple[str, str]) -> Bias | None:
    """Return the bias for the first group against the second; None if no kind of fault has both."""
    by_kind: dict[str, list[_Decision]] = {}
    for decision in decisions:
        if decision.preferred:
            by_kind.setdefault(decision.pair.kind, []).append(decision)
    weighted = variance = weights = 0.0
    for same_kind in by_kind.values():
        one, other = _count_groups(same_kind, group, names=names).values()
        if one.accuracy is not None and other.accuracy is not None:
            weight = one.pairs * other.pairs / (one.pairs + other.pairs)
            weights += weight
            weighted += weight * (one.accuracy - other.accuracy)
            spread = sum(counts.right * (counts.pairs - counts.right) / counts.pairs**3 for counts in (one, other))
            variance += weight**2 * spread
    if not weights:
        return None
    difference, reach = weighted / weights, _Z * math.sqrt(variance) / weights
    return Bias(difference, (difference - reach, difference + reach))


def benchmark_rows(result: BenchmarkResult) -> list[list[tuple[str, ...]]]:
    """Return the table as groups of rows with the cells that `COLUMNS` names."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    groups = [
        {"all": result.total},
        result.kinds,
        {f"better comes {name}": counts for name, counts in result.position.items()},
        {f"better is {name}": counts for name, counts in result.length.items()},
        {f"fault at {name}": counts for name, counts in result.where.items()},
    ]
    return [
        [
            (
                name,
                str(counts.pairs),
                percent(counts.accuracy),
                " - ".join(map(percent, counts.interval)) if counts.interval else "-",
                percent(None if counts.scored_accuracy is None else counts.ties / (counts.pairs - counts.unscored)),
                str(counts.unscored),
                percent(counts.scored_accuracy),
                "-" if counts.gap_error is None else f"{counts.gap_error:.2f}",
            )
            for name, counts in group.items()
        ]
        for group in groups
    ]


def benchmark_notes(result: BenchmarkResult) -> list[str]:
    """Return lines with the biases, which are not in the table."""

    def points(bias: Bias | None) -> str:
        if bias is None:
            return "-"
        # Adding 0 turns -0.0 into 0.0.
        point, low, high = (round(100 * value, 1) + 0.0 for value in (bias.difference, *bias.interval))
        return f"{point:+.1f} ({low:+.1f} to {high:+.1f})"

    return [
        f"position bias, points for the first caption: {points(result.position_bias)}",
        f"length bias, points for the longer caption: {points(result.length_bias)}",
        f"decisions for the worse one: {result.reversed}, for the longer one of the two: {result.reversed_longer}",
    ]
