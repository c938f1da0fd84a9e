"""Rules that stop the rounds early: by pairs, by margin, by the held-out score."""

import json
import logging
from dataclasses import replace

import pytest

from salmonn.preference.rating import Rating
from salmonn.preference.selection import SelectionConfig
from salmonn.preference.subset import SubsetConfig
from salmonn.records import Caption, Comparison, Event, Mention, Reference, Score
from salmonn.score.metrics import Rates
from salmonn.train.data import ClipSet
from salmonn.train.rounds import (
    EarlyStopConfig,
    RoundFailedError,
    best_round,
    keep_subset,
    load_or_select,
    require_examples,
    require_margin,
    stop_reason,
)
from salmonn.train.run_log import RunSummary

PAIRS = [Comparison("a.mp4", "p", "good", "bad", "truth", margin=0.5)] * 3


def rates(total: float) -> Rates:
    return Rates(
        missing=total, incorrect=0.0, hallucinated=0.0, hallucination=0.0, total=total, repetition=0.0, clips=1
    )


@pytest.mark.parametrize(("min_pairs", "batch_size", "required"), [(None, 4, 4), (5, 2, 5), (0, 2, 0)])
def test_too_few_pairs(min_pairs, batch_size, required):
    config = EarlyStopConfig(min_pairs=min_pairs)
    if required > len(PAIRS):
        message = rf"round_2 has 3 pairs .*, fewer than {required} .*min_gap.*--redo-from round_2/pairs, .*/captions"
        with pytest.raises(RoundFailedError, match=message):
            require_examples(PAIRS, config, batch_size=batch_size, name="round_2")
    else:
        require_examples(PAIRS, config, batch_size=batch_size, name="round_2")


def test_zero_pairs_are_never_enough():
    with pytest.raises(RoundFailedError, match="has 0 pairs"):
        require_examples([], EarlyStopConfig(min_pairs=0), batch_size=1, name="round_1")
    with pytest.raises(RoundFailedError, match=r"has 0 clips whose captions are rated differently, .*: sample more"):
        require_examples([], EarlyStopConfig(), batch_size=1, name="round_1", are_groups=True)


def write_steps(folder, margins):
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"step": step, "margin": margin}) for step, margin in enumerate(margins))
    (folder / "steps.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_the_last_quarter_of_a_round_must_have_a_margin(tmp_path):
    """The last two of 8 steps count: the mean of 0.3 and -0.1 is 0.1, of -0.3 and 0.1 it is -0.1."""
    folder = tmp_path / "round_1"
    require_margin(write_steps(folder, [-9.0] * 6 + [0.3, -0.1]), EarlyStopConfig(), name="round_1")
    require_margin(folder, EarlyStopConfig(min_margin=0.09), name="round_1")
    with pytest.raises(
        RoundFailedError, match=r"round_1 has not learned .* margin averages 0\.1000 .*min_margin is 0\.2"
    ):
        require_margin(folder, EarlyStopConfig(min_margin=0.2), name="round_1")
    write_steps(folder, [9.0] * 6 + [-0.3, 0.1])
    message = r"margin averages -0\.1000 .*more steps \(a\.steps\) .*--redo-from rebirth/teacher/model"
    with pytest.raises(RoundFailedError, match=message):
        require_margin(folder, EarlyStopConfig(), name="rebirth/teacher", steps="a.steps")
    require_margin(folder, EarlyStopConfig(min_margin=None), name="round_1")


def test_a_margin_of_zero_is_rejected(tmp_path):
    with pytest.raises(RoundFailedError):
        require_margin(write_steps(tmp_path, [0.5, 0.5, 0.5, 0.0]), EarlyStopConfig(), name="round_1")


def test_a_worse_score_stops_the_rounds():
    """0.6, then 0.5, 0.53 (3 points worse than the best), 0.56 (6 points)."""
    summary, config = RunSummary(sft=rates(0.6)), EarlyStopConfig(max_worsening=0.05)
    for total in (0.5, 0.53):
        summary.rounds.append(rates(total))
        assert stop_reason(summary, config) is None
    assert best_round(summary) == 1
    summary.rounds.append(rates(0.56))
    summary.stopped = stop_reason(summary, config)
    assert summary.stopped == (
        "after round 3 the held-out Total is 0.560, up from 0.500: more than early_stopping.max_worsening 0.05"
    )
    summary.rounds.append(rates(0.4))
    assert best_round(summary) == 4


def test_repetition_counts_when_the_best_round_is_chosen():
    """Total falls to 0.12 and rises to 0.13, but with 5 and then 2 % repeated the last round has fewer errors."""
    rounds = [rates(0.2), replace(rates(0.12), repetition=0.05), replace(rates(0.13), repetition=0.02)]
    assert best_round(RunSummary(sft=rates(0.6), rounds=rounds)) == 3
    assert best_round(RunSummary(sft=rates(0.6), rounds=rounds[:2])) == 2


def test_the_sft_model_can_be_the_best():
    summary = RunSummary(sft=rates(0.4), rounds=[rates(0.46)])
    assert best_round(summary) == 1
    assert best_round(replace(summary, stopped="early")) is None
    assert best_round(RunSummary(sft=rates(0.4), rounds=[rates(0.4)], stopped="early")) is None
    assert stop_reason(summary, EarlyStopConfig(max_worsening=0.05))
    assert not stop_reason(replace(summary, sft=rates(0.42)), EarlyStopConfig(max_worsening=0.05))


def test_a_subset_of_pairs_is_kept_with_its_account(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pairs = [
        Comparison(f"{number}.mp4", "describe", "one two three", f"word {number}", margin=number / 10)
        for number in range(4)
    ]
    assert keep_subset(pairs, SubsetConfig(), folder=tmp_path) == pairs and not list(tmp_path.iterdir())
    kept = keep_subset(pairs, SubsetConfig(keep=0.5), folder=tmp_path)
    assert kept == pairs[2:]
    lines = [json.loads(line) for line in (tmp_path / "importance.jsonl").read_text().splitlines()]
    assert [(line["video"], line["chosen"], line["rejected"], line["rank"]) for line in lines] == [
        (pair.video, pair.chosen, pair.rejected, rank) for pair, rank in zip(pairs, (None, None, 2, 1), strict=True)
    ]
    assert "kept 2 of 4 pairs from 2 videos; mean margin 0.250 (0.150 before)" in caplog.text
    assert "mean words 3.0 chosen, 2.0 rejected" in caplog.text


def test_a_subset_that_only_diversity_decides_is_told(tmp_path, caplog):
    """Margins and qualities are unknown, or the same for all."""
    caplog.set_level(logging.INFO)
    pairs = [Comparison(f"{number}.mp4", "describe", "one", f"word {number}", margin=0.5) for number in range(4)]
    unknown = [replace(pair, margin=None) for pair in pairs]
    for some, num_unknown, qualities, weights, told in (
        (pairs, 0, None, {}, "only diversity, the distance between clips, decides"),
        (unknown, 4, None, {}, "only diversity, the distance between clips, decides"),
        (unknown, 4, [0.0, -0.1, 0.0, 0.0], {"quality_weight": 0.0}, "only diversity"),
        (unknown, 4, None, {"diversity_weight": 0.0}, "the first are kept"),
        (unknown, 4, [0.0, -0.1, 0.0, 0.0], {}, ""),
        ([*unknown[:3], replace(pairs[3], margin=0.1), pairs[0]], 3, None, {}, ""),
    ):
        caplog.clear()
        keep_subset(some, SubsetConfig(keep=2, **weights), folder=tmp_path, qualities=qualities)
        assert ("no pair is kept for its margin or quality" in caplog.text) == bool(told) and told in caplog.text
        assert (f"{num_unknown} of {len(some)} pairs have no margin" in caplog.text) == bool(num_unknown)


def test_pairs_that_differ_in_repetition_are_added_after_the_choice_of_a_subset(tmp_path):
    """Of the pairs of four clips two are kept; one with a missing event and one with a repeated clause are added."""
    videos = [f"{name}.mp4" for name in "abcd"]
    cat, dog = Event("a cat sleeps"), Event("a dog barks")
    captions, ratings = [], []
    for number, video in enumerate(videos):
        texts = [("A cat sleeps.", 0.0, 0), ("A dog runs in.", 0.5 + number / 10, 0), ("A cat sleeps. " * 2, 0.5, 3)]
        for sample, (text, total, repeated) in enumerate(texts):
            score = Score(
                video, 2, 1, 0, 0, num_words=6, num_repeated_words=repeated, sample=sample, missed=(dog.text,),
                mentions=(Mention(cat, "A cat sleeps"),),
            )  # fmt: skip
            captions.append(Caption(video, text.strip(), sample=sample))
            ratings.append(Rating(video, {"total": total}, {"total": -1.0}, sample=sample, score=score))
    pairs = load_or_select(
        captions,
        ratings,
        ClipSet([Reference(video, (cat, dog), caption=video) for video in videos], tmp_path),
        config=SelectionConfig(max_pairs_per_video=1, repetition_fraction=1 / 3, repeat_negatives=0.25),
        subset=SubsetConfig(keep=2),
        source="rule",
        folder=tmp_path / "round_1",
    )
    assert [(pair.video, pair.chosen, pair.rejected) for pair in pairs] == [
        ("c.mp4", "A cat sleeps.", "A dog runs in."),
        ("d.mp4", "A cat sleeps.", "A dog runs in."),
        ("a.mp4", "A cat sleeps. A dog barks", "A cat sleeps. A cat sleeps"),
        ("a.mp4", "A cat sleeps.", "A cat sleeps. A cat sleeps."),
    ]
