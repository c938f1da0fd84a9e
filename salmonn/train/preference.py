"""Training on preference pairs: their batches, the reference policy's log-probabilities, and the guided-DPO loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.inputs import Processor, Row
from salmonn.model.lora import adapter_off
from salmonn.model.network import Block, Inputs, Network
from salmonn.prefer.loss import guided_dpo_loss, mean_cross_entropy, sequence_logps
from salmonn.records import Pair
from salmonn.train.examples import SftBatch, SftBatches, deal, sft_loss, split


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

    inputs: Inputs
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
        accumulation: pieces that a rank's part is split into, if it has so many pairs.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        blocks: Mapping[str, Block],
        processor: Processor,
        *,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        self.pairs = pairs
        self.blocks = blocks
        self.processor = processor
        self.batch_size = batch_size
        self.seed = seed
        self.accumulation = accumulation
        self.reference: list[tuple[float, float]] = []

    def refer(self, network: Network) -> None:
        """Ask the reference policy, the network with its adapter off, once for every pair; shared over ranks."""
        costs = [
            len(self.blocks[pair.video]) + len(pair.chosen.split()) + len(pair.rejected.split()) for pair in self.pairs
        ]
        shares = dist.spread(costs)
        mine = [self.pairs[place] for place in shares[dist.rank()]]
        size = max(1, self.batch_size // self.accumulation)
        scored: list[tuple[float, float]] = []
        with adapter_off(network), torch.no_grad():
            for start in tqdm(range(0, len(mine), size), desc="reference", disable=not dist.is_main()):
                part = mine[start : start + size]
                rows = [Row(index, pair.prompt, pair.chosen, pair.history) for index, pair in enumerate(part)]
                rows += [Row(index, pair.prompt, pair.rejected, pair.history) for index, pair in enumerate(part)]
                logps = sequence_logps(network(self._inputs(part, rows).to(network.device))).cpu()
                scored += zip(logps[: len(part)].tolist(), logps[len(part) :].tolist(), strict=True)
        self.reference = dist.collect(scored, shares)

    def __call__(self, step: int) -> list[PreferenceBatch]:
        """This rank's batch of a step, in pieces."""
        assert len(self.reference) == len(self.pairs), "refer() comes before the first batch"
        numbered = list(enumerate(self.pairs))
        mine = dist.share(deal(numbered, step, batch_size=self.batch_size, seed=self.seed))
        return [self._piece(part) for part in split(mine, self.accumulation)]

    def _piece(self, numbered: Sequence[tuple[int, Pair]]) -> PreferenceBatch:
        part = [pair for _, pair in numbered]
        rows = [
            Row(index, pair.prompt, text, pair.history)
            for texts in zip(*((pair.chosen, pair.rejected, pair.ground_truth) for pair in part), strict=True)
            for index, (pair, text) in enumerate(zip(part, texts, strict=True))
        ]
        reference = torch.tensor([self.reference[number] for number, _ in numbered])
        mean_num_pairs = self.batch_size / dist.world_size()
        names = tuple(pair.video for pair in part)
        return PreferenceBatch(self._inputs(part, rows), reference[:, 0], reference[:, 1], mean_num_pairs, names)

    def _inputs(self, pairs: Sequence[Pair], rows: Sequence[Row]) -> Inputs:
        return self.processor.inputs(rows, [self.blocks[pair.video] for pair in pairs])


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
        qa_share: share of the examples that are questions.
    """

    def __init__(self, config: DpoConfig, *, qa_share: float) -> None:
        self.preference = PreferenceLoss(config)
        self.qa_share = qa_share

    def __call__(self, model: nn.Module, batch: PreferenceBatch | SftBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Loss, and the figures of the log: those of the pairs, or the cross-entropy `qa`."""
        if isinstance(batch, SftBatch):
            value, _ = sft_loss(model, batch)
            return self.qa_share * value, {"qa": value.item()}
        value, figures = self.preference(model, batch)
        return (1 - self.qa_share) * value, figures
