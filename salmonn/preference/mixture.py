"""The ideal-point reward model on disk: its head for one mixture of prototypes, and the fitted raters.

A folder of this kind also holds raters.jsonl, a `Rater` for each person who voted. Its head rates for the mean rater
until other weights are chosen: those of a rater, of a prototype alone, or of a new rater.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from salmonn.files import read_records
from salmonn.model.pooling import AnswerStates
from salmonn.preference.agreement import OrderedVotes
from salmonn.preference.ideal_point import (
    Encoded,
    Form,
    HeldoutAccuracy,
    IdealPointConfig,
    IdealPointHead,
    Votes,
    fit_new_rater,
)

RATERS_NAME = "raters.jsonl"
Prototype = int | Literal["worst"]  # a number from 1, or all prototypes by `WorstHead`


@dataclass(frozen=True)
class Rater:
    """A rater of an ideal-point reward model.

    Args:
        rater: id, as in the votes; "" for all votes without one.
        weights: weight of each prototype; they sum to 1.
        num_votes: votes that the weights are fitted to.
        num_heldout: those of them that a model was measured on that had not been fitted to their clips.
        agreement: share of these that it predicted; None without any.
    """

    rater: str
    weights: tuple[float, ...]
    num_votes: int
    num_heldout: int = 0
    agreement: float | None = None


@dataclass(frozen=True)
class PrototypeInfo:
    """The prototypes of an ideal-point reward model.

    Args:
        form, dim, hidden: form and sizes, see `IdealPointConfig`.
        prompt_width: size of the prompts' states.
        sizes: mean weight of each prototype over all raters, the largest first.
        entropy: how mixed the raters are on average, from 0 (one prototype each) to 1 (all equally).
        descriptions: what each prototype rewards, such as "words -0.9".
        candidates: accuracy of the numbers of prototypes that were compared; empty if the number was given.
        agreement: for each prototype's reward, how it orders the held-out votes of each group of raters (see
            `RaterGroup`), K of K; empty if it was not measured, as by earlier versions.
        means, stds: of each prototype's rewards of the training clips' captions; empty in folders of earlier versions.
    """

    form: Form
    dim: int
    hidden: int
    prompt_width: int
    sizes: tuple[float, ...]
    entropy: float
    descriptions: tuple[str, ...] = ()
    candidates: tuple[HeldoutAccuracy, ...] = ()
    agreement: tuple[tuple[OrderedVotes, ...], ...] = ()
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()


@dataclass(frozen=True)
class RaterGroup:
    """The raters who have more of one prototype than of any other.

    Args:
        description: what the prototype rewards.
        size: mean weight of the prototype over all raters.
        num_raters: number of raters of the group.
        num_heldout: their votes on held-out clips.
        agreement: share of these votes that the rewards of their raters predict; None without any.
        ordered: how the prototype's reward orders the held-out votes of each group, this one among them; empty if it
            was not measured.
    """

    description: str
    size: float
    num_raters: int
    num_heldout: int
    agreement: float | None
    ordered: tuple[OrderedVotes, ...] = ()


def group_raters(info: PrototypeInfo, raters: Sequence[Rater]) -> list[RaterGroup]:
    """Return the group of each prototype, in their order."""
    groups, descriptions = [], info.descriptions or [""] * len(info.sizes)
    for number, (size, description) in enumerate(zip(info.sizes, descriptions, strict=True)):
        own = [one for one in raters if max(range(len(one.weights)), key=one.weights.__getitem__) == number]
        num_heldout = sum(one.num_heldout for one in own)
        predicted = sum((one.agreement or 0.0) * one.num_heldout for one in own)
        agreement = predicted / num_heldout if num_heldout else None
        ordered = info.agreement[number] if info.agreement else ()
        groups.append(RaterGroup(description, size, len(own), num_heldout, agreement, ordered))
    return groups


class MixtureHead(nn.Module):
    """Reward for one mixture of prototypes.

    Args:
        head: the prototypes.
        weights: (K,) weights in the simplex.
    """

    weights: Tensor

    def __init__(self, head: IdealPointHead, weights: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("weights", weights.clone())

    def encode(self, states: AnswerStates) -> Encoded:
        """Return what the reward of any mixture is computed from."""
        encoded: Encoded = self.head(states.answer.to(self.weights), states.prompt.to(self.weights))
        return encoded

    def forward(self, states: AnswerStates) -> Tensor:
        """Return the rewards (B,)."""
        return self.head.reward(self.encode(states), self.weights)

    def fit_rater(self, parts: Sequence[Encoded], votes: Votes) -> "MixtureHead":
        """Return the head for one new rater; without votes, its weights are those of this head.

        Args:
            parts: the encoded captions; rows follow each other.
            votes: the rater's votes; the ids in them are ignored.
        """
        if not len(votes):
            return self
        encoded = Encoded.join(parts)
        weights = fit_new_rater(self.head, encoded.rows(votes.better), encoded.rows(votes.worse), self.weights)
        return MixtureHead(self.head, weights)


class WorstHead(nn.Module):
    """Smallest of the standardized rewards of all prototypes: min over k of (r_k(x) - mean_k) / std_k.

    A policy that raises it serves the group that is served worst, after MaxMin-RLHF (Chakraborty et al., arXiv
    2402.08925). There the minimum is over the groups' mean rewards of a policy; here it is over those of a single
    caption, whose mean is never larger, so that captions can be compared. Votes only compare captions of one clip, and
    do not fix the level of r_k from clip to clip, which may decide which prototype's reward is the smallest.

    Args:
        head: the prototypes.
        means, stds: of each prototype's rewards, K each.
    """

    means: Tensor
    stds: Tensor

    def __init__(self, head: IdealPointHead, means: Sequence[float], stds: Sequence[float]) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("stds", torch.tensor(stds, dtype=torch.float64))

    def forward(self, states: AnswerStates) -> Tensor:
        """Return the rewards (B,)."""
        rewards = self.head.prototype_rewards(self.head(states.answer.to(self.means), states.prompt.to(self.means)))
        return ((rewards - self.means) / self.stds).amin(-1)


def make_mixture(info: PrototypeInfo, width: int) -> MixtureHead:
    """Return a head of these sizes whose weights are still to be loaded."""
    config = IdealPointConfig(form=info.form, dim=info.dim, hidden=info.hidden)
    head = IdealPointHead(width, info.prompt_width, num_prototypes=len(info.sizes), config=config)
    return MixtureHead(head, torch.tensor(info.sizes))


def choose_weights(
    folder: Path, info: PrototypeInfo | None, *, rater: str | None = None, prototype: Prototype | None = None
) -> Tensor | None:
    """Return the weights (K,) of a rater or of a prototype; None for neither, and for the worst of all prototypes.

    Raises:
        ValueError: both are given, there is no such rater or prototype, or the model has one reward for all, or no
            scales for "worst".
    """
    if rater is None and prototype is None:
        return None
    if rater is not None and prototype is not None:
        raise ValueError("a reward is that of a rater or of a prototype: leave out one of them")
    if info is None:
        raise ValueError(f"{folder} has one reward for all: train with --kind ideal-point to distinguish raters")
    if prototype == "worst":
        if not info.stds:
            raise ValueError(f"{folder} has no scales of the prototypes, which worst needs: train it again")
        return None
    if prototype is not None:
        if not 1 <= prototype <= len(info.sizes):
            raise ValueError(f"{folder} has {len(info.sizes)} prototypes, counted from 1; got {prototype}")
        return torch.eye(len(info.sizes))[prototype - 1]
    raters = {one.rater: one for one in read_records(folder / RATERS_NAME, Rater)}
    if rater not in raters:
        raise ValueError(
            f"{folder} knows no rater {rater!r}: {RATERS_NAME} lists them; a new one is fitted to a file of votes"
        )
    return torch.tensor(raters[rater].weights)
