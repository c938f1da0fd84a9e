"""Win rates by a voter, exploitability, and the game that rounds of the loss "nash" solve."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from salmonn.preference.losses import PAIR_LOSSES, LogRatios, LossConfig
from salmonn.preference.reward import RewardConfig
from salmonn.preference.voter_reward import VoterReward, find_exploitability, win_probability
from salmonn.records import Caption, Event, Reference
from salmonn.score.judge import ScoringTask
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import CaptionTraits, make_voter
from salmonn.train.mrdpo import MrDpoConfig
from salmonn.train.reference_logps import mix_logps

REFERENCE = Reference("a.mp4", (Event("a red circle appears"), Event("a high tone plays", "audio")), caption="truth")
TEXTS = ("A high tone plays.", "A high tone is heard.", "A high tone can be heard.", "A red circle appears.")


def tasks_of(texts=TEXTS):
    return [ScoringTask(REFERENCE, Caption("a.mp4", text, sample=number)) for number, text in enumerate(texts)]


def test_win_rates_by_hand(tmp_path):
    """Each form beats the next with 0.9 and is beaten by the one before it; all beat silence with 0.7."""
    reward = VoterReward(RuleJudge(), make_voter("cycle"))
    ratings = reward.rate(tasks_of())
    assert [one.value for one in ratings] == pytest.approx([(0.9 + 0.1 + 0.7) / 3] * 3 + [0.3])
    reward.save(tmp_path / reward.file_name, ratings)
    assert reward.load(tmp_path / reward.file_name) == ratings
    judge = SimpleNamespace(check=lambda _: None)  # that reads any events
    with pytest.raises(ValueError, match=r"voter is for synthetic clips only: .*'a man sings'"):
        VoterReward(judge, make_voter("cycle")).check(replace(REFERENCE, events=(Event("a man sings"),)))
    (alone,) = reward.rate(tasks_of(TEXTS[:1]))
    assert alone.value == 0.5


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
