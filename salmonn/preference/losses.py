"""Losses of SFT and guided DPO, pure functions of tensors."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GuidedDpoLoss:
    """`loss` and its parts, (B,) each; rewards are beta * log(pi / ref), detached."""

    loss: Tensor
    dpo: Tensor
    cross_entropy: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def sequence_logps(token_logps: Tensor) -> Tensor:
    """Log-probability of whole answers, (B, L) per token -> (B,): the sum, as DPO defines it (arXiv 2305.18290)."""
    return token_logps.sum(-1)


def mean_cross_entropy(token_logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Cross-entropy of each row, the mean over its answer's tokens: (B, L) and (B,) -> (B,)."""
    return -token_logps.sum(-1) / num_tokens


def guided_dpo_loss(
    *,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    ground_truth_cross_entropy: Tensor,
    beta: float = 0.1,
    ce_weight: float = 0.1,
) -> GuidedDpoLoss:
    """Guided DPO of arXiv 2410.06682: DPO with cross-entropy on the ground truth, which keeps the language sound.

    -log sigmoid(beta * [log(pi/ref)(chosen) - log(pi/ref)(rejected)]) + ce_weight * CE(ground truth)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: (B,) summed log-probabilities.
        ground_truth_cross_entropy: (B,)
        beta: strength of the tie to the reference.
        ce_weight: weight of the cross-entropy; 0 is plain DPO.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    dpo = -F.logsigmoid(chosen - rejected)
    return GuidedDpoLoss(
        loss=dpo + ce_weight * ground_truth_cross_entropy,
        dpo=dpo.detach(),
        cross_entropy=ground_truth_cross_entropy.detach(),
        chosen_reward=chosen.detach(),
        rejected_reward=rejected.detach(),
    )
