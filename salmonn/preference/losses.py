"""Losses of preference training: pure functions of the log-probabilities of answers, by role.

A role is a field of `salmonn.records.Comparison` that holds an answer: chosen, rejected, ground_truth. To add a loss,
write a function of `{role: RoleLogps}`, and name it in `LossConfig.kind` and `make_loss`, with the roles that it needs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Role = Literal["chosen", "rejected", "ground_truth"]


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
    """Loss of preference training.

    Args:
        kind: "guided_dpo" is DPO with cross-entropy on the ground truth (arXiv 2410.06682).
        beta: strength of the KL penalty that keeps the model close to the reference policy.
        ce_weight: weight of the cross-entropy on the ground-truth caption; 0 for plain DPO.
    """

    kind: Literal["guided_dpo"] = "guided_dpo"
    beta: float = 0.1
    ce_weight: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.beta < math.inf and 0 <= self.ce_weight < math.inf):
            raise ValueError(
                f"loss.beta must be above 0 and loss.ce_weight at least 0, got {self.beta} and {self.ce_weight}"
            )


def make_loss(config: LossConfig) -> PreferenceLoss:
    """Build the loss that the configuration names."""
    return PreferenceLoss(
        partial(guided_dpo_loss, beta=config.beta, ce_weight=config.ce_weight),
        roles=("chosen", "rejected", "ground_truth"),
        reference_roles=("chosen", "rejected"),
    )


def guided_dpo_loss(logps: Mapping[Role, RoleLogps], *, beta: float = 0.1, ce_weight: float = 0.1) -> LossOutput:
    """Compute guided DPO (arXiv 2410.06682): DPO (arXiv 2305.18290) with cross-entropy that preserves the language.

    -log sigmoid(beta * [log(pi/ref)(chosen) - log(pi/ref)(rejected)]) + ce_weight * CE(ground truth)

    CE is the mean over the tokens of the ground truth. Rewards are beta * log(pi / ref).

    Args:
        logps: log-probabilities of chosen, rejected and ground_truth.
        beta: strength of the KL penalty.
        ce_weight: weight of the cross-entropy; 0 for plain DPO.
    """
    chosen, rejected = (beta * log_ratio(logps[role]) for role in ("chosen", "rejected"))
    dpo = -F.logsigmoid(chosen - rejected)
    cross_entropy = -logps["ground_truth"].policy / logps["ground_truth"].num_tokens
    parts = {
        "dpo": dpo,
        "ce": cross_entropy,
        "chosen": chosen,
        "rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
        "chosen_drift": chosen / beta,
        "rejected_drift": rejected / beta,
    }
    return LossOutput(dpo + ce_weight * cross_entropy, {name: part.detach() for name, part in parts.items()})


def log_ratio(logps: RoleLogps) -> Tensor:
    """Return log(pi / ref) of each answer, (B,)."""
    assert logps.reference is not None, "roles of a log-ratio are among the loss's reference_roles"
    return logps.policy - logps.reference
