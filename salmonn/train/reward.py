"""Training of reward models: states of all answers, the exact fit of a linear head, then LoRA and head together.

A linear head on the captioner's frozen states is a convex problem and takes seconds. Fine-tuning starts from it, so
that a random head does not disturb the decoder first (arXiv 2202.10054). Some clips are held out; they give the
agreement with the source, and the temperature.

Text alone orders most pairs: better captions claim other things. So a *blind* twin is trained and evaluated with the
features of other clips, and only the reward model's advantage over it comes from looking at the clip.
"""

import gc
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.model.fingerprint import hash_model
from salmonn.model.layout import ClipFeatures
from salmonn.model.lora import LoraConfig, attach_lora, load_adapter, merge_adapter, save_adapter
from salmonn.model.pooling import AnswerStates, Pooling
from salmonn.preference.agreement import measure_agreement
from salmonn.preference.claims import sum_clauses
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.heads import Head, ObjectiveHead, ScalarHead, fit_temperature, join_pairs
from salmonn.preference.losses import bradley_terry_loss
from salmonn.preference.objectives import OBJECTIVES
from salmonn.preference.reward_model import (
    ADAPTER_DIR,
    HEAD_NAME,
    RewardInfo,
    RewardKind,
    save_head,
    save_reward_model,
)
from salmonn.train.checkpoint import checkpointed, load_trained
from salmonn.train.data import ClipSource, ModelBatch, batch_at, split_evenly
from salmonn.train.loop import FitConfig, FitContext, fit
from salmonn.train.parallel import StrategyName
from salmonn.train.reward_heads import ObjectiveConfig, fit_claims, fit_ensemble, fit_head, fit_objective_head
from salmonn.train.reward_states import STATES_NAME, RewardExample, compute_states
from salmonn.train.run_folder import is_missing

log = logging.getLogger(__name__)
BLIND_DIR = "blind"


@dataclass(frozen=True)
class RewardTrainingConfig:
    """Training of a reward model.

    Args:
        kind: "bradley-terry" gives each caption a reward, "pairwise" reads two captions at once, "claims" adds up the
            credits of a caption's clauses, learned from the quotes of a judge, "objectives" predicts named objectives
            and weighs them, and "ideal-point" distinguishes raters (docs/raters.md).
        pooling: states that the head reads (docs/reward.md).
        objectives: objectives and their weights, for that kind.
        l2: weight of the squared norm of the linear head's standardized weights.
        center_weight: weight of the term that keeps rewards near 0.
        lora: adapter to train together with the head; none keeps the captioner frozen.
        fit: optimization of adapter and head; its batches are clips with all their captions.
        ensemble: number of further linear heads, each fitted to clips drawn with replacement, whose disagreement is the
            spread of a rating; 0 for none. They read the same states and take seconds. Only with kind bradley-terry or
            claims.
        heldout_fraction: fraction of the clips that are held out.
        blind: also train the blind twin, which costs as much again.
    """

    kind: RewardKind = "bradley-terry"
    pooling: Pooling = "rich"
    objectives: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    l2: float = 0.1
    center_weight: float = 0.01
    lora: LoraConfig | None = None
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(learning_rate=2e-4, steps=None, epochs=1.0, batch_size=8, weight_decay=0.0)
    )
    ensemble: int = 0
    heldout_fraction: float = 0.2
    blind: bool = True

    def __post_init__(self) -> None:
        if self.l2 <= 0 or self.center_weight < 0:
            raise ValueError(f"l2 must be above 0 and center_weight at least 0, got {self.l2} and {self.center_weight}")
        if self.kind == "objectives" and self.lora:
            raise ValueError("kind objectives is fitted to frozen states; remove lora, or use kind bradley-terry")
        if self.ensemble and (self.ensemble < 2 or self.kind not in ("bradley-terry", "claims")):
            raise ValueError(
                "an ensemble has at least 2 heads of kind bradley-terry or claims, got "
                f"{self.ensemble} of kind {self.kind}"
            )
        if (self.kind == "claims") != (self.pooling == "clauses"):
            raise ValueError(
                "kind claims and pooling clauses belong together: set both or neither, got "
                f"kind {self.kind} and pooling {self.pooling}"
            )
        if self.kind == "claims" and self.lora:
            raise ValueError("kind claims is fitted to frozen states; remove lora, or use kind bradley-terry")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction must be between 0 and 1, got {self.heldout_fraction}")


@dataclass(frozen=True)
class RewardBatch(ModelBatch):
    """A micro-batch of clips with all their answers.

    Args:
        inputs: inputs of the model, one row for each answer.
        pairs: (N, 2) rows of the better and the worse answer.
        weights: (N,) weight of each pair: those of a clip sum to 1.
        mean_num_examples: number of clips of the whole step, divided by the number of ranks.
        clips: names of the clips, for error messages.
    """

    pairs: Tensor
    weights: Tensor
    mean_num_examples: float
    clips: tuple[str, ...]


@dataclass(frozen=True)
class RewardBatches:
    """Batches of clips with all their answers, in a new seeded order each epoch."""

    examples: Sequence[RewardExample]
    processor: Processor
    config: FitConfig
    seed: int

    def micro_batches(self, step: int) -> list[RewardBatch]:
        """Return this rank's micro-batches of a step."""
        batch = batch_at(self.examples, step, batch_size=self.config.batch_size, seed=self.seed)
        micro_batches = []
        for part in split_evenly(dist.shard(batch), self.config.gradient_accumulation_steps):
            rows = [row for clip, example in enumerate(part) for row in example.rows(clip=clip)]
            inputs = self.processor.collate(rows, [example.features for example in part])
            pairs, weights = join_pairs([example.group for example in part])
            names = tuple(example.group.example.video for example in part)
            micro_batches.append(RewardBatch(inputs, pairs, weights, len(batch) / dist.world_size(), names))
        return micro_batches


@dataclass(frozen=True)
class RewardBatchLoss:
    """Bradley-Terry loss on micro-batches: their share of the mean over the step's clips.

    Args:
        pooling, center_weight: see `RewardTrainingConfig`.
        center: reward that the rewards are kept near: the mean at the start, since a head has no bias.
    """

    pooling: Pooling
    center_weight: float
    center: float = 0.0

    def __call__(self, model: nn.Module, batch: RewardBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss, and its parts for the log."""
        rewards = model(batch.inputs.to(dist.device()), pooling=self.pooling).float() - self.center
        better, worse = rewards[batch.pairs.to(rewards.device)].unbind(1)
        output = bradley_terry_loss(better, worse, center_weight=self.center_weight)
        weights = batch.weights.to(rewards) / batch.mean_num_examples
        parts = {name: float((weights * part).sum()) for name, part in output.parts.items()}
        return (weights * output.loss).sum(), parts


def split_groups(
    groups: Sequence[AnswerGroup], *, fraction: float, seed: int
) -> tuple[list[AnswerGroup], list[AnswerGroup]]:
    """Split groups into those to learn from and held-out ones; all groups of a video are on one side.

    Raises:
        ValueError: there are fewer than two videos.
    """
    videos = sorted({group.example.video for group in groups})
    if len(videos) < 2:
        raise ValueError(
            f"a reward model needs comparisons of at least 2 videos, got {len(videos)}: agreement is measured on "
            "videos that it does not learn from"
        )
    random.Random(seed).shuffle(videos)
    heldout = set(videos[: min(max(1, round(fraction * len(videos))), len(videos) - 1)])
    return (
        [group for group in groups if group.example.video not in heldout],
        [group for group in groups if group.example.video in heldout],
    )


def rotate_features(features: Mapping[ClipSource, ClipFeatures]) -> dict[ClipSource, ClipFeatures]:
    """Return for each clip the features of the next one of another video, by name, for the blind twin."""
    clips = sorted(features, key=str)
    rotated = {}
    for number, clip in enumerate(clips):
        following = (clips[(number + offset) % len(clips)] for offset in range(1, len(clips)))
        rotated[clip] = features[next(one for one in following if one.video != clip.video)]
    return rotated


@dataclass(frozen=True)
class FittedReward:
    """A trained head with the rewards (R,) that it gives the answers of each clip, learned and held-out ones."""

    head: Head
    train: list[Tensor]
    heldout: list[Tensor]


@dataclass(frozen=True)
class RewardTrainer:
    """Trains a reward model and its blind twin.

    Args:
        load: loads the base model.
        config: kind and optimization.
        folder: folder of states, steps, checkpoints and adapter.
        seed: random seed.
        strategy: distribution over processes.
        max_words: number of words from which the objective `length` is 1, of groups with objectives.
    """

    load: Callable[[], Captioner]
    config: RewardTrainingConfig
    folder: Path
    seed: int = 0
    strategy: StrategyName = "ddp"
    max_words: float | None = None

    def train(
        self, groups: Sequence[AnswerGroup], features: Mapping[ClipSource, ClipFeatures], *, root: Path
    ) -> RewardInfo:
        """Train, measure and save a reward model; returns what reward.json holds.

        Args:
            groups: comparisons, grouped by clip.
            features: features of their clips.
            root: folder that the paths of the videos start from.

        Raises:
            ValueError: the comparisons are of one video only.
        """
        train, heldout = split_groups(groups, fraction=self.config.heldout_fraction, seed=self.seed)
        info, fitted = self._fit(train, heldout, features, root=root, folder=self.folder)
        blind = None
        if self.config.blind:
            others = rotate_features(features)
            blind = self._fit(train, heldout, others, root=root, folder=self.folder / BLIND_DIR)[1]
        margins = _margins(fitted.heldout, self._arrange(heldout))
        mean, std = self._scale(fitted.train, train)
        info = replace(
            info,
            mean=mean,
            std=std,
            temperature=fit_temperature(margins),
            agreement=measure_agreement(
                heldout, margins, _margins(blind.heldout, self._arrange(heldout)) if blind else None
            ),
        )
        if dist.is_main():
            save_reward_model(self.folder, fitted.head, info)
        dist.barrier()
        return info

    def make_info(
        self, captioner: Captioner, train: Sequence[AnswerGroup], heldout: Sequence[AnswerGroup]
    ) -> RewardInfo:
        """Return what reward.json says of kind, base and data, before anything is trained."""
        examples = [group.example for group in (*train, *heldout)]
        return RewardInfo(
            self.config.kind,
            self.config.pooling,
            captioner.name,
            dist.gather([hash_model(captioner.network) if dist.is_main() else ""])[0],
            frames=captioner.processor.frames,
            reader=captioner.processor.reader,
            modalities=tuple(sorted({example.modality for example in examples})),
            source=", ".join(sorted({example.source for example in examples})),
            num_comparisons=sum(len(group.pairs) for group in train),
            num_clips=len(train),
        )

    def _arrange(self, groups: Sequence[AnswerGroup]) -> list[AnswerGroup]:
        """Return groups as the kind of model reads them."""
        return [group.to_pairwise() for group in groups] if self.config.kind == "pairwise" else list(groups)

    def _fit(
        self,
        train: Sequence[AnswerGroup],
        heldout: Sequence[AnswerGroup],
        features: Mapping[ClipSource, ClipFeatures],
        *,
        root: Path,
        folder: Path,
    ) -> tuple[RewardInfo, FittedReward]:
        """Fit a head to frozen states, then fine-tune it with an adapter if there is one.

        Without an adapter the held-out clips are learned from, too, after they have been rated by the head that was not
        fitted to them.
        """
        groups = self._arrange([*train, *heldout])
        examples = [
            RewardExample(group, features[ClipSource.of_comparison(group.example, root=root)]) for group in groups
        ]
        captioner, config = self.load(), self.config
        name, count, info = folder.name, len(train), self.make_info(captioner, train, heldout)
        states = compute_states(
            captioner, examples, pooling=config.pooling, name=f"{name}: states", path=folder / STATES_NAME
        )
        head, fitted = self._fit_frozen(states[:count], groups[:count]), count
        if config.lora:
            assert isinstance(head, ScalarHead)
            with torch.no_grad():
                center = float(torch.cat([head(one) for one in states[:count]]).mean())
            captioner, head = self._tune(captioner, head, examples[:count], center=center, folder=folder)
            states = compute_states(captioner, examples, pooling=config.pooling, name=f"{name}: tuned states")
        read = states
        if config.kind == "claims":
            read = [sum_clauses(one, group.answers) for one, group in zip(states, groups, strict=True)]
        with torch.no_grad():
            rewards = [head.double()(one) for one in read]
        if not config.lora:
            head, fitted = self._fit_frozen(states, groups).double(), len(groups)
            with torch.no_grad():
                rewards[:count] = [head(one) for one in read[:count]]
        if config.ensemble and folder == self.folder:  # the blind twin needs none
            assert isinstance(head, ScalarHead)
            head.ensemble = fit_ensemble(
                states[:fitted],
                groups[:fitted],
                fit=self._fit_frozen,
                answers=torch.cat([one.answer for one in read[:fitted]]).double(),
                count=config.ensemble,
                seed=self.seed,
            ).double()
            info = replace(info, ensemble=config.ensemble)
        widths = head.gate_widths if isinstance(head, ObjectiveHead) else ()
        requests = sorted({group.example.prompt for group in groups[:fitted]}) if len(widths) > 1 else []
        info = replace(
            info,
            gate_widths=widths,
            objectives=OBJECTIVES if widths else (),
            max_words=self.max_words if widths else None,
            requests=tuple(requests) if len(requests) > 1 else (),
        )
        return info, FittedReward(head, rewards[:count], rewards[count:])

    def _fit_frozen(self, states: Sequence[AnswerStates], groups: Sequence[AnswerGroup]) -> Head:
        """Fit a head of the configured kind to frozen states."""
        if self.config.kind == "objectives":
            return fit_objective_head(states, groups, self.config.objectives)
        if self.config.kind == "claims":
            return fit_claims(states, groups)
        return fit_head(states, groups, l2=self.config.l2, center_weight=self.config.center_weight)

    def _tune(
        self, captioner: Captioner, head: ScalarHead, examples: Sequence[RewardExample], *, center: float, folder: Path
    ) -> tuple[Captioner, ScalarHead]:
        """Train an adapter and the head, or load those of a run that was killed later.

        Returns:
            The model with the adapter merged, and the trained head.
        """
        config, lora = self.config, self.config.lora
        assert lora is not None
        if not is_missing(folder / HEAD_NAME):  # written after the adapter
            load_adapter(captioner.network, folder / ADAPTER_DIR)
            with torch.no_grad():
                head.score.weight.copy_(load_file(folder / HEAD_NAME)["score.weight"])
            merge_adapter(captioner.network)
            return captioner, head.requires_grad_(False)

        def attach(model: Captioner, own: ScalarHead) -> None:
            attach_lora(model.network, lora, seed=self.seed)
            model.network.head = own.to(model.network.device)

        attach(captioner, head)
        batches = RewardBatches(examples, captioner.processor, config.fit, self.seed)
        loss = RewardBatchLoss(config.pooling, config.center_weight, center)
        context = FitContext(f"{folder.name}: reward model", folder, self.seed, self.strategy)
        with checkpointed(folder):
            checkpoint = fit(captioner.network, batches, loss, config.fit.resolve(len(examples)), context=context)
            # The strategy has taken the network apart, and a GPU may hold only one.
            del captioner.network, batches
            gc.collect()  # it is part of reference cycles
            tuned, trained = self.load(), ScalarHead(head.score.in_features)
            attach(tuned, trained)
            load_trained(tuned.network, checkpoint)
            if dist.is_main():
                save_adapter(tuned.network, folder / ADAPTER_DIR)
                save_head(folder, trained)
            dist.barrier()
        tuned.network.head = None
        merge_adapter(tuned.network)
        return tuned, trained.cpu().requires_grad_(False)

    def _scale(self, rewards: Sequence[Tensor], groups: Sequence[AnswerGroup]) -> tuple[float, float]:
        """Return mean and standard deviation of the rewards of the training clips' captions."""
        if self.config.kind == "pairwise":
            rewards = [_mean_log_odds(one, group) for one, group in zip(rewards, groups, strict=True)]
        std, mean = torch.std_mean(torch.cat(list(rewards)))
        return (0.0 if self.config.kind == "pairwise" else float(mean)), max(float(std), 1e-6)


def _mean_log_odds(values: Tensor, group: AnswerGroup) -> Tensor:
    """Return the mean log-odds of each answer against those that it was compared with, from a pairwise model's rows."""
    sums, counts = torch.zeros(len(group.answers)), torch.zeros(len(group.answers))
    for number, (better, worse) in enumerate(group.pairs):
        log_odds = values[2 * number] - values[2 * number + 1]
        for answer, sign in ((better, 1), (worse, -1)):
            sums[answer] += sign * float(log_odds)
            counts[answer] += 1
    return sums / counts


def _margins(rewards: Sequence[Tensor], groups: Sequence[AnswerGroup]) -> Tensor:
    """Return the reward of the better answer minus that of the worse, of all comparisons of groups, (N,)."""
    pairs, _ = join_pairs(groups)
    better, worse = torch.cat(list(rewards))[pairs].unbind(1)
    return better - worse
