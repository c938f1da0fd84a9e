"""Influence of a caption on a student: how much training on it would improve the student on other reference captions.

ARTE (arXiv 2406.19227) teaches a student what it learns most from. Montessori-Instruct (arXiv 2410.14208) measures that
by one training step: to first order, a step on a caption lowers another loss by the inner product of the two gradients.

    influence(draft) = <grad of the loss on the preference clips, grad of the loss on the draft>

Both are over the student's fresh adapter, and the losses are means over tokens. The inner product is the derivative of
the draft's loss in the direction of the first gradient, so two forward passes give it for all drafts of a clip at once.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import PromptRow
from salmonn.model.network import Network
from salmonn.preference.rating import Rating
from salmonn.records import Caption
from salmonn.train.batches import map_batches
from salmonn.train.data import ClipSet
from salmonn.train.parallel import trainable_parameters
from salmonn.train.run_folder import load_or_create

INFLUENCE_NAME = "influence.jsonl"
# A step along the gradient that would change the loss on the preference clips by this many nats per token, to first
# order: small enough for the losses to be linear, large enough for their differences not to be rounding.
STEP_NATS = 0.02


@dataclass(frozen=True)
class Influence:
    """Influence of one draft on the student; `value` is in nats per token for a step of size 1."""

    video: str
    sample: int
    value: float


def split_clips(clips: ClipSet, fraction: float, *, seed: int) -> tuple[ClipSet, ClipSet]:
    """Split clips at random into the preference clips, a fraction of them, and the others.

    Raises:
        ValueError: one part would be empty.
    """
    count = round(fraction * len(clips.references))
    if not 0 < count < len(clips.references):
        raise ValueError(
            f"rebirth.preference_fraction {fraction} of {len(clips.references)} clips leaves {count} preference clips; "
            "it needs at least one, and at least one other clip"
        )
    chosen = set(random.Random(seed).sample(range(len(clips.references)), count))
    parts = (
        [one for index, one in enumerate(clips.references) if (index in chosen) == is_preference]
        for is_preference in (True, False)
    )
    preference, others = (replace(clips, references=part) for part in parts)
    return preference, others


def rate_by_influence(
    drafts: Sequence[Caption], clips: ClipSet, preference: ClipSet, student: Captioner, *, batch_size: int, folder: Path
) -> list[Rating]:
    """Rate drafts by their influence in standard deviations above the mean of all, or load an earlier run's influences.

    Args:
        drafts: captions of the clips.
        clips: clips that the student would learn from.
        preference: clips on whose reference captions it is to become better.
        student: model with a fresh adapter; its gradient checkpointing is used.
        batch_size: captions of a forward pass.
        folder: folder of the stage, which gets the influences.
    """
    influences = load_or_create(
        folder / INFLUENCE_NAME,
        Influence,
        lambda: compute_influences(drafts, clips, preference, student, batch_size=batch_size),
    )
    values = np.array([one.value for one in influences])
    scores = (values - values.mean()) / max(float(values.std()), 1e-12)
    return [
        Rating(one.video, {"influence": float(score)}, {"influence": 1.0}, one.sample)
        for one, score in zip(influences, scores, strict=True)
    ]


def compute_influences(
    drafts: Sequence[Caption], clips: ClipSet, preference: ClipSet, student: Captioner, *, batch_size: int
) -> list[Influence]:
    """Compute the influence of each draft; see `rate_by_influence`."""
    network, prompt = student.network, student.default_prompt()
    network.train()  # layers are only checkpointed in training
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # dropout would count as an influence
    direction = _mean_gradient(preference, student, batch_size=batch_size)
    network.eval()
    start = {name: one.detach().clone() for name, one in trainable_parameters(network)}
    step = STEP_NATS / float(sum(part.square().sum() for part in direction.values()))
    by_video: dict[str, list[int]] = {}
    for index, draft in enumerate(drafts):
        by_video.setdefault(draft.video, []).append(index)
    groups = list(by_video.items())

    def losses(number: int) -> Tensor:
        """Return the cross-entropy of the drafts of a clip, in nats per token."""
        video, indices = groups[number]
        rows = [PromptRow(0, prompt, drafts[index].text, finished=drafts[index].finished) for index in indices]
        inputs = student.processor.collate(rows, [clips.features_of(clips.by_video[video])]).to(network.device)
        # A draft that was cut off before its first word has no token, and no influence.
        return -network(inputs).double().sum(-1) / (inputs.labels[:, 1:] != -100).sum(-1).clamp(min=1)

    def influences(number: int) -> list[Influence]:
        with torch.no_grad():
            _move(network, start, direction, step)
            above = losses(number)
            _move(network, start, direction, -step)
            below = losses(number)
            _move(network, start, direction, 0)
        values = ((above - below) / (2 * step)).tolist()
        return [
            Influence(drafts[index].video, drafts[index].sample, value)
            for index, value in zip(groups[number][1], values, strict=True)
        ]

    batches = [indices for _, indices in groups]
    costs = [sum(len(drafts[index].text.split()) for index in indices) for indices in batches]
    return map_batches(influences, batches, costs, name="influence", unit="caption")


def _mean_gradient(clips: ClipSet, student: Captioner, *, batch_size: int) -> dict[str, Tensor]:
    """Return the gradient of the mean cross-entropy of the clips' reference captions, by parameter."""
    network, prompt = student.network, student.default_prompt()
    parameters = dict(trainable_parameters(network))
    mine, count = dist.shard(clips.references), 0
    network.zero_grad()
    for start in range(0, len(mine), batch_size):
        part = mine[start : start + batch_size]
        rows = [PromptRow(index, prompt, reference.caption) for index, reference in enumerate(part)]
        inputs = student.processor.collate(rows, [clips.features_of(one) for one in part]).to(network.device)
        (-network(inputs).sum()).backward()
        count += int((inputs.labels[:, 1:] != -100).sum())
    total = dist.all_reduce_sum(count)
    summed: dict[str, Tensor] = {}
    gradients = {
        name: torch.zeros_like(one, device="cpu") if one.grad is None else one.grad.cpu()
        for name, one in parameters.items()
    }
    for of_rank in dist.gather([gradients]):
        summed = {name: summed[name] + part if summed else part for name, part in of_rank.items()}
    network.zero_grad()
    return {name: part.to(network.device) / total for name, part in summed.items()}


def _move(network: Network, start: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float) -> None:
    """Set the parameters to start + step * direction."""
    for name, parameter in trainable_parameters(network):
        parameter.copy_(start[name] + step * direction[name])


def shuffle_ratings(ratings: Sequence[Rating], *, seed: int) -> list[Rating]:
    """Exchange the ratings of each clip's drafts at random: a control in which clips differ as much as by influence."""
    generator = random.Random(seed)
    by_video: dict[str, list[Rating]] = {}
    for rating in ratings:
        by_video.setdefault(rating.video, []).append(rating)
    shuffled = {video: iter(generator.sample(group, len(group))) for video, group in by_video.items()}
    return [replace(next(shuffled[rating.video]), sample=rating.sample) for rating in ratings]


def best_captions(drafts: Sequence[Caption], ratings: Sequence[Rating]) -> list[Caption]:
    """Return the draft of each clip with the highest rating, in the order of the clips; ties go to the first.

    Drafts that are empty or were cut off at the token limit are only chosen where a clip has no other: the student
    learns a draft with its end.
    """
    best: dict[str, tuple[tuple[bool, float], Caption]] = {}
    for draft, rating in zip(drafts, ratings, strict=True):
        rank = bool(draft.text.strip()) and draft.finished, rating.value
        if draft.video not in best or rank > best[draft.video][0]:
            best[draft.video] = rank, draft
    return [draft for _, draft in best.values()]
