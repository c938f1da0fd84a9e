"""Win rates by a voter, exploitability, and the game that rounds of the loss "nash" solve."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from salmonn.preference.losses import PAIR_LOSSES, LogRatios, LossConfig
from salmonn.preference.reward import JudgeReward, RewardConfig, make_judge, make_reward
from salmonn.preference.voter_reward import SimulatedVoterReward, find_exploitability, win_probability
from salmonn.records import Caption, Event, Reference, Score, Unscored
from salmonn.score.chat_client import LLMStoppedError
from salmonn.score.config import JudgeConfig
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import CaptionTraits, make_voter
from salmonn.train.mrdpo import MrDpoConfig
from salmonn.train.reference_logps import mix_logps
from tests.score.fake_llm_server import Answer

REFERENCE = Reference("a.mp4", (Event("a red circle appears"), Event("a high tone plays", "audio")), caption="truth")
TEXTS = ("A high tone plays.", "A high tone is heard.", "A high tone can be heard.", "A red circle appears.")


def tasks_of(texts=TEXTS):
    return [ScoringTask(REFERENCE, Caption("a.mp4", text, sample=number)) for number, text in enumerate(texts)]


def test_win_rates_by_hand(tmp_path):
    """Each form beats the next with 0.9 and is beaten by the one before it; all beat silence with 0.7."""
    reward = SimulatedVoterReward(RuleJudge(), make_voter("cycle"))
    ratings = reward.rate(tasks_of())
    assert [one.value for one in ratings] == pytest.approx([(0.9 + 0.1 + 0.7) / 3] * 3 + [0.3])
    reward.save(tmp_path / reward.file_name, ratings)
    assert reward.load(tmp_path / reward.file_name) == ratings
    judge = SimpleNamespace(check=lambda _: None)  # that reads any events
    with pytest.raises(
        ValueError, match=r"voters are for synthetic clips only; use --reward\.voter judge .*'a man sings'"
    ):
        SimulatedVoterReward(judge, make_voter("cycle")).check(replace(REFERENCE, events=(Event("a man sings"),)))
    (alone,) = reward.rate(tasks_of(TEXTS[:1]))
    assert alone.value == 0.5


REAL = Reference("a.mp4", (Event("a man sings"),), caption="A man sings.")


class FixedJudge:
    """Judges any events, with the given results."""

    name, prompt_hash, is_deterministic = "fixed", "0", True

    def __init__(self, results) -> None:
        self.results, self.num_judged = results, 0

    def check(self, reference):
        pass

    def judge(self, tasks, *, seed=0, progress=None):
        self.num_judged += len(tasks)
        return self.results[: len(tasks)]


def test_the_judge_as_a_voter_by_hand(tmp_path):
    """Ratings -0.5, -0.5 and -1 of a real video's captions: two draws and two wins; a fourth could not be judged.

    The scores of a run with reward.kind judge are rated without judging again.
    """
    results = [Score("a.mp4", 4, 2, 0, 0), Score("a.mp4", 4, 0, 1, 1, sample=1), Score("a.mp4", 4, 4, 0, 0, sample=2)]
    results.append(Unscored("a.mp4", "no reply", sample=3))
    judge = FixedJudge(results)
    reward = make_reward(RewardConfig("voter", voter="judge"), judge=judge)
    reward.check(REAL)
    tasks = [ScoringTask(REAL, Caption("a.mp4", "text", sample=number)) for number in range(4)]
    ratings = reward.rate(tasks)
    assert [one.value for one in ratings[:3]] == [0.75, 0.75, 0.0] and ratings[3] == results[3]
    assert [one.score for one in ratings[:3]] == results[:3] and judge.num_judged == 4
    assert reward.name == "fixed" and reward.file_name == "scores.jsonl"
    reward.save(tmp_path / "scores.jsonl", ratings)
    by_total = JudgeReward(judge, repetition_weight=1.0)
    assert [one.value for one in by_total.load(tmp_path / "scores.jsonl")] == [-0.5, -0.5, -1.0]
    by_total.save(tmp_path / "other.jsonl", by_total.rate(tasks))
    judge.num_judged = 0
    assert reward.load(tmp_path / "scores.jsonl") == reward.load(tmp_path / "other.jsonl") == ratings[:3]
    assert judge.num_judged == 0


def test_the_judge_as_a_voter_uses_the_weights_of_its_rating():
    """Equal Totals: the caption that repeats half of its words loses, unless repetition has no weight."""
    judge = FixedJudge([Score("a.mp4", 4, 2, 0, 0), Score("a.mp4", 4, 2, 0, 0, num_words=8, num_repeated_words=4)])

    def rate(weight):
        config = RewardConfig("voter", voter="judge", repetition_weight=weight)
        return [one.value for one in make_reward(config, judge=judge).rate(tasks_of(TEXTS[:2]))]

    assert rate(1.0) == [1.0, 0.0] and rate(0.0) == [0.5, 0.5]
    RewardConfig("voter", voter="judge", dialogue_weight=1.0)
    with pytest.raises(ValueError, match=r"no effect with reward\.kind voter and reward\.voter llm"):
        RewardConfig("voter", voter="llm", dialogue_weight=1.0)


@pytest.fixture
def ask(serve, tmp_path):
    """Make a voter whose language model replies by a function of both captions; return it and the requests."""

    def ask(verdict, **options):
        def script(request, _):
            data = json.loads(request["messages"][1]["content"])
            return Answer(json.dumps({"better": verdict(data["description_1"], data["description_2"])}))

        server = serve(script)
        config = JudgeConfig(
            kind="openai", model="m", base_url=server.url, cache=tmp_path / "replies.sqlite", **options
        )
        return make_reward(RewardConfig("voter", voter="llm"), judge=make_judge(config)), server.requests

    return ask


def real_tasks(*texts):
    return [ScoringTask(REAL, Caption("a.mp4", text, sample=number)) for number, text in enumerate(texts)]


def test_a_language_model_compares_each_pair_in_both_orders(ask):
    """rock beats paper beats scissors beats rock, and "first" ties with all unless it is shown first: 0.75 of them."""
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}

    def verdict(first, second):
        if "first" in (first, second):
            return "1" if first == "first" else "tie"
        return "1" if (first, second) in beats else "2"

    reward, requests = ask(verdict)
    tasks = real_tasks("rock", "scissors", "first", "paper", "rock")
    ratings = reward.rate(tasks)
    wins = {
        "rock": (1.0 + 0.25 + 0.0 + 0.5) / 4,
        "scissors": (0.0 + 0.25 + 1.0 + 0.0) / 4,
        "first": 0.75,
        "paper": (1.0 + 0.0 + 0.25 + 1.0) / 4,
    }
    assert [one.value for one in ratings] == [wins[task.caption.text] for task in tasks]
    assert len(requests) == 4 * 3  # of the four different texts
    data = json.loads(requests[0]["messages"][1]["content"])
    assert data["events"] == [{"number": 1, "event": "a man sings", "kind": "visual"}]
    assert data["reference"] == "A man sings."
    assert reward.rate(tasks) == ratings and len(requests) == 12  # replies are kept
    (against,) = reward.rate_against(real_tasks("first"), real_tasks("paper", "new", "first"))
    assert against.value == (0.75 + 0.75 + 0.5) / 3 and len(requests) == 14  # "new" in both orders


def test_a_killed_round_asks_only_about_what_has_no_reply(ask):
    reward, requests = ask(lambda first, _: "1" if first == "a" else "2", max_requests=4, concurrency=1)
    with pytest.raises(LLMStoppedError, match="4 requests is reached"):
        reward.rate(real_tasks("a", "b", "c"))
    assert len(requests) == 4
    resumed, further = ask(lambda first, _: "1" if first == "a" else "2")
    assert [one.value for one in resumed.rate(real_tasks("a", "b", "c"))] == [1.0, 0.25, 0.25] and len(further) == 2


def test_a_pair_without_a_usable_reply_is_left_out(ask):
    """Nothing is known of "odd"; the others are rated by their comparison with each other."""
    reward, requests = ask(lambda first, second: "?" if "odd" in (first, second) else "tie", attempts=2)
    good, odd, other = reward.rate(real_tasks("good", "odd", "other"))
    assert (good.value, other.value) == (0.5, 0.5)
    assert isinstance(odd, Unscored) and (odd.video, odd.sample) == ("a.mp4", 1)
    assert odd.reason.startswith("no usable reply in 2 attempts") and len(requests) == 2 * 4 + 2


def test_what_a_language_model_needs_to_vote(ask):
    reward, _ = ask(lambda *_: "1")
    reward.check(replace(REAL, events=()))
    reward.check(replace(REAL, caption=""))
    with pytest.raises(ValueError, match=r"a\.mp4 has neither events nor a caption"):
        reward.check(replace(REAL, events=(), caption=" "))
    with pytest.raises(ValueError, match=r"use --judge\.kind openai, or --reward\.voter judge"):
        make_reward(RewardConfig("voter", voter="llm"), judge=RuleJudge())


def test_win_rates_against_another_policy_by_hand():
    """Against opponents that all say "is heard": "plays" wins with 0.9, "is heard" draws, silence wins with 0.3.

    A caption without opponents has no win rate.
    """
    reward = SimulatedVoterReward(RuleJudge(), make_voter("cycle"))
    opponents = tasks_of([TEXTS[1], TEXTS[1]])
    ratings = reward.rate_against(tasks_of(), opponents)
    assert [one.value for one in ratings] == pytest.approx([0.9, 0.5, 0.1, 0.3])
    other = replace(REFERENCE, video="b.mp4")
    (alone,) = reward.rate_against([ScoringTask(other, Caption("b.mp4", TEXTS[0], sample=3))], opponents)
    assert alone == Unscored("b.mp4", "there is no scored caption of its clip to compare it with", sample=3)


def test_the_order_of_showing_does_not_count():
    one, other = CaptionTraits(0, 0, 0, 0, 0.5, total=0.4), CaptionTraits(0, 0, 0, 0, 0.5, total=0.4)
    hasty = make_voter("hasty")
    assert hasty.prefers(one, other) > 0.59 and win_probability(hasty, one, other) == pytest.approx(0.5)


def test_exploitability_by_hand():
    """All captions say "is heard": "plays" wins with 0.9. An equal mixture of the three wins as often as it loses."""
    judge, voter = RuleJudge(), make_voter("cycle")

    def find(texts):
        tasks = tasks_of(texts)
        return find_exploitability(voter, [task.caption for task in tasks], judge.judge(tasks), {"a.mp4": REFERENCE})

    pure, mixed = find(TEXTS[1:2]), find(TEXTS)
    assert (pure.exploitability, pure.best_reply) == (pytest.approx(0.4), "plays")
    assert pure.forms == {"plays": 0.0, "is heard": 1.0, "can be heard": 0.0, "": 0.0}
    assert mixed.exploitability == pytest.approx((0.9 + 0.1 + 0.5) / 3 - 0.5, abs=1e-9)
    assert find(TEXTS[3:]) is None


def solve_round(log_policy, log_start, wins, *, beta, eta):
    """The policy at which the loss "nash" is 0 for all pairs, with the mixed reference policy."""
    loss, reward = LossConfig("nash", beta=beta, ce_weight=0.0), RewardConfig("voter")
    config = MrDpoConfig(loss=loss, reward=reward, reference_policy="mixed", eta=eta)
    start, own = ([{"chosen": float(one)} for one in logps] for logps in (log_start, log_policy))
    reference = np.array([one["chosen"] for one in mix_logps(start, own, eta=eta)])
    solution = reference + wins / config.round_loss.beta
    index, other = np.triu_indices(len(wins), 1)
    ratio = torch.from_numpy(solution - reference)
    margins = torch.from_numpy(wins[index] - wins[other])
    loss = PAIR_LOSSES["nash"](LogRatios(ratio[index], ratio[other], None, None, margins=margins), config.round_loss)
    assert loss.max() < 1e-20
    return solution - np.log(np.exp(solution).sum())


def test_rounds_reach_the_equilibrium_of_a_cyclic_game():
    """5 x 5 with a cycle: the iterates converge to pi = start * exp(win rate against pi / beta), as its fixed point."""
    rng = np.random.default_rng(0)
    upper = np.triu(rng.uniform(0.05, 0.95, (5, 5)), 1)
    upper[0, 1], upper[1, 2], upper[0, 2] = 0.9, 0.9, 0.1  # 0 beats 1 beats 2 beats 0
    preference = upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(5)
    log_start = np.log(rng.dirichlet(np.ones(5)))
    beta, eta = 0.5, 0.5
    policies = [log_start]
    for _ in range(200):
        wins = preference @ np.exp(policies[-1])
        policies.append(solve_round(policies[-1], log_start, wins, beta=beta, eta=eta))
    equilibrium = policies[-1]
    target = log_start + preference @ np.exp(equilibrium) / beta
    assert abs(equilibrium - (target - np.log(np.exp(target).sum()))).max() < 1e-12
    distances = [float((np.exp(equilibrium) * (equilibrium - one)).sum()) for one in policies[:12]]
    ratios = [after / before for before, after in pairwise(distances)]
    assert max(ratios) <= 1 / (1 + eta)  # at least linear convergence of the KL divergence
    # With the renewed reference policy alone, the rounds leave the equilibrium behind.
    renewed = log_start
    for _ in range(40):
        renewed = renewed + preference @ np.exp(renewed) / beta
        renewed -= np.log(np.exp(renewed).sum())
    assert float((np.exp(equilibrium) * (equilibrium - renewed)).sum()) > distances[0]
