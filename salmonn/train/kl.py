"""How far a policy has moved: the exact Kullback-Leibler divergence from a reference, on fixed texts.

At every token of an answer both models say how likely each word of the vocabulary is to come next, given the clip and
the answer up to there. The divergence of the two distributions is summed over the whole vocabulary, not estimated from
what was sampled, and averaged over all tokens: nats per token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from salmonn import dist
from salmonn.caption.processor import Processor, PromptRow
from salmonn.model.layout import ClipFeatures, ModelInputs
from salmonn.model.lora import adapter_disabled
from salmonn.model.network import Network
from salmonn.records import Reference

# Positions compared at once: with 152,000 words in the vocabulary 40 MB for each of the sum's terms.
_POSITIONS = 64

Says = Callable[[ModelInputs], Tensor]


def token_kl(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """KL(policy || reference) of N distributions over V words: sum of p * (log p - log q), in nats.

    Args:
        policy_logps, reference_logps: (N, V) log-probabilities.

    Returns:
        (N,), 0 where both say the same.
    """
    return (policy_logps.exp() * (policy_logps - reference_logps)).sum(-1)


class KLProbe:
    """Reference captions of some clips, on which a policy is compared with a reference; ranks share the clips.

    Each rank calls the models as often as every other, since a model whose weights are split over ranks needs all.

    Args:
        references: with captions; the same on every rank.
        blocks: the clips' tokens, as many as references.
        processor: of the model.
        prompt: that asks for a caption.
        batch_size: captions at once; each takes tokens * vocabulary * 16 bytes.

    Raises:
        ValueError: no reference has a caption.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        blocks: Sequence[ClipFeatures],
        processor: Processor,
        *,
        prompt: str,
        batch_size: int = 4,
    ) -> None:
        told = [(one.caption, block) for one, block in zip(references, blocks, strict=True) if one.caption]
        if not told:
            raise ValueError(
                f"none of {len(references)} references has a caption to measure the divergence on: "
                "add captions, or leave the measure out (kl_clips 0)"
            )
        # What fills the last ranks' shares up is computed and not counted.
        num_turns = -(-len(told) // dist.world_size())
        mine = dist.shard(told)
        self.num_counted = len(mine)
        filled = mine + told[:1] * (num_turns - len(mine))
        self.pieces: list[tuple[ModelInputs, int]] = []
        for start in range(0, num_turns, batch_size):
            part = filled[start : start + batch_size]
            rows = [PromptRow(index, prompt, caption) for index, (caption, _) in enumerate(part)]
            inputs = processor.collate(rows, [block for _, block in part])
            num_rows = min(max(self.num_counted - start, 0), len(part))
            self.pieces.append((inputs, int((inputs.labels[:num_rows, 1:] != -100).sum())))

    def kl_from_reference_policy(self, model: nn.Module, network: Network) -> float:
        """KL of a network with its adapter from the same without it, in nats per token.

        Args:
            model: the network as it is trained: itself, or wrapped by the engine. It stays in its mode.
            network: the network within, with its adapter.
        """

        def without_adapter(inputs: ModelInputs) -> Tensor:
            with adapter_disabled(network):
                return model(inputs, distributions=True)

        # Dropout would count as a difference.
        training = model.training
        model.eval()
        kl = self._mean(lambda inputs: model(inputs, distributions=True), without_adapter)
        model.train(training)
        return kl

    def kl_between(self, policy: Network, start: Network) -> float:
        """KL of one network from another, both in evaluation mode, in nats per token."""
        return self._mean(
            lambda inputs: policy(inputs, distributions=True), lambda inputs: start(inputs, distributions=True)
        )

    @torch.no_grad()
    def _mean(self, policy: Says, reference: Says) -> float:
        nats, num_tokens = 0.0, 0
        for piece, count in self.pieces:
            inputs = piece.to(dist.device())
            both = (policy(inputs)[:count].split(_POSITIONS), reference(inputs)[:count].split(_POSITIONS))
            nats += sum(token_kl(one, other).double().sum().item() for one, other in zip(*both, strict=True))
            num_tokens += count
        return dist.all_reduce_sum(nats) / dist.all_reduce_sum(num_tokens)
