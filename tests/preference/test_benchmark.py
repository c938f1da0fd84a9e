"""The judge benchmark with a scripted judge and results derived by hand; and the documented results."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from salmonn.cli.score import print_benchmark
from salmonn.preference import benchmark as module
from salmonn.preference.benchmark import (
    LabelledPair,
    benchmark_notes,
    benchmark_rows,
    read_labelled_pairs,
    run_benchmark,
)
from salmonn.records import Event, Score, Unscored, write_records
from salmonn.synthetic.judge import RuleJudge

ROOT = Path(__file__).parents[2]
EVENTS = tuple(Event(f"event {number}") for number in range(4))


class ScriptedJudge:
    """A judge that reads a caption's errors and repeated words from its first two words; "?" is unscored."""

    name = "scripted"
    prompt_hash = "0"
    is_deterministic = True

    def __init__(self):
        self.calls = []

    def check(self, reference):
        if not reference.events:
            raise ValueError(f"{reference.video} has no events")

    def judge(self, tasks, *, seed=0, progress=None):
        self.calls.append((len(tasks), seed))
        if progress:
            progress(len(tasks))
        return [self._one(task) for task in tasks]

    def _one(self, task):
        caption = task.caption
        if caption.text.startswith("?"):
            return Unscored(caption.video, "no answer", caption.sample)
        errors, repeated, *_ = map(int, caption.text.split()[:2])
        # Spread over the three classes, so that omitting one is noticed.
        missing, incorrect = min(errors, 1), max(min(errors - 1, 1), 0)
        counts = {"missing": missing, "incorrect": incorrect, "hallucinated": errors - missing - incorrect}
        words = len(caption.text.split())
        return Score(
            caption.video, len(EVENTS), num_words=words, num_repeated_words=repeated, sample=caption.sample, **counts
        )


def pair(first: str, second: str, better: str = "first", **fields) -> LabelledPair:
    return LabelledPair(fields.pop("events", EVENTS), first, second, better, **fields)


def decide(*pairs: LabelledPair) -> module.BenchmarkResult:
    return run_benchmark(pairs, ScriptedJudge())


@pytest.mark.parametrize(
    ("labelled", "right", "ties"),
    [
        (pair("0 0", "1 0"), 1, 0),
        (pair("1 0", "0 0"), 0, 0),
        (pair("1 0", "0 0", "second"), 1, 0),
        # all three classes of errors count: 3 are one each
        (pair("2 0", "3 0"), 1, 0),
        # errors take precedence over repetition
        (pair("0 2", "1 0"), 1, 0),
        # equal errors: the share of repeated words decides, 1 of 4 against 1 of 2
        (pair("1 1 a b", "1 1"), 1, 0),
        (pair("1 1", "1 1"), 0, 1),
        (pair("1 1", "1 1", "tie"), 1, 1),
        (pair("0 0", "1 0", "tie"), 0, 0),
        # only padding accepts a tie, but not a preference for the padded one
        (pair("1 0", "1 0 a b", kind="padding"), 1, 1),
        (pair("1 0", "0 0 a b", kind="padding"), 0, 0),
    ],
)
def test_one_decision(labelled, right, ties):
    total = decide(labelled).total
    assert (total.pairs, total.right, total.ties, total.unscored) == (1, right, ties, 0)


def test_accuracy_and_its_interval():
    total = decide(*[pair("0 0", "1 0")] * 3, pair("1 0", "0 0")).total
    # Wilson, 3 of 4: z z / n = 3.84146 / 4 = 0.960365; (0.75 + 0.480182 -+ 1.959964 sqrt((0.1875 + 0.240091) / 4))
    # / 1.960365 = (1.230182 -+ 0.640814) / 1.960365
    assert total.accuracy == 0.75 and total.interval == pytest.approx((0.300642, 0.954412), abs=1e-6)
    # 4 of 4: the lower limit is 1 / 1.960365, 0 of 4: the upper limit is 0.960365 / 1.960365
    assert decide(*[pair("0 0", "1 0")] * 4).total.interval == pytest.approx((0.510109, 1), abs=1e-6)
    assert decide(*[pair("1 0", "0 0")] * 4).total.interval == pytest.approx((0, 0.489891), abs=1e-6)


def test_the_gap_is_the_difference_in_errors():
    pairs = [
        pair("0 0", "3 0", gap=2),  # 3 instead of 2: an error of 1
        pair("1 0", "0 0", gap=1),  # -1 instead of 1: an error of 2
        pair("2 0", "0 0", "second", gap=2),  # 2, which is correct
        pair("0 1", "3 0"),  # without a labelled gap it does not count
        pair("? 0", "0 0", gap=2),  # not scored: does not count either
    ]
    assert decide(*pairs).total.gap_error == pytest.approx((1 + 2 + 0) / 3)
    assert decide(pairs[3]).total.gap_error is None


def test_unscored_pairs_are_counted_and_reported():
    judge, done = ScriptedJudge(), []
    pairs = [pair("0 0", "1 0"), pair("0 0", "?"), pair("0 0", "1 0", events=()), pair("0 0", "1 0")]
    result = run_benchmark(pairs, judge, seed=5, progress=done.append)
    assert result.unscored == (Unscored("pair 3", "pair 3 has no events"), Unscored("pair 2", "no answer", 1))
    total = result.total
    assert (total.right, total.unscored, total.accuracy, total.scored_accuracy) == (2, 2, 0.5, 1.0)
    # one call for all captions except the two of the rejected pair; progress of all eight
    assert judge.calls == [(6, 5)] and sum(done) == 8


def test_only_unscored_pairs():
    result = decide(pair("0 0", "1 0", events=()))
    assert result.total.scored_accuracy is None and result.total.accuracy == 0
    assert result.position_bias is None and result.length["longer"].interval is None
    assert benchmark_rows(result)[0] == [("all", "1", "0.0", "0.0 - 79.3", "-", "1", "-", "-")]
    assert benchmark_notes(result)[0].endswith(": -")


def test_biases_compare_within_a_kind():
    good, bad = ("0 0", "1 0"), ("1 0", "0 0")
    kind_a = [pair(*good), pair(*good), pair(*reversed(good), "second"), pair(*reversed(bad), "second")]
    kind_b = [pair(*bad, kind="b"), *[pair(*reversed(good), "second", kind="b")] * 3]
    # neither kinds with only one side nor unscored pairs count
    ignored = [pair(*good, kind="c"), pair("?", "0 0", "second"), pair(*good, "tie")]
    result = decide(*kind_a, *kind_b, *ignored)
    assert [(tally.pairs, tally.right) for tally in result.position.values()] == [(4, 3), (6, 4)]
    # a: 2 of 2 against 1 of 2, difference 0.5, weight 2 * 2 / 4 = 1; b: 0 of 1 against 3 of 3, -1, 1 * 3 / 4 = 0.75
    # together (0.5 - 0.75) / 1.75; variance: of a alone 1 * 0.5 * 0.5 / 2 = 0.125, of b none
    half_width = 1.959964 * 0.125**0.5 / 1.75
    assert result.position_bias.difference == pytest.approx(-1 / 7)
    assert result.position_bias.interval == pytest.approx((-1 / 7 - half_width, -1 / 7 + half_width))
    assert benchmark_notes(result)[0].endswith("-14.3 (-53.9 to +25.3)")


def test_length():
    pairs = [
        pair("0 0 a", "1 0"),  # the better is longer
        pair("1 0 a", "0 0"),  # the better is longer, the shorter is preferred
        pair("1 0", "0 0 a"),  # the better is shorter, the longer is preferred
        pair("1 0", "0 0 a b", kind="padding"),  # the same
        pair("1 0", "1 0 a"),  # a tie is wrong, without a preference
        pair("1 0", "0 0"),  # equal lengths
        pair("1 0 a", "0 0", "tie"),  # neither is better
    ]
    result = decide(*pairs)
    assert [(tally.pairs, tally.right) for tally in result.length.values()] == [(2, 1), (3, 0)]
    assert (result.reversed, result.reversed_longer) == (3, 2)
    # of the kind "other" 1 of 2 against 0 of 2; padding has one side only
    assert result.length_bias.difference == pytest.approx(0.5)


def test_groups():
    pairs = [pair("0 0", "1 0", kind="order", where="end"), pair("1 0", "0 0", kind="colour", where="end")]
    result = decide(*pairs, pair("0 0", "1 0", kind="order"))
    assert {kind: (tally.pairs, tally.right) for kind, tally in result.kinds.items()} == {
        "order": (2, 2),
        "colour": (1, 0),
    }
    assert {position: tally.pairs for position, tally in result.where.items()} == {"start": 0, "middle": 0, "end": 2}
    value = json.loads(json.dumps(result.to_json()))
    assert value["kinds"]["order"]["accuracy"] == 1 and value["where"]["end"]["right"] == 1
    assert value["total"]["interval"] == pytest.approx(result.total.interval) and value["judge"] == "scripted"


def test_every_row_is_printed(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("salmonn.cli.score.Console", lambda **options: Console(file=out, **options))
    result = decide(pair("0 0", "1 0", kind="order", gap=1), pair("1 0 a", "0 0", kind="colour", gap=1))
    print_benchmark(result)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines()]
    assert [row for row in cells if row] == [list(row) for group in benchmark_rows(result) for row in group]
    assert ["colour", "1", "0.0", "0.0 - 79.3", "0.0", "0", "0.0", "2.00"] in cells
    assert all(note in out.getvalue() for note in benchmark_notes(result))


def test_pairs_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [pair("a", "b", gap=1, where="end", seed=1, index=2), pair("a", "b", "tie")]
    write_records(path, pairs)
    assert read_labelled_pairs(path) == pairs
    path.write_text("")
    with pytest.raises(ValueError, match=r"has no pairs: generate some with tools/judge_pairs\.py"):
        read_labelled_pairs(path)
    path.write_text('{"events": [], "first": "a", "second": "b", "better": "tie", "gap": 1}\n')
    with pytest.raises(ValueError, match="line 1: LabelledPair: gap must be at least 0, and 0 for a tie, got 1"):
        read_labelled_pairs(path)


def test_the_documented_figures():
    page = (ROOT / "docs" / "judge_benchmark.md").read_text(encoding="utf-8")
    result = run_benchmark(read_labelled_pairs(ROOT / "data" / "judge_pairs.jsonl"), RuleJudge())
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    for row in [row for group in benchmark_rows(result) for row in group]:
        assert list(row) in table
    for note in benchmark_notes(result):
        assert note in page
