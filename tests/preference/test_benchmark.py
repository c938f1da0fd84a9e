"""The reward benchmark with scripted rewards and results derived by hand; and the documented results."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from salmonn.preference.benchmark import (
    Outcome,
    choose_other_clips,
    rate_items,
    summarize,
    table_notes,
    table_rows,
    ties_score,
)
from salmonn.preference.benchmark_items import BenchmarkItem, SyntheticClip, clip_name, read_items
from salmonn.preference.rating import Rating
from salmonn.preference.reward import JudgeReward
from salmonn.records import Event, Unscored
from salmonn.synthetic.judge import RuleJudge

ROOT = Path(__file__).parents[2]
RIGHT, TIE, WRONG = Outcome((1.0,), (0.0,)), Outcome((0.5,), (0.5,)), Outcome((0.0,), (1.0,))


class ScriptedReward:
    """A reward that reads its rating from a caption's first word; "?" is unscored, and references need events."""

    name = "scripted"

    def __init__(self):
        self.calls = []

    def check(self, reference):
        if not reference.events:
            raise ValueError(f"{reference.video} has no events")

    def rate(self, tasks):
        self.calls.append([(task.caption.video, task.caption.modality, task.caption.prompt) for task in tasks])
        return [
            Unscored(task.caption.video, "no answer", task.caption.sample)
            if task.caption.text.startswith("?")
            else Rating(task.caption.video, {"reward": float(task.caption.text.split()[0])}, {"reward": 1.0})
            for task in tasks
        ]


def item(chosen="1", rejected="0", *, subset="a", **fields) -> BenchmarkItem:
    texts = {"chosen": chosen, "rejected": rejected}
    answers = {name: (text,) if isinstance(text, str) else tuple(text) for name, text in texts.items()}
    return BenchmarkItem(fields.pop("id", "0"), subset, "Tell.", **answers, **fields)


@pytest.mark.parametrize(
    ("chosen", "rejected", "credit"),
    [
        ((1.0,), (0.0,), 1),
        ((0.0,), (1.0,), 0),
        ((1.0,), (1.0,), 1 / 2),
        # one of four, three of which share the highest value
        ((2.0,), (2.0, 2.0, 1.0), 1 / 3),
        ((1.0,), (2.0, 0.0, 0.0), 0),
        # two correct answers, one of them as high as a wrong one
        ((2.0, 0.0), (2.0,), 1 / 2),
        ((), (), 0),
    ],
)
def test_credit(chosen, rejected, credit):
    outcome = Outcome(chosen, rejected)
    assert outcome.credit == pytest.approx(credit) and outcome.is_tie == (0 < credit < 1)


def test_a_reward_rates_each_answer_with_its_clip_and_prompt():
    events = (Event("a low tone is heard", "audio"),)
    items = [
        item("3", ["1", "2"], clip=SyntheticClip(4, 7), use="audio", events=events),
        item("? 1", "0", events=events, id="x"),
        item(id="y"),
        item("1", "1", clip=Path("a.mp4"), events=events),
    ]
    reward, done = ScriptedReward(), []
    outcomes = rate_items(items, reward, batch_size=2, progress=done.append)
    assert outcomes == [
        Outcome((3.0,), (1.0, 2.0)),
        Outcome(reason="no answer"),
        Outcome(reason="y has no events"),
        Outcome((1.0,), (1.0,)),
    ]
    # two items a call, without the refused one
    first = [("seed 4 clip 7", "audio", "Tell.")] * 3 + [("x", "both", "Tell.")] * 2
    assert reward.calls == [first, [("a.mp4", "both", "Tell.")] * 2] and done == [2, 2]


def test_the_blind_reward_is_shown_another_clip_of_the_subset():
    items = [item(clip=SyntheticClip(1, index), use="visual") for index in (0, 0, 1)]
    items += [item(subset="b", clip=Path(name)) for name in ("a.mp4", "b.mp4")]
    others = choose_other_clips(items)
    assert [clip_name(one) for one in others] == [
        "seed 1 clip 1", "seed 1 clip 1", "seed 1 clip 0", "b.mp4", "a.mp4",
    ]  # fmt: skip
    # with all of it: that something is missing has to be noticed
    assert {one.use for one in others} == {"both"}
    reward = ScriptedReward()
    rate_items([replace(items[0], events=(Event("e"),))], reward, clips=others[:1])
    assert reward.calls == [[("seed 1 clip 1", "both", "Tell.")] * 2]
    with pytest.raises(ValueError, match="all items of a are about the same clip: the blind control needs another"):
        choose_other_clips(items[:2])


def test_rows_by_hand():
    """Three scenarios: x has the subsets a (2 items) and b (1), y has c, and d belongs to none."""
    items = [
        item(subset="a", scenario="x", id="0"),
        item("1 a", "0", subset="a", scenario="x", id="1"),
        item("1 a", "0", subset="b", scenario="x"),
        item("1", "0 a", subset="c", scenario="y"),
        item(subset="d"),
    ]
    outcomes = [RIGHT, TIE, WRONG, RIGHT, Outcome(reason="no answer")]
    result = summarize(items, outcomes, name="r", blind=[WRONG, RIGHT, RIGHT, RIGHT, TIE])
    assert {name: (row.items, row.accuracy, row.blind) for name, row in result.subsets.items()} == {
        "a": (2, 0.75, 0.5),
        "b": (1, 0.0, 1.0),
        "c": (1, 1.0, 1.0),
        "d": (1, 0.0, 0.5),
    }
    # of scenario x: (1 + 0.5 + 0) / 3, blind (0 + 1 + 1) / 3, so it is void
    x = result.scenarios["x"]
    assert (x.accuracy, x.blind) == (pytest.approx(0.5), pytest.approx(2 / 3)) and x.is_void
    assert (x.ties, x.unscored, result.total.unscored) == (1, 0, 1)
    # lengths of x: equal, better is longer, better is longer
    assert (x.longer, x.shorter) == (pytest.approx((0.5 + 1 + 1) / 3), pytest.approx((0.5 + 0 + 0) / 3))
    assert result.total.accuracy == pytest.approx(2.5 / 5) and result.total.blind == pytest.approx(3.5 / 5)
    assert result.macro == pytest.approx((0.5 + 1 + 0) / 3)
    assert result.macro_blind == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert result.credits == {"a/0": 1, "a/1": 0.5, "b/0": 0, "c/0": 1, "d/0": 0}
    assert result.unscored == (Unscored("d/0", "no answer"),)
    groups = table_rows(result)
    assert [len(group) for group in groups] == [4, 3, 2]
    assert groups[0][0][:3] == ("a", "2", "75.0") and groups[0][3][4:6] == ("-", "1")
    assert groups[1][0][0] == "x (void)" and groups[1][1] == (
        "y (void)", "1", "100.0", "20.7 - 100.0", "0.0", "0", "0.0", "100.0", "100.0",
    )  # fmt: skip
    assert groups[2][1] == ("mean of scenarios", "5", "50.0", *["-"] * 5, "72.2")
    assert table_notes(result)[0] == (
        "x is void: with the clip the reward is right in 50.0 %, with another clip in 66.7 %, so it does not use the "
        "clip there"
    )
    value = json.loads(json.dumps(asdict(result)))
    assert value["format"] == 1 and value["scenarios"]["x"]["interval"]["low"] == pytest.approx(x.interval.low)


def test_the_interval_counts_ties_as_half():
    row = summarize([item(id=str(n)) for n in range(4)], [RIGHT, RIGHT, TIE, TIE], name="r").total
    # Wilson, 3 of 4: z z / n = 3.84146 / 4 = 0.960365; (0.75 + 0.480182 -+ 1.959964 sqrt((0.1875 + 0.240091) / 4))
    # / 1.960365
    assert (row.interval.low, row.interval.high) == pytest.approx((0.300642, 0.954412), abs=1e-6)
    assert row.blind is None and not row.is_void


def test_length_bias_compares_within_a_subset():
    long, short = {"chosen": "1 a", "rejected": "0"}, {"chosen": "1", "rejected": "0 a"}
    a = [(long, RIGHT), (long, RIGHT), (short, RIGHT), (short, WRONG)]
    b = [(long, WRONG), (short, RIGHT), (short, RIGHT), (short, RIGHT)]
    ignored = [({"chosen": "1", "rejected": "0"}, WRONG), (long, Outcome(reason="?"))]
    cases = [(case, "a") for case in a] + [(case, "b") for case in b] + [(case, "c") for case in ignored]
    items = [item(subset=subset, **texts) for (texts, _), subset in cases]
    result = summarize(items, [outcome for (_, outcome), _ in cases], name="r")
    # a: 2 of 2 against 1 of 2, difference 0.5, weight 2 * 2 / 4 = 1; b: 0 of 1 against 3 of 3, -1, 1 * 3 / 4 = 0.75
    # together (0.5 - 0.75) / 1.75; variance: of a alone 1 * 0.5 * 0.5 / 2 = 0.125, of b none
    reach = 1.959964 * 0.125**0.5 / 1.75
    bias = result.length_bias
    assert bias.difference == pytest.approx(-1 / 7)
    assert (bias.interval.low, bias.interval.high) == pytest.approx((-1 / 7 - reach, -1 / 7 + reach))
    assert table_notes(result) == ["length bias, points for the longer answer: -14.3 (-53.9 to +25.3)"]
    assert summarize(items[:1], [RIGHT], name="r").length_bias is None


def test_ties_by_hand():
    """Prompt 1: margins 3 - 2 = 1 of tied, 4 of ref, spread 0.5. Prompt 2: 0.5 of tied, 0.2 of ref, spread 1."""
    items = [
        ("tied:1", (3.5, 3.0), (2.0, 1.0)),
        ("ref:1", (5.0,), (1.0, 0.0)),
        ("tied:2", (3.0, 2.0), (1.5,)),
        ("ref:2", (1.2,), (1.0,)),
    ]
    # accuracies 1 and 1; margin above the spread in 1 of 2 prompts, also with ref's margin;
    # tanh(1 / 0.5 - 1) = 0.761594 and tanh(0.2 / 1 - 1) = -0.664037
    expected = 0.3 + 0.3 + 0.2 / 2 + 0.2 / 2 + 0.01 * (0.761594 - 0.664037) / 2
    assert ties_score(items) == pytest.approx(expected, abs=1e-6)
    # a ref margin between 0 and the spread fails the second criterion only: min(1, 0.2) < 0.5
    hard = [items[0], ("ref:1", (1.2,), (1.0,))]
    assert ties_score(hard) == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * -0.537050, abs=1e-6)
    # a wrong answer above one of two correct ones: tied is inaccurate, and the margin is negative
    assert ties_score([("tied:1", (3.0, 1.0), (2.0,)), items[1]]) == pytest.approx(0.3 - 0.01 * 0.905148, abs=1e-6)
    # unscored
    assert ties_score([("tied:1", (), ()), items[1]]) == pytest.approx(0.3 - 0.01)
    # equal correct answers: the spread is 0, so the tie break is at its limit
    assert ties_score([("tied:1", (3.0, 3.0), (2.0,)), items[1]]) == pytest.approx(1.01)
    with pytest.raises(ValueError, match="an item of Ties must have an id such as tied:3 or ref:3, got '7'"):
        ties_score([("7", (1.0,), (0.0,))])


def test_the_ties_subset_has_its_own_score():
    """Its row has no interval, and the mean of scenarios includes it."""
    items = [
        item(["4", "4"], ["1"], subset="Ties", id="tied:1"),
        item("4", "1", subset="Ties", id="ref:1"),
        item(subset="Math"),
    ]
    result = summarize(items, [Outcome((4.0, 4.0), (1.0,)), Outcome((4.0,), (1.0,)), TIE], name="r")
    assert result.subsets["Ties"].accuracy == pytest.approx(1.01) and result.subsets["Ties"].interval is None
    assert result.macro == pytest.approx((1.01 + 0.5) / 2) and result.total.accuracy == pytest.approx(2.5 / 3)


def test_the_documented_figures():
    page = (ROOT / "docs" / "reward_benchmark.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    reward = JudgeReward(RuleJudge(), repetition_weight=1.0)
    for name in ("reward_pairs", "reward_best_of_4"):
        items = read_items([ROOT / "data" / f"{name}.jsonl"])
        result = summarize(items, rate_items(items, reward, batch_size=len(items)), name="rule")
        for row in (row for group in table_rows(result)[:2] for row in group):
            assert list(row) in table, row
