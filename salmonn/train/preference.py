"""Training on preference pairs: their batches, the reference policy's log-probabilities, and the guided-DPO loss."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.processor import Processor, PromptRow
from salmonn.model.layout import ClipFeatures, ModelInputs
from salmonn.model.lora import adapter_disabled
from salmonn.model.network import Network
from salmonn.preference.losses import guided_dpo_loss, mean_cross_entropy, sequence_logps
from salmonn.records import Comparison, read_json, write_json
from salmonn.train.data import SftBatch, SftBatches, batch_at, sft_loss, split
from salmonn.train.feature_cache import hash_features, hash_tokenizer, hash_values, hash_weights

log = logging.getLogger(__name__)
REFERENCE_LOGPS_NAME = "reference_logps.json"


@dataclass(frozen=True)
class DpoConfig:
    """Guided DPO (arXiv 2410.06682).

    Args:
        beta: strength of the tie to the reference policy.
        ce_weight: weight of the cross-entropy on the ground-truth caption; 0 is plain DPO.
        kl_every: steps between two measurements of how far the policy has moved.
    """

    beta: float = 0.1
    ce_weight: float = 0.1
    kl_every: int = 10

    def __post_init__(self) -> None:
        if self.kl_every < 1:
            raise ValueError(f"kl_every counts steps and must be at least 1, got {self.kl_every}")


@dataclass(frozen=True)
class PreferenceBatch:
    """P pairs: `inputs` holds 3 P rows (all chosen, all rejected, all ground truths), references are (P,) each.

    `mean_num_pairs` counts the step's pairs of an average rank, `clips` names those of these pairs.
    """

    inputs: ModelInputs
    reference_chosen: Tensor
    reference_rejected: Tensor
    mean_num_pairs: float
    clips: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Of text and clips, that go through the decoder."""
        return self.inputs.num_tokens


class PreferenceBatches:
    """Deals out pairs with what the reference policy says of them.

    Args:
        pairs: all of them, the same on every rank.
        blocks: video -> its clip's block.
        processor: of the model.
        batch_size: pairs a step over all ranks.
        seed: of the order.
        gradient_accumulation_steps: pieces that a rank's part is split into, if it has so many pairs.

    `reference_logps` has the reference policy's log-probabilities of each pair's chosen and rejected answer.
    """

    def __init__(
        self,
        pairs: Sequence[Comparison],
        blocks: Mapping[str, ClipFeatures],
        processor: Processor,
        *,
        batch_size: int,
        seed: int,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        self.pairs = pairs
        self.blocks = blocks
        self.processor = processor
        self.batch_size = batch_size
        self.seed = seed
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.reference_logps: list[tuple[float, float]] = []

    def compute_reference_logps(self, network: Network, *, folder: Path | None = None) -> None:
        """Ask the reference policy, the network with its adapter off, once for every pair; shared over ranks.

        Args:
            network: as it is for all of the training.
            folder: takes reference_logps.json. What is there is used again if all that it depends on
                is as it was and each rank's first batch gives the same once more.
        """
        groups = self._by_clip()
        costs = [len(self.blocks[self.pairs[group[0]].video]) + self._count_words(group) for group in groups]
        shares = dist.balance(costs)
        mine = [place for number in shares[dist.rank()] for place in groups[number]]
        made_of = self._describe(network) if folder else ""
        if (
            folder
            and (kept := _read_kept(folder / REFERENCE_LOGPS_NAME, made_of))
            and self._says_again(network, mine, kept)
        ):
            self.reference_logps = kept
            return
        said = dict(zip(mine, self._ask(network, mine), strict=True))
        parts = dist.gather_balanced(
            [[said[place][:2] for place in groups[number]] for number in shares[dist.rank()]], shares
        )
        placed = dict(zip(itertools.chain(*groups), itertools.chain(*parts), strict=True))
        self.reference_logps = [placed[place] for place in range(len(self.pairs))]
        if folder and dist.is_main():
            write_json(folder / REFERENCE_LOGPS_NAME, {"made_of": made_of, "logps": self.reference_logps})

    def _by_clip(self) -> list[list[int]]:
        """Places of the pairs, those on one clip together: they share its way through the decoder."""
        groups: dict[str, list[int]] = {}
        for place, pair in enumerate(self.pairs):
            groups.setdefault(pair.video, []).append(place)
        return list(groups.values())

    def _count_words(self, places: Sequence[int]) -> int:
        return sum(len(f"{self.pairs[place].chosen} {self.pairs[place].rejected}".split()) for place in places)

    @property
    def _size(self) -> int:
        """Pairs that a process asks the reference about at once: as many as go through it at once in training."""
        return max(1, self.batch_size // (self.gradient_accumulation_steps * dist.world_size()))

    def _ask(self, network: Network, places: Sequence[int]) -> list[tuple[float, float, int]]:
        """Log-probabilities of pairs' chosen and rejected answers, and how many tokens both have."""
        said: list[tuple[float, float, int]] = []
        with adapter_disabled(network), torch.no_grad():
            for start in tqdm(range(0, len(places), self._size), desc="reference", disable=not dist.is_main()):
                part = [self.pairs[place] for place in places[start : start + self._size]]
                videos = list(dict.fromkeys(pair.video for pair in part))
                clips = [videos.index(pair.video) for pair in part]
                rows = [
                    PromptRow(clip, pair.prompt, text, pair.history)
                    for texts in ([pair.chosen for pair in part], [pair.rejected for pair in part])
                    for clip, pair, text in zip(clips, part, texts, strict=True)
                ]
                inputs = self.processor.collate(rows, [self.blocks[video] for video in videos])
                logps = sequence_logps(network(inputs.to(network.device))).cpu().chunk(2)
                counts = (inputs.labels != -100).sum(-1).reshape(2, -1).sum(0)
                said += zip(*(column.tolist() for column in (*logps, counts)), strict=True)
        return said

    def _describe(self, network: Network) -> str:
        """A hash of all that the reference's log-probabilities depend on."""
        videos = list(dict.fromkeys(pair.video for pair in self.pairs))
        digests = dist.gather([hash_features(self.blocks[video]) for video in dist.shard(videos)])
        weights = ((name, value) for name, value in network.named_parameters() if ".lora_" not in name)
        # All ranks have the same weights.
        mark = dist.gather([hash_weights(weights) if dist.is_main() else ""])[0]
        pairs = [(pair.video, pair.prompt, pair.chosen, pair.rejected, pair.history) for pair in self.pairs]
        attention = network.config._attn_implementation
        words = hash_tokenizer(self.processor)
        return hash_values(
            mark, dict(zip(videos, digests, strict=True)), pairs, words, attention, _computed_in(network)
        )

    def _says_again(self, network: Network, mine: Sequence[int], kept: Sequence[tuple[float, float]]) -> bool:
        """Whether each rank's first batch gives what was kept, but for roundings of another device or other batches."""
        gaps = []
        for place, (*said, count) in zip(mine, self._ask(network, mine[: self._size]), strict=False):
            allowed = _allowed(said, count, computed_in=_computed_in(network))
            gaps += [abs(now - before) / allowed for now, before in zip(said, kept[place], strict=True)]
        said_again = all(gap <= 1 for gap in dist.gather(gaps))  # false of what is no number, too
        if not said_again and dist.is_main():
            log.warning("what is kept of the reference policy is off by more than rounding may do: it is asked again")
        return said_again

    def __call__(self, step: int) -> list[PreferenceBatch]:
        """This rank's batch of a step, in pieces."""
        assert len(self.reference_logps) == len(self.pairs), "compute_reference_logps() comes before the first batch"
        numbered = list(enumerate(self.pairs))
        mine = dist.shard(batch_at(numbered, step, batch_size=self.batch_size, seed=self.seed))
        return [self._piece(part) for part in split(mine, self.gradient_accumulation_steps)]

    def _piece(self, numbered: Sequence[tuple[int, Comparison]]) -> PreferenceBatch:
        part = [pair for _, pair in numbered]
        rows = [
            PromptRow(index, pair.prompt, text, pair.history)
            for texts in zip(*((pair.chosen, pair.rejected, pair.ground_truth) for pair in part), strict=True)
            for index, (pair, text) in enumerate(zip(part, texts, strict=True))
        ]
        reference = torch.tensor([self.reference_logps[number] for number, _ in numbered])
        mean_num_pairs = self.batch_size / dist.world_size()
        names = tuple(pair.video for pair in part)
        return PreferenceBatch(self._inputs(part, rows), reference[:, 0], reference[:, 1], mean_num_pairs, names)

    def _inputs(self, pairs: Sequence[Comparison], rows: Sequence[PromptRow]) -> ModelInputs:
        return self.processor.collate(rows, [self.blocks[pair.video] for pair in pairs])


def _read_kept(path: Path, made_of: str) -> list[tuple[float, float]] | None:
    """What the file holds, if it was made of the same; rank 0 alone reads: others may see a shared disk later."""
    kept = None
    if dist.is_main() and path.is_file():
        try:
            values = read_json(path)
            if values["made_of"] == made_of:
                kept = [(chosen, rejected) for chosen, rejected in values["logps"]]
            else:
                log.warning("%s is of other weights, clips, pairs or words: the reference policy is asked again", path)
        except (ValueError, KeyError, TypeError):
            log.warning("%s cannot be read: the reference policy is asked again", path)
    return dist.gather([kept])[0]


def _computed_in(network: Network) -> str:
    """The type that products are computed in."""
    kind = network.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else network.dtype
    return str(dtype).removeprefix("torch.")


def _allowed(logps: Sequence[float], num_tokens: int, *, computed_in: str) -> float:
    """How far the same log-probability may be off where other batches round otherwise, in nats.

    A token's error is a few units of the type that is computed in (in tests up to 0.3 in bfloat16, 0.4 in float32), up
    as often as down, so that they add up by the square root of their number; the sums themselves are in float32.
    """
    unit, exact = torch.finfo(getattr(torch, computed_in)).eps, torch.finfo(torch.float32).eps
    return 8 * unit * math.sqrt(num_tokens) + 8 * exact * (num_tokens - sum(logps))


class PreferenceLoss:
    """The guided-DPO loss of a piece: its part of the mean over the step's pairs.

    Args:
        config: beta and the weight of the cross-entropy.
    """

    def __init__(self, config: DpoConfig) -> None:
        self.config = config

    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Loss and the figures of the log: its parts, mean rewards and their margin, how often the chosen one is
        preferred, and how far the answers' log-probabilities have moved from the reference, in nats."""
        inputs = batch.inputs.to(dist.device())
        chosen, rejected, truth = model(inputs).chunk(3)
        num_tokens = (inputs.labels.chunk(3)[2][:, 1:] != -100).sum(-1)
        result = guided_dpo_loss(
            policy_chosen=sequence_logps(chosen),
            policy_rejected=sequence_logps(rejected),
            reference_chosen=batch.reference_chosen.to(chosen.device),
            reference_rejected=batch.reference_rejected.to(chosen.device),
            ground_truth_cross_entropy=mean_cross_entropy(truth, num_tokens),
            beta=self.config.beta,
            ce_weight=self.config.ce_weight,
        )
        parts = {
            "dpo": result.dpo,
            "ce": result.cross_entropy,
            "chosen": result.chosen_reward,
            "rejected": result.rejected_reward,
            "margin": result.chosen_reward - result.rejected_reward,
            "accuracy": (result.chosen_reward > result.rejected_reward).float(),
            "chosen_drift": result.chosen_reward / self.config.beta,
            "rejected_drift": result.rejected_reward / self.config.beta,
        }
        count = batch.mean_num_pairs
        return result.loss.sum() / count, {name: part.sum().item() / count for name, part in parts.items()}


class MixedBatches:
    """Pairs, and among them questions to be answered.

    Args:
        pairs: deals out the pairs of each step.
        questions: deals out its questions, from the rank on that follows the last pair's.
    """

    def __init__(self, pairs: PreferenceBatches, questions: SftBatches) -> None:
        self.pairs = pairs
        self.questions = questions

    def __call__(self, step: int) -> list[PreferenceBatch | SftBatch]:
        """This rank's batch of a step, in pieces."""
        return [*self.pairs(step), *self.questions(step)]


class MixedLoss:
    """Guided DPO on pairs and cross-entropy on answers to questions, each by its share of the step's examples.

    Args:
        config: beta and the weight of the ground truth's cross-entropy.
        qa_fraction: share of the examples that are questions.
    """

    def __init__(self, config: DpoConfig, *, qa_fraction: float) -> None:
        self.preference = PreferenceLoss(config)
        self.qa_fraction = qa_fraction

    def __call__(self, model: nn.Module, batch: PreferenceBatch | SftBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Loss, and the figures of the log: those of the pairs, or the cross-entropy `qa`."""
        if isinstance(batch, SftBatch):
            value, _ = sft_loss(model, batch)
            return self.qa_fraction * value, {"qa": value.item()}
        value, figures = self.preference(model, batch)
        return (1 - self.qa_fraction) * value, figures
