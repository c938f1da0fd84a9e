"""Rewards: the judge's rating by hand, and its file."""

import pytest

from salmonn.preference.rating import Rating, Reward
from salmonn.preference.reward import RewardConfig, make_reward
from salmonn.records import Caption, Event, Reference, Score, Unscored
from salmonn.score.judge import ScoringTask
from salmonn.speech import Dialogue
from salmonn.synthetic.judge import RuleJudge


class FixedJudge:
    """Returns the given results."""

    name, prompt_hash, is_exact = "fixed", "0", True

    def __init__(self, results) -> None:
        self.results = results

    def check(self, reference):
        raise ValueError(f"checked {reference.video}")

    def judge(self, tasks, *, seed=0, progress=None):
        return self.results


class WordsReward(Reward):
    """All that a reward has to define."""

    name = "words"

    def rate(self, tasks):
        return [
            Rating("v", {"words": float(len(task.caption.text.split()))}, {"words": -1.0}, task.caption.sample)
            if task.caption.text
            else Unscored("v", "empty")
            for task in tasks
        ]


def test_ratings_are_saved_by_default(tmp_path):
    reward, reference = WordsReward(), Reference("v")
    reward.check(reference)
    rated = reward.rate([ScoringTask(reference, Caption("v", text, sample=n)) for n, text in enumerate(("", "a b"))])
    reward.save(tmp_path / reward.file_name, rated)
    (loaded,) = reward.load(tmp_path / "ratings.jsonl")
    assert loaded == rated[1] and (loaded.value, loaded.sample) == (-2.0, 1)


def test_judge_reward_by_hand(tmp_path):
    # Total 3 / 10, repetition 2 / 8: -(0.3 + 4 * 0.25) = -1.3.
    score = Score("v", 10, 1, 1, 1, num_words=8, num_repeated_words=2, sample=3)
    missing = Unscored("v", "no reply", sample=4)
    reward = make_reward(RewardConfig(repetition_weight=4.0), judge=FixedJudge([score, missing]))
    rating, unscored = reward.rate([])
    assert rating.value == pytest.approx(-1.3) and rating.main == pytest.approx(-0.3) and unscored is missing
    assert (rating.video, rating.sample, rating.score) == ("v", 3, score)
    reward.save(tmp_path / reward.file_name, [rating, unscored])
    assert reward.file_name == "scores.jsonl" and reward.load(tmp_path / "scores.jsonl") == [rating]
    with pytest.raises(ValueError, match="checked v"):
        reward.check(Reference("v"))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        RewardConfig(repetition_weight=-1.0)


def test_rule_judge_prefers_the_complete_caption():
    reference = Reference("v", (Event("a red circle moves to the left"),))
    tasks = [ScoringTask(reference, Caption("v", text)) for text in ("A red circle moves to the left.", "")]
    better, worse = make_reward(RewardConfig(), judge=RuleJudge()).rate(tasks)
    assert (better.value, worse.value) == (0.0, -1.0)


def test_dialogue_weight_by_hand(tmp_path):
    """Total 0.5; of 4 spoken words one is wrong: -0.5 + 2 * 0.75. Without speech on either side, accuracy is 1."""
    quoting = Score("v", 2, 1, 0, 0, sample=0, dialogue=Dialogue(4, 4, 3, 1))
    silent = Score("v", 2, 1, 0, 0, sample=1)
    judge = FixedJudge([quoting, silent])
    reward = make_reward(RewardConfig(dialogue_weight=2.0), judge=judge)
    ratings = reward.rate([])
    assert [one.value for one in ratings] == [pytest.approx(1.0), pytest.approx(1.5)]
    assert [one.main for one in ratings] == [-0.5, -0.5]
    reward.save(tmp_path / "scores.jsonl", ratings)
    assert reward.load(tmp_path / "scores.jsonl") == ratings
    plain = make_reward(RewardConfig(), judge=judge).rate([])
    assert all(one.parts.keys() == {"total", "repetition"} and one.value == -0.5 for one in plain)
    with pytest.raises(ValueError, match="dialogue_weight must be at least 0, got"):
        RewardConfig(dialogue_weight=-1.0)
    with pytest.raises(ValueError, match=r"dialogue_weight 1\.0 has no effect with reward\.kind model"):
        RewardConfig(kind="model", dialogue_weight=1.0)
