"""Losses, with every expected value derived by hand."""

import math

import pytest
import torch

from salmonn.preference.losses import guided_dpo_loss, mean_cross_entropy, sequence_logps


def loss(chosen, rejected, *, reference=(-12.0, -17.0), cross_entropy=2.0, **options):
    """One pair's loss from plain numbers."""
    return guided_dpo_loss(
        policy_chosen=torch.as_tensor([chosen]),
        policy_rejected=torch.as_tensor([rejected]),
        reference_chosen=torch.tensor([reference[0]]),
        reference_rejected=torch.tensor([reference[1]]),
        ground_truth_cross_entropy=torch.tensor([cross_entropy]),
        **options,
    )


def test_by_hand():
    # chosen: 0.1 * (-10 + 12) = 0.2; rejected: 0.1 * (-20 + 17) = -0.3; margin 0.5
    # -log sigmoid(0.5) = log(1 + e^-0.5) = log 1.6065307 = 0.4740770; + 0.1 * 2 = 0.6740770
    result = loss(-10.0, -20.0)
    assert result.chosen_reward.item() == pytest.approx(0.2)
    assert result.rejected_reward.item() == pytest.approx(-0.3)
    assert result.dpo.item() == pytest.approx(0.4740770)
    assert result.cross_entropy.item() == 2.0
    assert result.loss.item() == pytest.approx(0.6740770)


def test_the_wrong_one_preferred_by_hand():
    # beta 0.5: chosen 0.5 * -2 = -1, rejected 0.5 * 2 = 1, margin -2: log(1 + e^2) = log 8.3890561 = 2.1269280
    assert loss(-14.0, -15.0, beta=0.5, ce_weight=0.0).loss.item() == pytest.approx(2.1269280)


def test_no_margin_is_log_two():
    assert loss(-12.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(math.log(2))
    # Both moved by the same amount from the reference: still no preference.
    assert loss(-2.0, -7.0, ce_weight=0.0).loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("ce_weight", "expected"), [(0.0, 0.4740770), (1.0, 2.4740770), (0.25, 0.9740770)])
def test_weight_of_the_cross_entropy(ce_weight, expected):
    result = loss(-10.0, -20.0, ce_weight=ce_weight)
    assert result.loss.item() == pytest.approx(expected) and result.dpo.item() == pytest.approx(0.4740770)


def test_gradients():
    # d/dm -log sigmoid(m) = -sigmoid(-m) = -1 / (1 + e^0.5) = -0.3775407; times beta 0.1 for the log-probabilities.
    leaves = [torch.tensor([value], requires_grad=True) for value in (-10.0, -20.0, 2.0)]
    guided_dpo_loss(
        policy_chosen=leaves[0],
        policy_rejected=leaves[1],
        reference_chosen=torch.tensor([-12.0]),
        reference_rejected=torch.tensor([-17.0]),
        ground_truth_cross_entropy=leaves[2],
    ).loss.sum().backward()
    assert leaves[0].grad.item() == pytest.approx(-0.03775407)  # a step down the gradient raises the chosen one
    assert leaves[1].grad.item() == pytest.approx(0.03775407)
    assert leaves[2].grad.item() == pytest.approx(0.1)


def test_figures_carry_no_gradient():
    leaf = torch.tensor([-10.0], requires_grad=True)
    result = guided_dpo_loss(
        policy_chosen=leaf,
        policy_rejected=leaf * 2,
        reference_chosen=leaf.detach(),
        reference_rejected=leaf.detach(),
        ground_truth_cross_entropy=leaf.abs(),
    )
    assert result.loss.requires_grad
    parts = (result.dpo, result.cross_entropy, result.chosen_reward, result.rejected_reward)
    assert not any(part.requires_grad for part in parts)


def test_far_margins_stay_finite():
    # -log sigmoid(-500) is 500 in exact arithmetic, where exp(500) overflows; -log sigmoid(500) is 0.
    assert loss(-5012.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(500.0)
    assert loss(4988.0, -17.0, ce_weight=0.0).loss.item() == pytest.approx(0.0)


def test_pairs_of_a_batch_do_not_mix():
    result = guided_dpo_loss(
        policy_chosen=torch.tensor([-10.0, -14.0]),
        policy_rejected=torch.tensor([-20.0, -15.0]),
        reference_chosen=torch.tensor([-12.0, -12.0]),
        reference_rejected=torch.tensor([-17.0, -17.0]),
        ground_truth_cross_entropy=torch.tensor([2.0, 0.0]),
    )
    # second: margin 0.1 * (-2 - 2) = -0.4: log(1 + e^0.4) = log 2.4918247 = 0.9130153
    assert result.loss.tolist() == pytest.approx([0.6740770, 0.9130153])


def test_sums_and_means_of_tokens():
    token_logps = torch.tensor([[0.0, -1.0, -2.0, 0.0], [-0.5, 0.0, 0.0, -0.25]])
    assert sequence_logps(token_logps).tolist() == [-3.0, -0.75]
    # The mean is over the answer's tokens, not over the padded length of 4.
    assert mean_cross_entropy(token_logps, torch.tensor([2, 3])).tolist() == [1.5, 0.25]
