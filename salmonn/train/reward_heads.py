"""Fits of reward heads to frozen states: comparisons, credits of clauses, ensembles, and named objectives with a gate.

Named objectives are fitted after ArmoRM (arXiv 2406.12845), in two stages on frozen states: ridge regression of each
objective and correction for length, then the gate. ArmoRM's correction drives the rank correlation of every objective
with length to zero. In captions a correlation with length is partly justified, since more events need more words; so by
default the correlation becomes that of the judge's own values ("gold").
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from salmonn.model.pooling import AnswerStates
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.heads import (
    LBFGS_STEPS,
    GatingNetwork,
    Head,
    ObjectiveHead,
    ScalarHead,
    fit_scalar_head,
    join_pairs,
)
from salmonn.preference.objectives import OBJECTIVES, Debias

ALPHAS = (1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
LENGTH = OBJECTIVES.index("length")
MAX_CORRELATION = 0.03  # with length that the published correction leaves
LAMBDAS = torch.linspace(0, 0.95, 20, dtype=torch.float64)
VALIDATION_EVERY = 5  # every fifth clip chooses the strengths of the ridge and of the gate's penalty
GATE_STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 1))
MIN_STRENGTH = 1e-4
ROUNDING = 1e-5  # difference of states, relative to their size, that may be rounding


@dataclass(frozen=True)
class ObjectiveConfig:
    """Head of named objectives.

    Args:
        gate: weigh the objectives by request; otherwise all captions have the same weights.
        debias: correlation with length after the correction: that of the judge's values, none, or uncorrected.
    """

    gate: bool = True
    debias: Debias = "gold"


def fit_head(
    states: Sequence[AnswerStates], groups: Sequence[AnswerGroup], *, l2: float, center_weight: float
) -> ScalarHead:
    """Fit a linear head to the comparisons of groups, each of which weighs the same.

    Args:
        states: states of the answers of each group.
        groups: clips with their comparisons.
        l2, center_weight: see `fit_scalar_head`.
    """
    answers = torch.cat([one.answer for one in states])
    pairs, weights = join_pairs(groups)
    weight = fit_scalar_head(
        answers,
        [(int(better), int(worse)) for better, worse in pairs],
        weights / len(groups),
        l2=l2,
        center_weight=center_weight,
    )
    head = ScalarHead(answers.shape[1])
    with torch.no_grad():
        head.score.weight.copy_(weight.unsqueeze(0))
    return head


def fit_claims(states: Sequence[AnswerStates], groups: Sequence[AnswerGroup]) -> ScalarHead:
    """Fit a linear head to the credits of clauses by ridge regression, whose strength every fifth clip chooses.

    Args:
        states: states of the clauses of all answers of each group.
        groups: clips with the credits of their answers' clauses.

    Raises:
        ValueError: the credits are unknown.
    """
    if not all(group.credits for group in groups):
        raise ValueError("kind claims needs captions with a judge's scores, such as the folder of a round of mrDPO")
    clauses = torch.cat([one.answer for one in states]).double()
    credits = torch.tensor([value for group in groups for answer in group.credits for value in answer])
    clip = torch.cat([torch.full((len(one.answer),), number) for number, one in enumerate(states)])
    weight, bias = fit_ridge(clauses, credits.double().unsqueeze(1), validation=clip % VALIDATION_EVERY == 0)
    head = ScalarHead(clauses.shape[1])
    with torch.no_grad():
        head.score.weight.copy_(weight)
        head.score.weight[0, 0] = bias[0]  # of the 1 that each clause's state begins with
    return head


def fit_ensemble(
    states: Sequence[AnswerStates],
    groups: Sequence[AnswerGroup],
    *,
    fit: Callable[[Sequence[AnswerStates], Sequence[AnswerGroup]], Head],
    answers: Tensor,
    count: int,
    seed: int,
) -> nn.Linear:
    """Fit heads to clips drawn with replacement; each one's rewards of all answers have mean 0 and deviation 1.

    Args:
        states, groups: data that a head is fitted to.
        fit: fits a linear head.
        answers: (R, P) states of all answers.
        count: number of heads.
        seed: seed of the drawing.
    """
    together = nn.Linear(answers.shape[1], count)
    for number in range(count):
        drawn = random.Random(f"{seed}-head-{number}").choices(range(len(groups)), k=len(groups))
        head = fit([states[index] for index in drawn], [groups[index] for index in drawn])
        assert isinstance(head, ScalarHead)
        weight = head.score.weight.detach().double()[0]
        std, mean = torch.std_mean(answers @ weight)
        scale = std.clamp(min=1e-6)
        with torch.no_grad():
            together.weight[number], together.bias[number] = weight / scale, -mean / scale
    return together


def fit_objective_head(
    states: Sequence[AnswerStates], groups: Sequence[AnswerGroup], config: ObjectiveConfig
) -> ObjectiveHead:
    """Fit a head to judged captions and their comparisons; the result needs no seed.

    Args:
        states: states of the answers and of the request of each group.
        groups: clips with the objectives of their answers.
        config: gate and correction.

    Raises:
        ValueError: the objectives are unknown.
    """
    if not all(group.objectives for group in groups):
        raise ValueError("named objectives need judged captions with their references; pass --references")
    answers = torch.cat([one.answer for one in states]).double()
    labels = torch.tensor(
        [[float("nan") if value is None else value for value in row] for group in groups for row in group.objectives],
        dtype=torch.float64,
    )
    number_of = dict[str, int]()  # all prompts about a video are on one side
    for group in groups:
        number_of.setdefault(group.example.video, len(number_of))
    is_validation = torch.tensor([number_of[group.example.video] % VALIDATION_EVERY == 0 for group in groups])
    num_answers = torch.tensor([len(one.answer) for one in states])
    weight, bias = fit_ridge(answers, labels, validation=is_validation.repeat_interleave(num_answers))
    requests = torch.stack([one.request[0] for one in states if one.request is not None]).double()
    widths = (requests.shape[1], len(OBJECTIVES)) if config.gate else (len(OBJECTIVES),)
    with torch.random.fork_rng():
        head = ObjectiveHead(answers.shape[1], widths).double()
    with torch.no_grad():
        head.regression_layer.weight.copy_(weight)
        head.regression_layer.bias.copy_(bias)
        predicted = answers @ weight.T + bias
        head.reward_transform_matrix.copy_(correct_for_length(predicted, labels, debias=config.debias))
        differences = [
            values[better] - values[worse]
            for values, group in zip(map(head.objectives, states), groups, strict=True)
            for better, worse in group.pairs
        ]
    num_pairs = torch.tensor([len(group.pairs) for group in groups])
    comparisons = _Comparisons(
        requests.repeat_interleave(num_pairs, 0), torch.stack(differences), join_pairs(groups)[1]
    )
    _fit_gate(head.gating, comparisons, is_validation=is_validation.repeat_interleave(num_pairs))
    return head.requires_grad_(False)


def fit_ridge(states: Tensor, labels: Tensor, *, validation: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a ridge regression with intercept to each objective, on the rows where it is known.

    Args:
        states: (R, P) states of answers.
        labels: (R, k) values, NaN where unknown.
        validation: (R,) rows by whose squared error each objective's strength is chosen; it is then fitted to all.

    Returns:
        (k, P) weights and (k,) intercepts.
    """
    std, mean = torch.std_mean(states, dim=0)
    scale = torch.where(std > 0, std, 1.0)
    standardized = (states - mean) / scale
    weights, biases = [], []
    for values in labels.T:
        known = ~values.isnan()
        learned, tested = known & ~validation, known & validation
        strength = ALPHAS[-1]
        if learned.any() and tested.any():
            errors = []
            for alpha in ALPHAS:
                weight, bias = _ridge(standardized[learned], values[learned], alpha)
                errors.append(float((standardized[tested] @ weight + bias - values[tested]).square().mean()))
            strength = ALPHAS[errors.index(min(errors))]
        weight, bias = (
            _ridge(standardized[known], values[known], strength) if known.any() else (0 * std, std.new_zeros(()))
        )
        weights.append(weight / scale)
        biases.append(bias - (weight / scale * mean).sum())
    return torch.stack(weights), torch.stack(biases)


def _ridge(states: Tensor, values: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    center, mean = states.mean(0), values.mean()
    centered = states - center
    # With fewer rows than columns, the smaller system: (X'X + alpha I)^-1 X' = X' (XX' + alpha I)^-1.
    is_wide = len(centered) < centered.shape[1]
    gram = centered @ centered.T if is_wide else centered.T @ centered
    gram.diagonal().add_(alpha)
    if is_wide:
        weight = centered.T @ torch.linalg.solve(gram, values - mean)
    else:
        weight = torch.linalg.solve(gram, centered.T @ (values - mean))
    return weight, mean - weight @ center


def correct_for_length(predicted: Tensor, labels: Tensor, *, debias: Debias) -> Tensor:
    """Return the matrix (k, k) that subtracts lambda * length from each objective.

    lambda is the smallest one on a grid from 0 to 0.95 whose rank correlation with length is at most the target: that
    of the labels ("gold"), or 0.03 ("published"); the last one if none is. Length itself is not corrected.

    Args:
        predicted, labels: (R, k) predicted and true objectives; NaN where unknown.
        debias: target.
    """
    matrix = torch.eye(predicted.shape[1], dtype=torch.float64)
    if debias == "none":
        return matrix
    length = labels[:, LENGTH]
    for index in range(predicted.shape[1]):
        known = ~labels[:, index].isnan()
        if index == LENGTH or int(known.sum()) < 3:
            continue
        gold = _rank_correlation(labels[known, index], length[known])
        target = MAX_CORRELATION if debias == "published" else max(gold, MAX_CORRELATION)
        chosen = LAMBDAS[-1]
        for candidate in LAMBDAS:
            corrected = predicted[known, index] - candidate * predicted[known, LENGTH]
            if _rank_correlation(corrected, length[known]) <= target:
                chosen = candidate
                break
        matrix[LENGTH, index] = -chosen
    return matrix


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    if one.std() == 0 or other.std() == 0:
        return 0.0
    return float(spearmanr(one.numpy(), other.numpy()).statistic)


@dataclass(frozen=True)
class _Comparisons:
    """N comparisons: states (N, D) of their requests, objectives (N, k) of better minus worse, and weights (N,)."""

    requests: Tensor
    differences: Tensor
    weights: Tensor

    def select(self, chosen: Tensor) -> "_Comparisons":
        return _Comparisons(self.requests[chosen], self.differences[chosen], self.weights[chosen])

    def loss(self, gating: GatingNetwork, log_scale: Tensor) -> Tensor:
        """Return the weighted mean of Bradley and Terry's loss, of rewards times a scale."""
        margins = log_scale.exp() * (gating(self.requests) * self.differences).sum(-1)
        return (self.weights * F.softplus(-margins)).sum() / self.weights.sum()


def _fit_gate(gating: GatingNetwork, comparisons: _Comparisons, *, is_validation: Tensor) -> None:
    """Fit the weights of the objectives to N comparisons.

    The strength of the penalty, which draws the weights of all requests together, is that under which the comparisons
    of the validation clips are the most likely. The gate is then fitted to all clips.

    Args:
        gating: gate.
        comparisons: all comparisons.
        is_validation: (N,) those that choose the strength.
    """
    # One scale for all dimensions: one in which the known requests hardly differ must not decide about a new one.
    mean = comparisons.requests.mean(0)
    size = (comparisons.requests - mean).square().sum(1).mean().sqrt()
    scale = size if size > ROUNDING * mean.norm() else torch.ones_like(size)  # a single request has none
    comparisons = replace(comparisons, requests=(comparisons.requests - mean) / scale)
    strength = GATE_STRENGTHS[-1]
    if gating.weight is not None and is_validation.any() and not is_validation.all():
        learned, tested = comparisons.select(~is_validation), comparisons.select(is_validation)
        losses = []
        for one in GATE_STRENGTHS:
            log_scale = _fit_weights(gating, learned, strength=one)
            with torch.no_grad():
                losses.append(float(tested.loss(gating, log_scale)))
        strength = GATE_STRENGTHS[losses.index(min(losses))]
    _fit_weights(gating, comparisons, strength=strength)
    if gating.weight is not None:
        with torch.no_grad():
            gating.weight.div_(scale)
            gating.bias.sub_(gating.weight @ mean)


def _fit_weights(gating: GatingNetwork, comparisons: _Comparisons, *, strength: float) -> Tensor:
    """Fit a gate by LBFGS, starting from equal weights; returns the logarithm of the scale that fits best with them."""
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for parameter in gating.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        [*gating.parameters(), log_scale], max_iter=LBFGS_STEPS, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # Without the second penalty, logits of objectives that deserve no weight would fall without end.
        penalty = MIN_STRENGTH * gating.bias.square().sum()
        if gating.weight is not None:
            penalty = penalty + strength * gating.weight.square().sum()
        loss = comparisons.loss(gating, log_scale) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_scale.detach()
