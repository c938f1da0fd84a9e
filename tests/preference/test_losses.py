"""Losses, with every expected value derived by hand."""

import math
from typing import get_args

import pytest
import torch

from salmonn.preference.losses import (
    PAIR_LOSSES,
    Advantages,
    Clauses,
    LogRatios,
    LossConfig,
    LossName,
    RoleLogps,
    TokenLogps,
    grpo_loss,
    guided_loss,
    make_loss,
)


def by_role(chosen, rejected, ground_truth, *, reference=(-12.0, -17.0)):
    """Log-probabilities of a batch by role; all roles have 4 tokens, which only the ground truth uses."""
    count = torch.full((len(chosen),), 4)
    return {
        "chosen": RoleLogps(chosen, count, torch.full((len(chosen),), reference[0])),
        "rejected": RoleLogps(rejected, count, torch.full((len(chosen),), reference[1])),
        "ground_truth": RoleLogps(ground_truth, count),
    }


def loss(chosen, rejected, *, reference=(-12.0, -17.0), ground_truth=-8.0, **options):
    """One pair's loss from plain numbers; a ground truth of -8 nats has a cross-entropy of 8 / 4 = 2."""
    values = (torch.tensor([value]) for value in (chosen, rejected, ground_truth))
    return guided_loss(by_role(*values, reference=reference), LossConfig(**options))


def test_by_hand():
    # chosen: 0.1 * (-10 + 12) = 0.2; rejected: 0.1 * (-20 + 17) = -0.3; margin 0.5
    # -log sigmoid(0.5) = log(1 + e^-0.5) = log 1.6065307 = 0.4740770; + 0.1 * 2 = 0.6740770
    result = loss(-10.0, -20.0)
    parts = {name: part.item() for name, part in result.parts.items()}
    assert parts == pytest.approx(
        {"chosen": 0.2, "rejected": -0.3, "margin": 0.5, "accuracy": 1.0, "dpo": 0.4740770, "ce": 2.0}
        | {"chosen_drift": 2.0, "rejected_drift": -3.0}
    )
    assert result.loss.item() == pytest.approx(0.6740770)


def test_a_wrong_preference_by_hand():
    # beta 0.5: chosen 0.5 * -2 = -1, rejected 0.5 * 2 = 1, margin -2: log(1 + e^2) = log 8.3890561 = 2.1269280
    assert loss(-14.0, -15.0, beta=0.5, ce_weight=0.0).loss.item() == pytest.approx(2.1269280)


def test_no_margin_is_log_two():
    assert loss(-12.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(math.log(2))
    # Both moved by the same amount from the reference: still no preference.
    assert loss(-2.0, -7.0, ce_weight=0.0).loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("ce_weight", "expected"), [(0.0, 0.4740770), (1.0, 2.4740770), (0.25, 0.9740770)])
def test_weight_of_the_cross_entropy(ce_weight, expected):
    result = loss(-10.0, -20.0, ce_weight=ce_weight)
    assert result.loss.item() == pytest.approx(expected) and result.parts["dpo"].item() == pytest.approx(0.4740770)


def test_gradients():
    # d/dm -log sigmoid(m) = -sigmoid(-m) = -1 / (1 + e^0.5) = -0.3775407; times beta 0.1 for the log-probabilities.
    leaves = [torch.tensor([value], requires_grad=True) for value in (-10.0, -20.0, -8.0)]
    guided_loss(by_role(*leaves), LossConfig()).loss.sum().backward()
    assert leaves[0].grad.item() == pytest.approx(-0.03775407)  # a step down the gradient raises the chosen one
    assert leaves[1].grad.item() == pytest.approx(0.03775407)
    assert leaves[2].grad.item() == pytest.approx(-0.1 / 4)  # ce_weight over the number of tokens


def test_figures_carry_no_gradient():
    leaf = torch.tensor([-10.0], requires_grad=True)
    result = guided_loss(by_role(leaf, leaf * 2, leaf), LossConfig())
    assert result.loss.requires_grad
    assert len(result.parts) == 8 and not any(part.requires_grad for part in result.parts.values())


def test_far_margins_stay_finite():
    # -log sigmoid(-500) is 500 in exact arithmetic, where exp(500) overflows; -log sigmoid(500) is 0.
    assert loss(-5012.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(500.0)
    assert loss(4988.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(0.0)


def test_pairs_of_a_batch_do_not_mix():
    result = guided_loss(
        by_role(torch.tensor([-10.0, -14.0]), torch.tensor([-20.0, -15.0]), torch.tensor([-8.0, 0.0])), LossConfig()
    )
    # second: margin 0.1 * (-2 - 2) = -0.4: log(1 + e^0.4) = log 2.4918247 = 0.9130153
    assert result.loss.tolist() == pytest.approx([0.6740770, 0.9130153])


def test_a_configured_loss_names_its_roles():
    configured = make_loss(LossConfig(beta=0.5, ce_weight=0.0))
    assert configured.roles == configured.reference_roles == ("chosen", "rejected")
    assert make_loss(LossConfig()).roles == ("chosen", "rejected", "ground_truth")
    values = (torch.tensor([value]) for value in (-14.0, -15.0, -8.0))
    assert configured.compute(by_role(*values)).loss.item() == pytest.approx(2.1269280)  # as by hand above


# Two captions of 5 and 4 tokens with log-ratios of 2 and -1, at beta 0.1: rewards 0.2 and -0.1, margin 0.3.
# Sigmoids: s(0.3) = 0.5744425, s(0.2) = 0.5498340, s(-0.1) = 0.4750208.
# Logarithms: log s(0.3) = -0.5543552, log s(-0.3) = -0.8543552, log s(0.2) = -0.5981389, log s(-0.2) = -0.7981389,
# log s(0.1) = -0.6443967.
BY_HAND = {  # name: loss, derivative by the chosen and by the rejected log-ratio, options
    # d/dc = -beta s(-0.3)
    "sigmoid": (0.5543552, -0.0425557, 0.0425557, {}),
    # 2/5 - -1/4 = 0.65; (0.65 - 5)^2; d/dc = 2 (0.65 - 5) / 5, d/dr = -2 (0.65 - 5) / 4
    "ipo": (18.9225, -1.74, 2.175, {}),
    # (0.9 * 0.5543552 - 0.1 * 0.8543552) / 0.8; d/dc = beta (-0.9 s(-0.3) - 0.1 s(0.3)) / 0.8
    "robust": (0.5168552, -0.0550557, 0.0550557, {"label_smoothing": 0.1}),
    # 0.5981389 + 0.5 * 0.7981389 + 0.5 * 0.6443967; d/dc = beta (-s(-0.2) + 0.5 s(0.2)), d/dr = 0.5 beta s(-0.1)
    "nca_pair": (1.3194067, -0.0175249, 0.0237510, {}),
    # 0.5981389 + 0.6443967; d/dc = -beta s(-0.2), d/dr = beta s(-0.1)
    "bco_pair": (1.2425356, -0.0450166, 0.0475021, {}),
    # (2 - 5)^2 + (-1 + 5)^2
    "sppo_hard": (25.0, -6.0, 8.0, {}),
    # 1 - s(0.2) + s(-0.1); d/dc = -beta s(0.2) s(-0.2), d/dr = beta s(-0.1) s(0.1)
    "apo_zero": (0.9251868, -0.0247517, 0.0249376, {}),
    # The KL estimate is 0.5: 2 - s(0.15) - s(0.15), with s(0.15) = 0.5374298; d/dc = -beta s(0.15) s(-0.15) = -d/dr
    "kto": (0.9251403, -0.0248599, 0.0248599, {}),
    # (3 - 0.4 / 0.1)^2
    "nash": (1.0, -2.0, 2.0, {}),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_each_loss_by_hand(name):
    expected, chosen_slope, rejected_slope, options = BY_HAND[name]
    chosen, rejected = (torch.tensor([value], requires_grad=True, dtype=torch.float64) for value in (2.0, -1.0))
    mismatched = torch.tensor([0.7, 0.3], dtype=torch.float64, requires_grad=True)  # of two clips: mean 0.5
    ratios = LogRatios(chosen, rejected, torch.tensor([5]), torch.tensor([4]), mismatched, torch.tensor([0.4]))
    value = PAIR_LOSSES[name](ratios, LossConfig(name, **options))
    value.sum().backward()
    assert value.item() == pytest.approx(expected, abs=1e-7)
    assert chosen.grad.item() == pytest.approx(chosen_slope, abs=1e-7)
    assert rejected.grad.item() == pytest.approx(rejected_slope, abs=1e-7)
    assert mismatched.grad is None


def test_every_named_loss_is_registered():
    assert set(get_args(LossName)) == {*PAIR_LOSSES, "grpo"}


def test_label_smoothing_of_dpo_by_hand():
    # Margin 0.5: 0.9 * log(1 + e^-0.5) + 0.1 * log(1 + e^0.5) = 0.9 * 0.4740770 + 0.1 * 0.9740770
    assert loss(-10.0, -20.0, ce_weight=0.0, label_smoothing=0.1).loss.item() == pytest.approx(0.5240770)


def test_robust_loss_is_unbiased_under_flips():
    """Its mean over labels of which a tenth is flipped is DPO's loss on the true labels."""

    def robust(margin):
        ratios = LogRatios(torch.tensor([margin / 0.1]), torch.zeros(1), torch.ones(1), torch.ones(1))
        return PAIR_LOSSES["robust"](ratios, LossConfig("robust", label_smoothing=0.1)).item()

    assert 0.9 * robust(0.7) + 0.1 * robust(-0.7) == pytest.approx(math.log1p(math.exp(-0.7)))


def test_a_negative_kl_estimate_counts_as_zero():
    ratios = LogRatios(torch.tensor([2.0]), torch.tensor([-1.0]), torch.ones(1), torch.ones(1), torch.tensor([-3.0]))
    # 2 - s(0.2) - s(0.1) = 2 - 0.5498340 - 0.5249792
    assert PAIR_LOSSES["kto"](ratios, LossConfig("kto")).item() == pytest.approx(0.9251868)


def samples_of(policy, reference, advantages, sizes):
    """Samples of clips from the log-probabilities of their tokens, NaN in the padding."""
    mask = ~policy.isnan()
    tokens = TokenLogps(policy.nan_to_num(), reference.nan_to_num(), mask)
    advantages = Advantages(torch.tensor(advantages, dtype=policy.dtype), sizes)
    return RoleLogps(tokens.policy.sum(-1), mask.sum(-1), tokens.reference.sum(-1), tokens, advantages)


# Log-ratios 0.1 and 0.3 of a sample with advantage 1, -0.2 of one with advantage -1; ratios 1.1051709, 1.3498588 and
# 0.8187308. k3 at each token: 0.0048374, 0.0408182, 0.0214028, with the slopes 0.0951626, 0.2591818, -0.2214028.
GRPO_BY_HAND = {
    # Surrogate (1.1051709 + 1.28 - 0.8187308) / 3, KL 0.0670584 / 3. The second token is clipped: only KL is left.
    "token": (-0.5199114, [[-0.3652182, 0.0086394], [0.2655302, 0.0]], 1 / 3),
    # Ratios e^0.2 = 1.2214028 and 0.8187308; KL (0.0456556 / 2 + 0.0214028) / 2.
    "sequence": (-0.1991245, [[-0.3029716, -0.2988712], [0.3982953, 0.0]], 0.0),
}


@pytest.mark.parametrize("importance", GRPO_BY_HAND)
def test_grpo_by_hand(importance):
    expected, slopes, clipped = GRPO_BY_HAND[importance]
    nan = math.nan
    policy = torch.tensor([[-1.9, -0.7], [-3.2, nan]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-2.0, -1.0], [-3.0, nan]], dtype=torch.float64)
    output = grpo_loss(
        samples_of(policy, reference, [1.0, -1.0], [2]), LossConfig("grpo", importance=importance, ce_weight=0.0)
    )
    output.loss.sum().backward()
    assert output.loss.tolist() == pytest.approx([expected], abs=1e-7)
    assert policy.grad.tolist() == [pytest.approx(row, abs=1e-7) for row in slopes]
    assert output.parts["clipped"].tolist() == pytest.approx([clipped])


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_grpo_equals_the_formulas_of_trl(importance):
    """trl/trainer/grpo_trainer.py, `_compute_loss`, on two groups of random samples with all kinds of clipping."""
    torch.manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6]).unsqueeze(-1)
    reference = torch.randn(5, 7, dtype=torch.float64)
    policy = reference + 0.4 * torch.randn(5, 7, dtype=torch.float64)
    values, sizes = [1.2, -0.4, -0.8, 0.7, -0.7], [3, 2]
    log_ratio = policy - reference
    if importance == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1, advantages = torch.exp(log_ratio), torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token_kl = torch.exp(reference - policy) - (reference - policy) - 1
    per_token_loss = per_token_loss + 0.04 * per_token_kl
    for_each = slice(0, 3), slice(3, 5)
    if importance == "token":  # loss_type "dapo", where a group is the batch
        expected = [((per_token_loss * mask)[one].sum() / mask[one].sum()).item() for one in for_each]
    else:  # loss_type "grpo"
        of_sample = (per_token_loss * mask).sum(-1) / mask.sum(-1)
        expected = [of_sample[one].mean().item() for one in for_each]
    policy, reference = (logps.masked_fill(~mask, math.nan) for logps in (policy, reference))
    samples = samples_of(policy, reference, values, sizes)
    config = LossConfig("grpo", beta=0.04, importance=importance)
    assert grpo_loss(samples, config).loss.tolist() == pytest.approx(expected, abs=1e-12)
    truth = RoleLogps(torch.tensor([-8.0, -2.0]), torch.tensor([4, 4]))  # cross-entropies 2 and 0.5
    guided = make_loss(config)
    assert guided.roles == ("sample", "ground_truth") and guided.per_token
    loss = guided.compute({"sample": samples, "ground_truth": truth}).loss
    assert loss.tolist() == pytest.approx([expected[0] + 0.2, expected[1] + 0.05])


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_an_empty_sample_adds_nothing(importance):
    policy = torch.tensor([[-1.0, -2.0], [math.nan, math.nan]])
    samples = samples_of(policy, policy - 0.1, [1.0, -1.0], [2])
    (value,) = grpo_loss(samples, LossConfig("grpo", beta=0.0, importance=importance)).loss.tolist()
    assert value == pytest.approx(-math.exp(0.1) / (1 if importance == "token" else 2), abs=1e-6)


def test_clauses_by_hand():
    """beta 0.5; chosen: a right clause of log-ratios 0.4 and 0.2, a wrong one of 0.8; rejected: a wrong one of -1."""
    policy = torch.tensor([[-1.6, -1.8, -1.2, -2.0]], dtype=torch.float64, requires_grad=True)
    rejected_policy = torch.tensor([[-3.0, -5.0]], dtype=torch.float64, requires_grad=True)
    reference, rejected_reference = torch.full((1, 4), -2.0), torch.tensor([[-2.0, -4.0]])
    right_and_wrong = torch.tensor([[[True, True, False, False], [False, False, True, False]]])
    logps = {
        "chosen": RoleLogps(
            policy.sum(-1),
            torch.tensor([4]),
            reference.sum(-1),
            TokenLogps(policy, reference, torch.ones(1, 4, dtype=torch.bool)),
            clauses=Clauses(right_and_wrong, torch.tensor([[1, -1]])),
        ),
        "rejected": RoleLogps(
            rejected_policy.sum(-1),
            torch.tensor([2]),
            rejected_reference.sum(-1),
            TokenLogps(rejected_policy, rejected_reference, torch.ones(1, 2, dtype=torch.bool)),
            clauses=Clauses(torch.tensor([[[False, True]]]), torch.tensor([[-1]])),
        ),
    }
    result = guided_loss(logps, LossConfig(beta=0.5, ce_weight=0.0, per="clause"))
    # Clauses: -log s(0.3) = 0.5543552, -log s(-0.4) = 0.9130152, -log s(0.5) = 0.4740770; mean 0.6471492.
    # Pair: chosen 0.5 * 1.4 = 0.7, rejected 0.5 * -2 = -1: -log s(1.7) = 0.1677859.
    assert result.parts["clause"].item() == pytest.approx(0.6471492, abs=1e-6)
    assert result.parts["dpo"].item() == pytest.approx(0.1677859, abs=1e-6)
    assert (result.parts["clauses"].item(), result.parts["clauses_moved"].item()) == (3, 2)
    assert result.loss.item() == pytest.approx(0.6471492 + 0.1677859, abs=1e-6)
    result.loss.sum().backward()
    # Of the pair: -0.5 s(-1.7) = -0.0772324 for each chosen token. Of the clauses, a third: -0.5 s(-0.3) = -0.2127787,
    # 0.5 s(0.4) = 0.2993438, and for the rejected one 0.5 s(-0.5) = 0.1887703.
    assert policy.grad[0].tolist() == pytest.approx(
        [-0.0772324 - 0.0709262, -0.0772324 - 0.0709262, -0.0772324 + 0.0997813, -0.0772324], abs=1e-6
    )
    assert rejected_policy.grad[0].tolist() == pytest.approx([0.0772324, 0.0772324 + 0.0629234], abs=1e-6)


def test_titles():
    titles = [LossConfig(kind).title for kind in ("sigmoid", "bco_pair", "nash", "grpo")]
    assert titles == ["guided DPO", "guided BCO", "guided Nash learning", "GRPO"]
    assert LossConfig(ce_weight=0.0).title == "DPO"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ipo", "per": "clause"}, "loss.kind ipo has no loss of clauses"),
        ({"clip_low": 1.0}, "loss.clip_low must be between 0 and 1"),
        ({"kind": "orpo"}, "loss.kind must be one of sigmoid, ipo"),
        ({"label_smoothing": 0.5}, "below 0.5, got 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "loss.kind ipo has no label_smoothing"),
        ({"kind": "robust"}, "loss.kind robust needs loss.label_smoothing"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)
