"""Heads of reward models: from the pooled states of answers to rewards, and the exact fit of a linear one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salmonn.model.pooling import AnswerStates
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.losses import bradley_terry_loss

LBFGS_STEPS = 200
Pair = tuple[int, int]  # indices of the better and the worse row


class ScalarHead(nn.Module):
    """Linear map of an answer's state to its reward; `score.weight` (1, P) without bias, as in published models.

    Args:
        width: size P of the states.
        ensemble: number of further heads, whose rewards are standardized: only their disagreement is of interest.
    """

    def __init__(self, width: int, ensemble: int = 0) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / (width + 1) ** 0.5)
        self.ensemble = nn.Linear(width, ensemble) if ensemble else None

    def forward(self, states: AnswerStates) -> Tensor:
        """Return the rewards (B,). Not in the 16 bits of autocast, whose steps are as large as many differences."""
        with torch.autocast(states.answer.device.type, enabled=False):
            rewards: Tensor = self.score(states.answer.to(self.score.weight.dtype)).squeeze(-1)
        return rewards

    def spread(self, states: AnswerStates) -> Tensor:
        """Return the standard deviations (B,) of the ensemble's rewards; there must be an ensemble."""
        assert self.ensemble is not None
        rewards: Tensor = self.ensemble(states.answer.to(self.ensemble.weight.dtype))
        return rewards.std(-1)


class GatingNetwork(nn.Module):
    """Weights of k objectives from the state of a request: a linear map and a softmax.

    All parameters start at 0, which is equal weights for every request.

    Args:
        widths: the state's D and k; k alone makes constant weights.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        *width, count = widths
        self.weight = nn.Parameter(torch.zeros(count, *width)) if width else None
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, request: Tensor) -> Tensor:
        """Return weights (B, k) for states (B, D) of requests; those of a row sum to 1 over the objectives."""
        logits = self.bias.expand(len(request), -1)
        if self.weight is not None:
            logits = logits + request @ self.weight.T
        return logits.softmax(-1)


class ObjectiveHead(nn.Module):
    """Named objectives and their weights: reward = sum of weight * objective (arXiv 2406.12845).

    The gate of ArmoRM is a network with three hidden layers that reads the last token of a prompt of text. Here most of
    that state would be the clip's, and comparisons are few: the gate is linear and reads the request without the clip.
    Unlike in the published training code, the weights are normalized over the objectives, the corrected objectives are
    used in training too, and the regression has an intercept.

    Args:
        width: size P of an answer's state.
        gate_widths: see `GatingNetwork`.
    """

    def __init__(self, width: int, gate_widths: Sequence[int]) -> None:
        super().__init__()
        count = gate_widths[-1]
        self.gate_widths = tuple(gate_widths)
        self.regression_layer = nn.Linear(width, count)
        self.gating = GatingNetwork(gate_widths)
        self.reward_transform_matrix: Tensor
        self.register_buffer("reward_transform_matrix", torch.eye(count))

    def objectives(self, states: AnswerStates) -> Tensor:
        """Return the objectives (B, k), corrected for length."""
        values: Tensor = self.regression_layer(states.answer.to(self.regression_layer.weight.dtype))
        return values @ self.reward_transform_matrix

    def weights(self, states: AnswerStates) -> Tensor:
        """Return the weights (B, k) of the objectives; the states must have those of the requests."""
        assert states.request is not None
        weights: Tensor = self.gating(states.request.to(self.regression_layer.weight.dtype))
        return weights

    def forward(self, states: AnswerStates) -> Tensor:
        """Return the rewards (B,)."""
        return (self.weights(states) * self.objectives(states)).sum(-1)


Head = ScalarHead | ObjectiveHead


def join_pairs(groups: Sequence[AnswerGroup]) -> tuple[Tensor, Tensor]:
    """Return the pairs (N, 2) of groups whose rows follow each other, and their weights: 1 for each group in sum."""
    pairs, weights, start = [], [], 0
    for group in groups:
        pairs += [(start + better, start + worse) for better, worse in group.pairs]
        weights += [1 / len(group.pairs)] * len(group.pairs)
        start += len(group.answers)
    return torch.tensor(pairs), torch.tensor(weights, dtype=torch.float64)


def fit_scalar_head(
    states: Tensor, pairs: Sequence[Pair], weights: Tensor, *, l2: float, center_weight: float = 0.01
) -> Tensor:
    """Fit a linear head to comparisons by LBFGS in float64; the loss is convex, so the result needs no seed.

    States are standardized for the fit, and the scale is folded into the weights afterwards.

    Args:
        states: (R, P) states of answers.
        pairs: N indices of the better and the worse answer.
        weights: (N,) weight of each pair; they sum to 1.
        l2: weight of the squared norm of the standardized weights.
        center_weight: see `bradley_terry_loss`.

    Returns:
        (P,) weights, float64.
    """
    states = states.double()
    std, mean = torch.std_mean(states, dim=0)
    scale = torch.where(std > 0, std, 1.0)
    standardized = (states - mean) / scale
    better, worse = torch.tensor(pairs).T
    weight = torch.zeros(states.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=LBFGS_STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        rewards = standardized @ weight
        ranking = bradley_terry_loss(rewards[better], rewards[worse], center_weight=center_weight)
        loss = (weights.double() * ranking.loss).sum() + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach() / scale


def fit_temperature(margins: Tensor) -> float:
    """Return the temperature T for which sigmoid(margin / T) is the most likely.

    T is 0.05 to 20 times the root mean square of the margins, so that it does not depend on their unit; 1 if all are 0.
    A linear head that fits its training pairs well is overconfident on others: its margins must be divided by T > 1.

    Args:
        margins: (N,) rewards of better answers minus those of worse ones, on clips that the head was not fitted to.
    """
    scale = margins.double().square().mean().sqrt()
    if not scale:
        return 1.0
    temperatures = scale * torch.logspace(-1.3, 1.3, 521, dtype=torch.float64)
    losses = F.softplus(-margins.double() / temperatures.unsqueeze(1)).mean(1)
    return float(temperatures[losses.argmin()])
