"""From votes to captions for each rater: tools/raters.py, recipes/reward.py and salmonn reward."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from salmonn.files import parse_json, read_json, read_records, write_records
from salmonn.preference.feedback import FeedbackStore
from salmonn.preference.mixture import Rater, group_raters
from salmonn.preference.rating import Rating
from salmonn.preference.reward_model import RewardInfo, RewardModel, read_info
from salmonn.records import Caption
from salmonn.synthetic.render import SynthConfig, make_clips
from tests.launch import forked
from tests.limits import RUN_SECONDS

SHORT_CLIPS = SynthConfig(
    clips=8, seed=5, min_seconds=3, max_seconds=3, min_visual=2, max_visual=2, min_sounds=1, max_sounds=1
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, launch):
    """Votes of two raters who want everything and two who want it short, and a reward model that tells them apart."""
    folder = tmp_path_factory.mktemp("rater_groups")
    captions = []
    for one in make_clips(folder / "clips", SHORT_CLIPS, workers=1):
        sentences = re.findall(r"[^.]+\.", one.caption)
        texts = (one.caption, sentences[0], sentences[-1], one.caption + " A green star blinks.")
        captions += [Caption(one.video, text, "Describe it.", sample=sample) for sample, text in enumerate(texts)]
    write_records(folder / "captions.jsonl", captions)
    files = (folder / "captions.jsonl", "--references", folder / "clips/clips.jsonl", "--out", folder / "votes")
    flags = ("--raters", 4, "--votes", 60, "--noise", "clean", "--groups", "complete", "short")
    tool = Path(__file__).parents[2] / "tools" / "raters.py"
    subprocess.run(forked(sys.executable, tool, *files, *flags), check=True, timeout=RUN_SECONDS)
    result = launch(
        "reward", kind="ideal-point", preferences=folder / "votes", prototypes=2, out=folder / "model", blind="false",
        references=folder / "clips/clips.jsonl",
        **{"raters.hidden": 16, "raters.epochs": 60, "raters.learning_rate": 0.01, "feature_cache.folder": "null"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 prototypes (1: " in result.stderr + result.stdout
    assert "Held-out votes of each group of raters that a reward orders right" in result.stdout
    assert "by people: 4 raters, 0 comparisons without" in " ".join((result.stderr + result.stdout).split())
    return folder


def test_raters_are_told_apart(trained):
    info = read_json(trained / "model/reward.json")
    assert info["kind"] == "ideal-point" and len(info["prototypes"]["sizes"]) == 2
    raters = {one.rater: one for one in read_records(trained / "model/raters.jsonl", Rater)}
    assert set(raters) == {"complete-0", "short-1", "complete-2", "short-3"}
    preferred = {rater: max((0, 1), key=one.weights.__getitem__) for rater, one in raters.items()}
    # The votes' videos are copies with other names, which are judged against the references all the same.
    complete, short = (info["prototypes"]["descriptions"][preferred[one]] for one in ("complete-0", "short-1"))
    assert "length -" in short and ("seen +" in complete or "heard +" in complete), (complete, short)
    assert preferred["complete-0"] == preferred["complete-2"] != preferred["short-1"] == preferred["short-3"]
    assert all(one.num_votes == 60 > one.num_heldout > 0 for one in raters.values())


def test_agreement_of_groups_is_saved(trained):
    """Each group's held-out votes are ordered better by its own reward; older folders have no matrix."""
    info, raters = read_info(trained / "model"), read_records(trained / "model/raters.jsonl", Rater)
    for number, group in enumerate(group_raters(info.prototypes, raters)):
        own, other = (info.prototypes.agreement[row][number] for row in (number, 1 - number))
        assert own.num_votes == other.num_votes == group.num_heldout > 0
        assert other.accuracy < own.accuracy <= own.high and own.low < own.accuracy
    written = read_json(trained / "model/reward.json")
    for name in ("agreement", "means", "stds"):
        del written["prototypes"][name]
    older = replace(info.prototypes, agreement=(), means=(), stds=())
    assert parse_json(json.dumps(written), RewardInfo).prototypes == older


def test_whose_reward_is_loaded(trained):
    """As mrDPO loads it with and without --reward.prototype: the second prototype alone, and the mean rater."""
    info = read_info(trained / "model")
    sizes = info.prototypes.sizes
    for prototype, expected in ((None, sizes), (2, (0.0, 1.0))):
        model = RewardModel.load(trained / "model", prototype=prototype)
        assert model.head.weights.tolist() == pytest.approx(expected) and model.info == info


def test_reward_of_the_worst_served_group(trained, call, tmp_path):
    """The smallest of the prototypes' rewards, each standardized by its own mean and deviation."""
    captions = tmp_path / "captions.jsonl"
    write_records(captions, read_records(trained / "captions.jsonl", Caption)[:8])
    info, rewards = read_info(trained / "model"), {}
    for whose in ("1", "2", "worst"):
        flags = ("--root", trained / "clips", "--model", trained / "model", "--out", tmp_path / "ratings.jsonl")
        code, _, err = call("reward", captions, "--prototype", whose, *flags)
        assert code == 0, err
        rewards[whose] = [one.value for one in read_records(tmp_path / "ratings.jsonl", Rating)]
    scales = tuple(zip(info.prototypes.means, info.prototypes.stds, strict=True))
    expected = [
        min((info.mean + info.std * value - mean) / std for value, (mean, std) in zip(values, scales, strict=True))
        for values in zip(rewards["1"], rewards["2"], strict=True)
    ]
    assert rewards["worst"] == pytest.approx(expected, abs=1e-5)
    worst = RewardModel.load(trained / "model", prototype="worst").info
    assert worst.probability(1.0) == pytest.approx(info.probability(1.0)) and (worst.mean, worst.std) == (0, 1)


def test_best_captions_for_a_rater(trained, call, tmp_path):
    """A known one, and a new one by votes; the rater who wants it brief gets shorter captions."""
    votes = [vote for vote in FeedbackStore(trained / "votes").read() if vote.rater == "short-1"]
    write_records(trained / "votes/mine.jsonl", [replace(vote, rater="") for vote in votes])

    def words(*flags):
        out = ("--out", tmp_path / "ratings.jsonl", "--best", tmp_path / "best.jsonl")
        model = ("--root", trained / "clips", "--model", trained / "model")
        code, _, err = call("reward", trained / "captions.jsonl", *model, *flags, *out)
        assert code == 0, err
        return mean(len(one.text.split()) for one in read_records(tmp_path / "best.jsonl", Caption)), err

    complete, _ = words("--rater", "complete-0")
    short, _ = words("--rater", "short-1")
    new, err = words("--votes", trained / "votes/mine.jsonl")
    assert max(short, new) < 0.85 * complete
    assert "60 votes of" in err and "weights of the prototypes 1: " in err and "fitted together" not in err
    _, err = words("--votes", trained / "votes")
    assert "has votes of 4 raters; they are fitted together, as if one new rater had cast them all" in err
    assert "240 votes of" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rater", "bob"), "knows no rater 'bob'"),
        (("--prototype", "3"), "has 2 prototypes, counted from 1; got 3"),
        (("--rater", "bob", "--prototype", "1"), "give one of them"),
    ],
)
def test_unknown_raters_are_refused(trained, call, flags, message):
    code, _, err = call("reward", trained / "captions.jsonl", "--model", trained / "model", *flags)
    assert code == 2 and message in err and err.count("\n") <= 1
