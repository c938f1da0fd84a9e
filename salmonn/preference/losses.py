"""Losses of preference training: pure functions of the log-probabilities of answers, by role, or of their rewards.

A role is an answer that is trained on: a field of `salmonn.records.Comparison` (chosen, rejected, ground_truth), the
chosen caption of another clip (mismatched), or one of a clip's sampled captions (sample). To add a loss of pairs, write
a function of `LogRatios` and name it in `LossName` and `PAIR_LOSSES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Role = Literal["chosen", "rejected", "ground_truth", "mismatched", "sample"]
LossName = Literal["sigmoid", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "kto", "nash", "grpo"]


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities of the tokens of A answers, padded to T tokens.

    Args:
        policy, reference: (A, T) by the model in training and by the reference policy; 0 in the padding.
        mask: (A, T) True for tokens, False for padding.
    """

    policy: Tensor
    reference: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Advantages:
    """Advantages of the A samples of B clips, clip by clip.

    Args:
        values: (A,) advantage of each sample over the other samples of its clip.
        group_sizes: number of samples of each clip; B numbers with the sum A.
    """

    values: Tensor
    group_sizes: Sequence[int]

    def to(self, device: torch.device) -> "Advantages":
        """Return the advantages on a device."""
        return Advantages(self.values.to(device), self.group_sizes)


@dataclass(frozen=True)
class Clauses:
    """Up to C marked clauses of each of A answers of T tokens.

    Args:
        tokens: (A, C, T) True for the tokens of a clause.
        signs: (A, C) 1 for a right clause, -1 for a wrong one, 0 where an answer has fewer than C.
    """

    tokens: Tensor
    signs: Tensor

    def to(self, device: torch.device) -> "Clauses":
        """Return the clauses on a device."""
        return Clauses(self.tokens.to(device), self.signs.to(device))


@dataclass(frozen=True)
class RoleLogps:
    """Log-probabilities of the answers of one role in a batch of B comparisons, or of B clips with their samples.

    Args:
        policy: (B,) summed over the answer's tokens, by the model in training; (A,) for the samples of all clips.
        num_tokens: (B,) number of tokens of each answer.
        reference: (B,) the same sums by the reference policy; None for a role that has none.
        tokens: log-probabilities of the single tokens, for losses with `per_token`.
        advantages: advantages of samples; None for other roles.
        clauses: marked clauses of chosen and rejected answers.
        margins: (B,) how much better chosen answers are, by the rating; NaN where it is unknown.
    """

    policy: Tensor
    num_tokens: Tensor
    reference: Tensor | None = None
    tokens: TokenLogps | None = None
    advantages: Advantages | None = None
    clauses: Clauses | None = None
    margins: Tensor | None = None

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
        per_token: whether the loss needs the log-probability of each token of these, rather than sums.
    """

    compute: Callable[[Mapping[Role, RoleLogps]], LossOutput]
    roles: tuple[Role, ...]
    reference_roles: tuple[Role, ...]
    per_token: bool = False


@dataclass(frozen=True)
class LossConfig:
    """Loss of preference training: a loss of pairs or of groups, and cross-entropy on the ground truth.

    Args:
        kind: loss of pairs, under TRL's names; "sigmoid" is DPO. With cross-entropy, DPO becomes guided DPO
            (arXiv 2410.06682). "grpo" trains on all samples of a clip at once, and on no pairs.
            "nash" fits the difference of log-ratios to margin / beta; margins are differences of win rates then.
        beta: strength of the KL penalty that keeps the model close to the reference policy. Published values: 0.1 for
            sigmoid, ipo, kto and nash, 0.01 for nca_pair, 0.001 for sppo_hard, 0.04 or 0 for grpo.
        ce_weight: weight of the cross-entropy on the ground-truth caption; 0 for none, which needs no ground truth.
        label_smoothing: share of comparisons that are assumed to be the wrong way round; for sigmoid (conservative
            DPO) and robust only.
        per: what is compared: the two answers, or with "clause" also each marked clause against the reference policy: a
            right one should become more likely, a wrong one less likely; for sigmoid only.
        importance: for grpo, what the probability ratio of new and old policy is taken of: each "token" (GRPO), or the
            whole "sequence", as a geometric mean over its tokens (GSPO).
        clip_low, clip_high: for grpo, distance from 1 beyond which a smaller or a larger ratio has no gradient.
            Published for sequences: 3e-4 and 4e-4.
    """

    kind: LossName = "sigmoid"
    beta: float = 0.1
    ce_weight: float = 0.1
    label_smoothing: float = 0.0
    per: Literal["caption", "clause"] = "caption"
    importance: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28

    def __post_init__(self) -> None:
        has_beta = 0 < self.beta < math.inf or (self.kind == "grpo" and self.beta == 0)
        if not (has_beta and 0 <= self.ce_weight < math.inf):
            raise ValueError(
                "loss.beta must be above 0 (for grpo, at least 0) and loss.ce_weight at least 0, got "
                f"{self.beta} and {self.ce_weight}"
            )
        if not (0 < self.clip_low < 1 and 0 < self.clip_high < math.inf):
            raise ValueError(
                "loss.clip_low must be between 0 and 1 and loss.clip_high above 0, got "
                f"{self.clip_low} and {self.clip_high}"
            )
        if self.kind not in (kinds := (*PAIR_LOSSES, "grpo")):
            raise ValueError(f"loss.kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        if self.per == "clause" and self.kind != "sigmoid":
            raise ValueError(f"loss.kind {self.kind} has no loss of clauses; use sigmoid, or set loss.per caption")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"loss.label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.kind not in ("sigmoid", "robust"):
            raise ValueError(f"loss.kind {self.kind} has no label_smoothing; use sigmoid or robust, or leave it at 0")
        if self.kind == "robust" and not self.label_smoothing:
            raise ValueError("loss.kind robust needs loss.label_smoothing, the share of wrong labels, such as 0.1")

    @property
    def title(self) -> str:
        """Name of the method in the terminal."""
        names = {"sigmoid": "DPO", "robust": "robust DPO", "nash": "Nash learning"}
        name = names.get(self.kind, self.kind.partition("_")[0].upper())
        return name if self.kind == "grpo" or not self.ce_weight else f"guided {name}"


@dataclass(frozen=True)
class LogRatios:
    """log(pi / ref) of the answers of B comparisons, (B,) each, summed over the tokens of an answer.

    Args:
        chosen, rejected: log-ratios of the two captions.
        num_chosen_tokens, num_rejected_tokens: lengths of the captions.
        mismatched: log-ratios of captions of other clips; None unless the loss needs them.
        margins: how much better the chosen captions are, by the rating; None unless the loss needs it.
    """

    chosen: Tensor
    rejected: Tensor
    num_chosen_tokens: Tensor
    num_rejected_tokens: Tensor
    mismatched: Tensor | None = None
    margins: Tensor | None = None


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
    """Compute BCO (arXiv 2404.04656) without reward shift: each caption is classified separately."""
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


def grpo_loss(samples: RoleLogps, config: LossConfig) -> LossOutput:
    """Compute GRPO (arXiv 2402.03300) for the samples of B clips, with the reference policy as the old policy.

    A sample's loss is -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta KL, with its advantage A and the
    probability ratio rho of new and old policy. KL is the estimator k3 at each token, ref / pi - log(ref / pi) - 1.

    "token": rho and the clip are of each token, and a clip's loss is the mean over all tokens of its samples, so that
    long samples are not discounted (DAPO, arXiv 2503.14476, with its separate upper bound). "sequence": rho is the
    geometric mean over the sample's tokens, and samples have equal weights (GSPO, arXiv 2507.18071).

    Returns:
        (B,) loss of each clip. Parts: `kl_estimate`, and `clipped`, the share of the tokens whose advantage has no
        gradient.
    """
    tokens, advantages = samples.tokens, samples.advantages
    assert tokens is not None and advantages is not None, "a loss of groups has per_token, and its examples advantages"
    sizes = list(advantages.group_sizes)
    log_ratio, mask = tokens.policy - tokens.reference, tokens.mask.to(tokens.policy.dtype)
    num_tokens = mask.sum(-1, keepdim=True)  # 0 for an answer that was cut off before its first word
    kl = torch.expm1(-log_ratio) + log_ratio
    if config.importance == "sequence":
        num_tokens = num_tokens.clamp(min=1)
        log_ratio = (log_ratio.sum(-1, keepdim=True) / num_tokens).expand_as(log_ratio)
        per_group = [part.new_full((len(part), 1), len(part)) for part in advantages.values.split(sizes)]
        weights = mask / (num_tokens * torch.cat(per_group))
    else:
        per_group = [part.sum().clamp(min=1).expand(len(part), 1) for part in num_tokens.split(sizes)]
        weights = mask / torch.cat(per_group)
    ratio, advantage = log_ratio.exp(), advantages.values.unsqueeze(-1)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)

    def mean(values: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in (weights * values).split(sizes)])

    mean_kl = mean(kl)
    parts = {"kl_estimate": mean_kl, "clipped": mean((clipped * advantage < ratio * advantage).float())}
    return LossOutput(config.beta * mean_kl - mean(surrogate), parts)


def clause_loss(answers: Sequence[RoleLogps], config: LossConfig) -> LossOutput:
    """Compute the loss of marked clauses, after fine-grained DPO (FDPO, arXiv 2308.06394).

    The mean over the marked clauses of a comparison's answers of -log sigmoid(h beta log(pi / ref)), with h = 1 for a
    right and -1 for a wrong clause, and log-ratios summed over the clause's tokens.

    Args:
        answers: the chosen and the rejected answers of B comparisons.
        config: beta.

    Returns:
        (B,) loss, 0 without a marked clause. Parts besides it: numbers of marked clauses, and of those whose likelihood
        moved in their direction, whose means over examples may be divided.
    """
    rewards, signs = [], []
    for one in answers:
        assert one.tokens is not None and one.clauses is not None, (
            "a loss of clauses has per_token, and its examples marks"
        )
        log_ratio = (one.tokens.policy - one.tokens.reference).unsqueeze(1)
        rewards.append(config.beta * (log_ratio * one.clauses.tokens).sum(-1))
        signs.append(one.clauses.signs)
    reward, sign = torch.cat(rewards, dim=1), torch.cat(signs, dim=1)
    is_marked = sign != 0
    count = is_marked.sum(-1).clamp(min=1)
    loss = (is_marked * -F.logsigmoid(sign * reward)).sum(-1) / count
    parts = {"clauses": is_marked.sum(-1).float(), "clauses_moved": (sign * reward > 0).sum(-1).float()}
    return LossOutput(loss, {"clause": loss, **parts})


def nash_loss(ratios: LogRatios, config: LossConfig) -> Tensor:
    """Compute the regression of online IPO (EGPO, arXiv 2503.08942) on differences of win rates, with sums over tokens.

    The fixed point of repeated rounds is the policy that no other beats in the regularized game, whether or not a score
    explains the preferences. A margin of 0.5 at a hard label is IPO.
    """
    assert ratios.margins is not None, "examples of this loss have margins"
    return (ratios.chosen - ratios.rejected - ratios.margins / config.beta) ** 2


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
    "nash": nash_loss,
}


# Losses of the difference of the two log-ratios alone, so that a constant in both has no effect.
DIFFERENCE_LOSSES: tuple[LossName, ...] = ("sigmoid", "robust", "nash")
# Losses that are sums over the two captions, so that a caption can be trained on alone.
UNPAIRED_LOSSES: tuple[LossName, ...] = ("bco_pair", "kto")


def make_loss(config: LossConfig) -> PreferenceLoss:
    """Build the loss that the configuration names."""
    reference_roles: tuple[Role, ...] = ("sample",) if config.kind == "grpo" else ("chosen", "rejected")
    if config.kind == "kto":
        reference_roles += ("mismatched",)
    roles: tuple[Role, ...] = (*reference_roles, "ground_truth") if config.ce_weight else reference_roles
    compute = partial(guided_loss, config=config)
    per_token = config.kind == "grpo" or config.per == "clause"
    return PreferenceLoss(compute, roles, reference_roles, per_token=per_token)


def guided_loss(logps: Mapping[Role, RoleLogps], config: LossConfig) -> LossOutput:
    """Compute a loss of pairs or groups plus cross-entropy on the ground truth, which preserves the language.

    For "sigmoid", the loss of guided DPO (arXiv 2410.06682):

    -log sigmoid(beta * [log(pi/ref)(chosen) - log(pi/ref)(rejected)]) + ce_weight * CE(ground truth)

    CE is the mean over the tokens of the ground truth. Rewards are beta * log(pi / ref).

    Args:
        logps: log-probabilities by role, those of `make_loss(config).roles`.
        config: kind of loss, and weights.
    """
    output = grpo_loss(logps["sample"], config) if config.kind == "grpo" else _pair_loss(logps, config)
    loss, parts = output.loss, {"grpo": output.loss} if config.kind == "grpo" else {}
    if config.ce_weight:
        # An example without a ground truth has an empty one, whose cross-entropy is 0.
        parts["ce"] = -logps["ground_truth"].policy / logps["ground_truth"].num_tokens.clamp(min=1)
        loss = loss + config.ce_weight * parts["ce"]
    return LossOutput(loss, {name: part.detach() for name, part in (parts | output.parts).items()})


def _pair_loss(logps: Mapping[Role, RoleLogps], config: LossConfig) -> LossOutput:
    """Compute the loss of pairs that the configuration names, and rewards and margin for the log."""
    mismatched = logps["mismatched"].log_ratio if config.kind == "kto" else None
    ratios = LogRatios(
        logps["chosen"].log_ratio,
        logps["rejected"].log_ratio,
        logps["chosen"].num_tokens,
        logps["rejected"].num_tokens,
        mismatched,
        logps["chosen"].margins,
    )
    loss = PAIR_LOSSES[config.kind](ratios, config)
    parts = {"dpo": loss}
    if config.per == "clause":
        output = clause_loss([logps["chosen"], logps["rejected"]], config)
        loss, parts = loss + output.loss, parts | output.parts
    chosen, rejected = config.beta * ratios.chosen, config.beta * ratios.rejected
    parts |= {
        "chosen": chosen,
        "rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
        "chosen_drift": chosen / config.beta,
        "rejected_drift": rejected / config.beta,
    }
    return LossOutput(loss, parts)


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
