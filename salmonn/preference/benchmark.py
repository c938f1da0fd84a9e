"""How well a judge tells the better of two captions: `salmonn judge-benchmark PAIRS`.

    result = bench(read_pairs("data/judge_pairs.jsonl"), RuleJudge())
    benchmark_rows(result)

Each caption is judged by itself, as in scoring and in mrDPO; the one with the lower Total is preferred, at equal Total
the one with less repetition. `docs/judge_benchmark.md` describes the shipped pairs and the results of the rule judge.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from salmonn.records import Caption, Event, Reference, Score, Unscored, read_records
from salmonn.score.judge import Judge, ProgressCallback, ScoringTask

Better = Literal["first", "second", "tie"]
Where = Literal["", "start", "middle", "end"]

TIE_IS_RIGHT = "padding"  # the kind whose fault costs nothing, as long as it is not rewarded
Z = 1.959964  # of a 95 % interval
COLUMNS = ("", "pairs", "right %", "95 %", "ties %", "unscored", "right of scored %", "gap off by")


@dataclass(frozen=True)
class LabelledPair:
    """Two captions of a clip, and which is better.

    Args:
        events: of the clip, in order of time.
        first, second: the captions.
        better: which is better, or tie.
        gap: by how many events the worse has more wrong.
        kind: of the fault; in "padding" a judge that sees no difference is right, too.
        where: in which third of the caption the fault stands; "" where that is unknown.
        seed, index: of the synthetic clip; None for others.
    """

    events: tuple[Event, ...]
    first: str
    second: str
    better: Better
    gap: int = 0
    kind: str = "other"
    where: Where = ""
    seed: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.gap < 0 or (self.gap and self.better == "tie"):
            raise ValueError(
                f"gap must be at least 0, and 0 for a tie, got {self.gap}: name the better one in `better`"
            )

    @property
    def is_longer_better(self) -> bool | None:
        """Whether the better caption has more words; None for as many, and for a tie."""
        first, second = (len(text.split()) for text in (self.first, self.second))
        if first == second or self.better == "tie":
            return None
        return (first > second) == (self.better == "first")


@dataclass(frozen=True)
class DecisionCounts:
    """A judge's decisions on some pairs.

    Args:
        pairs: all of them.
        right: those decided as labelled.
        ties: those on which the judge has no preference.
        unscored: those with a caption or a reference that the judge could not judge; none of them is right.
        gap_error: mean of |judge's gap - labelled gap| in events, over scored pairs with a gap; None: there is none.
    """

    pairs: int
    right: int
    ties: int
    unscored: int
    gap_error: float | None

    @property
    def scored(self) -> int:
        """Pairs that the judge could judge."""
        return self.pairs - self.unscored

    @property
    def accuracy(self) -> float | None:
        """Share of right decisions of all pairs; None where there are none."""
        return self.right / self.pairs if self.pairs else None

    @property
    def scored_accuracy(self) -> float | None:
        """Share of right decisions of scored pairs; None where there are none."""
        return self.right / self.scored if self.scored else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `accuracy` by Wilson's score method; None where there are no pairs."""
        if self.accuracy is None:
            return None
        square = Z**2 / self.pairs
        middle = self.accuracy + square / 2
        spread = Z * math.sqrt((self.accuracy * (1 - self.accuracy) + square / 4) / self.pairs)
        # Rounding errors would put the limits of 0 and 1 a hair outside.
        return max((middle - spread) / (1 + square), 0.0), min((middle + spread) / (1 + square), 1.0)

    def to_json(self) -> dict[str, Any]:
        """Counts and shares."""
        shares = {"accuracy": self.accuracy, "interval": self.interval, "scored_accuracy": self.scored_accuracy}
        return asdict(self) | shares


@dataclass(frozen=True)
class Bias:
    """How much more often a judge is right on one group of scored pairs than on another, with its 95 % interval.

    Faults change the length: without what is left out a caption is shorter, with what is invented longer. So groups are
    compared within each kind, and kinds weighted by n m / (n + m) for n and m pairs (Mantel and Haenszel's risk
    difference; variance: Greenland and Robins 1985).
    """

    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class BenchmarkResult:
    """How a judge did.

    Args:
        judge, prompt_hash: who judged, by which words or rules.
        total: over all pairs.
        kinds: by kind of fault.
        position: by which caption is the better one: "first", "second".
        length: by whether the better caption is "longer" or "shorter" than the other, in words.
        where: by the third of the caption in which the fault stands.
        position_bias: accuracy where the better one comes first less accuracy where it comes second; None: no kind of
            fault has both.
        length_bias: accuracy where the better one is longer less accuracy where it is shorter; None as above.
        reversed: decisions for the worse one of two captions that differ in length.
        reversed_longer: those of them that prefer the longer.
        unscored: the pairs that could not be judged ("pair 3", counted from 1), and why.
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
        """All of it, for a JSON file."""
        groups = ("kinds", "position", "length", "where")
        tallies = {name: {key: tally.to_json() for key, tally in getattr(self, name).items()} for name in groups}
        return asdict(self) | {"total": self.total.to_json()} | tallies


def read_labelled_pairs(path: Path | str) -> list[LabelledPair]:
    """Read labelled pairs from JSONL.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming what is wrong and where; an empty file is, too.
    """
    pairs = read_records(path, LabelledPair)
    if not pairs:
        raise ValueError(f"{path} holds no pairs: write some with tools/judge_pairs.py")
    return pairs


def run_benchmark(
    pairs: Sequence[LabelledPair], judge: Judge, *, seed: int = 0, progress: ProgressCallback | None = None
) -> BenchmarkResult:
    """Have a judge decide the pairs; `progress` is called with the number of captions just finished, of two a pair.

    All captions go to the judge at once, so that it can work on many side by side.
    """
    refused = {}
    for number, pair in enumerate(pairs):
        try:
            judge.check(_reference(pair, number))
        except ValueError as error:
            refused[number] = Unscored(_name(number), str(error))
    if progress and refused:
        progress(2 * len(refused))
    asked = [number for number in range(len(pairs)) if number not in refused]
    tasks = [task for number in asked for task in _tasks(pairs[number], number)]
    results = judge.judge(tasks, seed=seed, progress=progress)
    judged = dict(zip(asked, zip(results[::2], results[1::2], strict=True), strict=True))
    decisions = [_decide(pair, *judged.get(number, ())) for number, pair in enumerate(pairs)]
    lost = [result for result in results if isinstance(result, Unscored)]
    return _summarise(decisions, judge, unscored=(*refused.values(), *lost))


def _name(number: int) -> str:
    return f"pair {number + 1}"


def _reference(pair: LabelledPair, number: int) -> Reference:
    return Reference(_name(number), pair.events)


def _tasks(pair: LabelledPair, number: int) -> list[ScoringTask]:
    reference = _reference(pair, number)
    return [
        ScoringTask(reference, Caption(reference.video, text, sample=sample))
        for sample, text in enumerate((pair.first, pair.second))
    ]


@dataclass(frozen=True)
class _Decision:
    """What a judge makes of a pair; `preferred` None: unscored. `gap` counts events for the labelled better one."""

    pair: LabelledPair
    preferred: Better | None = None
    gap: int = 0

    @property
    def is_right(self) -> bool:
        is_free_tie = self.preferred == "tie" and self.pair.kind == TIE_IS_RIGHT
        return self.preferred == self.pair.better or is_free_tie

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


def _summarise(decisions: Sequence[_Decision], judge: Judge, *, unscored: tuple[Unscored, ...]) -> BenchmarkResult:
    lengths = {True: "longer", False: "shorter", None: ""}

    def position(decision: _Decision) -> str:
        return "" if decision.pair.better == "tie" else decision.pair.better

    def length(decision: _Decision) -> str:
        return lengths[decision.pair.is_longer_better]

    turned = [decision for decision in decisions if decision.is_reversed and length(decision)]
    return BenchmarkResult(
        judge=judge.name,
        prompt_hash=judge.prompt_hash,
        total=_tally(decisions),
        kinds=_tallies(decisions, lambda decision: decision.pair.kind),
        position=_tallies(decisions, position, names=("first", "second")),
        length=_tallies(decisions, length, names=("longer", "shorter")),
        where=_tallies(decisions, lambda decision: decision.pair.where, names=("start", "middle", "end")),
        position_bias=_bias(decisions, position, names=("first", "second")),
        length_bias=_bias(decisions, length, names=("longer", "shorter")),
        reversed=len(turned),
        reversed_longer=sum(length(decision) == "shorter" for decision in turned),
        unscored=unscored,
    )


def _tallies(
    decisions: Sequence[_Decision], group: Callable[[_Decision], str], *, names: Sequence[str] | None = None
) -> dict[str, DecisionCounts]:
    """Tallies of groups by name; of those that occur, in their order, where no names are given."""
    names = list(dict.fromkeys(map(group, decisions))) if names is None else names
    return {name: _tally([decision for decision in decisions if group(decision) == name]) for name in names}


def _tally(decisions: Sequence[_Decision]) -> DecisionCounts:
    scored = [decision for decision in decisions if decision.preferred]
    errors = [abs(decision.gap - decision.pair.gap) for decision in scored if decision.pair.gap]
    return DecisionCounts(
        pairs=len(decisions),
        right=sum(decision.is_right for decision in decisions),
        ties=sum(decision.preferred == "tie" for decision in decisions),
        unscored=len(decisions) - len(scored),
        gap_error=sum(errors) / len(errors) if errors else None,
    )


def _bias(decisions: Sequence[_Decision], group: Callable[[_Decision], str], *, names: tuple[str, str]) -> Bias | None:
    """Of the first group against the second; None where no kind has both."""
    by_kind: dict[str, list[_Decision]] = {}
    for decision in decisions:
        if decision.preferred:
            by_kind.setdefault(decision.pair.kind, []).append(decision)
    weighted = variance = weights = 0.0
    for same in by_kind.values():
        one, other = _tallies(same, group, names=names).values()
        if one.accuracy is not None and other.accuracy is not None:
            weight = one.pairs * other.pairs / (one.pairs + other.pairs)
            weights += weight
            weighted += weight * (one.accuracy - other.accuracy)
            spread = sum(tally.right * (tally.pairs - tally.right) / tally.pairs**3 for tally in (one, other))
            variance += weight**2 * spread
    if not weights:
        return None
    difference, reach = weighted / weights, Z * math.sqrt(variance) / weights
    return Bias(difference, (difference - reach, difference + reach))


def benchmark_rows(result: BenchmarkResult) -> list[list[tuple[str, ...]]]:
    """The table in groups of rows, with the cells that `COLUMNS` names."""
    groups = [
        {"all": result.total},
        result.kinds,
        {f"better comes {name}": tally for name, tally in result.position.items()},
        {f"better is {name}": tally for name, tally in result.length.items()},
        {f"fault at {name}": tally for name, tally in result.where.items()},
    ]
    return [[(name, *_cells(tally)) for name, tally in group.items()] for group in groups]


def benchmark_notes(result: BenchmarkResult) -> list[str]:
    """What the table does not say, a line each."""
    return [
        f"position bias, points for the first caption: {_points(result.position_bias)}",
        f"length bias, points for the longer caption: {_points(result.length_bias)}",
        f"decisions for the worse one: {result.reversed}, for the longer one of the two: {result.reversed_longer}",
    ]


def _cells(tally: DecisionCounts) -> tuple[str, ...]:
    return (
        str(tally.pairs),
        _percent(tally.accuracy),
        " - ".join(map(_percent, tally.interval)) if tally.interval else "-",
        _percent(tally.ties / tally.scored if tally.scored else None),
        str(tally.unscored),
        _percent(tally.scored_accuracy),
        "-" if tally.gap_error is None else f"{tally.gap_error:.2f}",
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _points(bias: Bias | None) -> str:
    if bias is None:
        return "-"
    # Adding 0 makes 0.0 of -0.0.
    point, low, high = (round(100 * value, 1) + 0.0 for value in (bias.difference, *bias.interval))
    return f"{point:+.1f} ({low:+.1f} to {high:+.1f})"
