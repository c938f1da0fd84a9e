"""Losses of preference training: pure functions of the log-probabilities of answers, by role, or of their rewards.

A role is an answer that a comparison is trained on: a field of `salmonn.records.Comparison` (chosen, rejected,
ground_truth), or the chosen caption of another clip (mismatched). To add a loss of pairs, write a function of
`LogRatios` and name it in `LossName` and `PAIR_LOSSES`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Role = Literal["chosen", "rejected", "ground_truth", "mismatched"]
LossName = Literal["sigmoid", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "kto"]


@dataclass(frozen=True)
class RoleLogps:
    """Log-probabilities of the answers of one role in a batch of B comparisons.

    Args:
        policy: (B,) summed over the answer's tokens, by the model in training.
        num_tokens: (B,) number of tokens of each answer.
        reference: (B,) the same sums by the reference policy; None for a role that has none.
    """

    policy: Tensor
    num_tokens: Tensor
    reference: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log(pi / ref) of each answer, (B,)."""
        assert self.reference is not None, "roles of a log-ratio are among the loss's reference_roles"
        return self.policy - self.reference


@dataclass(frozen=True)
class LossOutput:
    """Loss of each comparison, (B,), and its parts for the log, (B,) each and detached."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss with the roles that it needs.

    Args:
        compute: {role: log-probabilities} -> loss.
        roles: answers of a comparison that the model in training scores.
        reference_roles: those of them that the reference policy scores too.
    """

    compute: Callable[[Mapping[Role, RoleLogps]], LossOutput]
    roles: tuple[Role, ...]
    reference_roles: tuple[Role, ...]


@dataclass(frozen=True)
class LossConfig:
    """Loss of preference training: a loss of pairs, and cross-entropy on the ground truth.

    Args:
        kind: loss of pairs, under TRL's names; "sigmoid" is DPO. With cross-entropy, DPO becomes guided DPO
            (arXiv 2410.06682).
        beta: strength of the KL penalty that keeps the model close to the reference policy. Published values: 0.1 for
            sigmoid, ipo and kto, 0.01 for nca_pair, 0.001 for sppo_hard.
        ce_weight: weight of the cross-entropy on the ground-truth caption; 0 for none, which needs no ground truth.
        label_smoothing: share of comparisons that are assumed to be the wrong way round; for sigmoid (conservative
            DPO) and robust only.
    """

    kind: LossName = "sigmoid"
    beta: float = 0.1
    ce_weight: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.beta < math.inf and 0 <= self.ce_weight < math.inf):
            raise ValueError(
                f"loss.beta must be above 0 and loss.ce_weight at least 0, got {self.beta} and {self.ce_weight}"
            )
        if self.kind not in get_args(LossName):
            raise ValueError(f"loss.kind must be one of {', '.join(get_args(LossName))}, got {self.kind!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"loss.label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.kind not in ("sigmoid", "robust"):
            raise ValueError(f"loss.kind {self.kind} has no label_smoothing; use sigmoid or robust, or leave it at 0")
        if self.kind == "robust" and not self.label_smoothing:
            raise ValueError("loss.kind robust needs loss.label_smoothing, the share of wrong labels, such as 0.1")


@dataclass(frozen=True)
class LogRatios:
    """log(pi / ref) of the answers of B comparisons, (B,) each, summed over the tokens of an answer.

    Args:
        chosen, rejected: log-ratios of the two captions.
        num_chosen_tokens, num_rejected_tokens: lengths of the captions.
        mismatched: log-ratios of captions of other clips; None unless the loss needs them.
    """

    chosen: Tensor
    rejected: Tensor
    num_chosen_tokens: Tensor
    num_rejected_tokens: Tensor
    mismatched: Tensor | None = None


def sigmoid_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute DPO (arXiv 2305.18290, eq. 7); label smoothing makes it conservative DPO."""
    margin, smoothing = _reward_margin(ratios, config), config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def ipo_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute IPO (arXiv 2310.12036, eq. 17) on means over tokens, as its authors do; beta is the paper's tau."""
    margin = ratios.chosen / ratios.num_chosen_tokens - ratios.rejected / ratios.num_rejected_tokens
    return (margin - 1 / (2 * config.beta)) ** 2


def robust_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute robust DPO (arXiv 2403.00409), unbiased if a share `label_smoothing` of the labels is flipped.

    It has a larger variance than DPO and may be negative.
    """
    margin, flipped = _reward_margin(ratios, config), config.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(margin) + flipped * F.logsigmoid(-margin)) / (1 - 2 * flipped)


def nca_pair_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute NCA (arXiv 2402.05369), which keeps the chosen caption from becoming less likely."""
    chosen, rejected = config.beta * ratios.chosen, config.beta * ratios.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute BCO (arXiv 2404.04656) without reward shift: each caption is classified by itself."""
    return -F.logsigmoid(config.beta * ratios.chosen) - F.logsigmoid(-config.beta * ratios.rejected)


def sppo_hard_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute SPPO (arXiv 2405.00675, eq. 4.7) with win rates of 1 for chosen and 0 for rejected captions."""
    target = 1 / (2 * config.beta)
    return (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2


def apo_zero_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute APO-zero (arXiv 2408.06266, eq. 7), for chosen captions that are better than the model's own."""
    return 1 - torch.sigmoid(config.beta * ratios.chosen) + torch.sigmoid(config.beta * ratios.rejected)


def kto_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute KTO (arXiv 2402.01306, eq. 7) with equal weights: chosen captions are desirable, rejected ones are not.

    The KL divergence is estimated on the micro-batch from captions of other clips, and carries no gradient.
    """
    assert ratios.mismatched is not None
    kl = ratios.mismatched.detach().mean().clamp(min=0)
    chosen, rejected = config.beta * (ratios.chosen - kl), config.beta * (kl - ratios.rejected)
    return 2 - torch.sigmoid(chosen) - torch.sigmoid(rejected)


def _reward_margin(ratios: LogRatios, config: LossConfig) -> Tensor:
    return config.beta * ratios.chosen - config.beta * ratios.rejected


PAIR_LOSSES: Mapping[LossName, Callable[[LogRatios, LossConfig], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "kto": kto_loss,
}


# Losses that are sums over the two captions, so that a caption can be trained on alone.
UNPAIRED_LOSSES: tuple[LossName, ...] = ("bco_pair", "kto")


def make_loss(config: LossConfig) -> PreferenceLoss:
    """Build the loss that the configuration names."""
    reference_roles: tuple[Role, ...] = ("chosen", "rejected")
    if config.kind == "kto":
        reference_roles += ("mismatched",)
    roles: tuple[Role, ...] = (*reference_roles, "ground_truth") if config.ce_weight else reference_roles
    return PreferenceLoss(partial(guided_loss, config=config), roles, reference_roles)


def guided_loss(logps: Mapping[Role, RoleLogps], config: LossConfig) -> LossOutput:
    """Compute a loss of pairs plus cross-entropy on the ground truth, which preserves the language (arXiv 2410.06682).

    For "sigmoid", the loss of guided DPO:

    -log sigmoid(beta * [log(pi/ref)(chosen) - log(pi/ref)(rejected)]) + ce_weight * CE(ground truth)

    CE is the mean over the tokens of the ground truth. Rewards are beta * log(pi / ref).

    Args:
        logps: log-probabilities by role, those of `make_loss(config).roles`.
        config: loss of pairs, and weights.
    """
    mismatched = logps["mismatched"].log_ratio if config.kind == "kto" else None
    ratios = LogRatios(
        logps["chosen"].log_ratio,
        logps["rejected"].log_ratio,
        logps["chosen"].num_tokens,
        logps["rejected"].num_tokens,
        mismatched,
    )
    loss = pair_loss = PAIR_LOSSES[config.kind](ratios, config)
    chosen, rejected = config.beta * ratios.chosen, config.beta * ratios.rejected
    parts = {"dpo": pair_loss}
    if config.ce_weight:
        # A comparison without a ground truth has an empty one, whose cross-entropy is 0.
        parts["ce"] = -logps["ground_truth"].policy / logps["ground_truth"].num_tokens.clamp(min=1)
        loss = pair_loss + config.ce_weight * parts["ce"]
    parts |= {
        "chosen": chosen,
        "rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
        "chosen_drift": chosen / config.beta,
        "rejected_drift": rejected / config.beta,
    }
    return LossOutput(loss, {name: part.detach() for name, part in parts.items()})


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, center_weight: float = 0.01) -> LossOutput:
    """Compute the loss of a reward model on N comparisons (Bradley and Terry 1952, arXiv 2405.07863).

    -log sigmoid(r(chosen) - r(rejected)) + center_weight * (r(chosen) + r(rejected))^2

    Comparisons leave the sum of rewards open; the second term (arXiv 2312.09244) keeps it near 0, so that rewards of
    different rounds can be compared.

    Args:
        chosen, rejected: (N,) rewards.
        center_weight: weight of the second term.
    """
    difference = chosen - rejected
    ranking = -F.logsigmoid(difference)
    parts = {
        "margin": difference,
        "accuracy": (difference > 0).to(chosen.dtype),
        "mean_reward": (chosen + rejected) / 2,
    }
    loss = ranking + center_weight * (chosen + rejected).square()
    return LossOutput(loss, {name: part.detach() for name, part in parts.items()})
