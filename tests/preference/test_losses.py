"""Losses, with every expected value derived by hand."""

import math

import pytest
import torch

from salmonn.preference.losses import LossConfig, RoleLogps, guided_dpo_loss, make_loss


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
    return guided_dpo_loss(by_role(*values, reference=reference), **options)


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
    guided_dpo_loss(by_role(*leaves)).loss.sum().backward()
    assert leaves[0].grad.item() == pytest.approx(-0.03775407)  # a step down the gradient raises the chosen one
    assert leaves[1].grad.item() == pytest.approx(0.03775407)
    assert leaves[2].grad.item() == pytest.approx(-0.1 / 4)  # ce_weight over the number of tokens


def test_figures_carry_no_gradient():
    leaf = torch.tensor([-10.0], requires_grad=True)
    result = guided_dpo_loss(by_role(leaf, leaf * 2, leaf))
    assert result.loss.requires_grad
    assert len(result.parts) == 8 and not any(part.requires_grad for part in result.parts.values())


def test_far_margins_stay_finite():
    # -log sigmoid(-500) is 500 in exact arithmetic, where exp(500) overflows; -log sigmoid(500) is 0.
    assert loss(-5012.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(500.0)
    assert loss(4988.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(0.0)


def test_pairs_of_a_batch_do_not_mix():
    result = guided_dpo_loss(
        by_role(torch.tensor([-10.0, -14.0]), torch.tensor([-20.0, -15.0]), torch.tensor([-8.0, 0.0]))
    )
    # second: margin 0.1 * (-2 - 2) = -0.4: log(1 + e^0.4) = log 2.4918247 = 0.9130153
    assert result.loss.tolist() == pytest.approx([0.6740770, 0.9130153])


def test_a_configured_loss_names_its_roles():
    configured = make_loss(LossConfig(beta=0.5, ce_weight=0.0))
    assert configured.roles == ("chosen", "rejected", "ground_truth")
    assert configured.reference_roles == ("chosen", "rejected")
    values = (torch.tensor([value]) for value in (-14.0, -15.0, -8.0))
    assert configured.compute(by_role(*values)).loss.item() == pytest.approx(2.1269280)  # as by hand above
