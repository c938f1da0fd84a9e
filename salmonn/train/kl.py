"""Distance between two policies: the exact Kullback-Leibler divergence on fixed texts.

At each token of an answer both models give a distribution over the vocabulary, conditioned on the clip and the answer
so far. The divergence is summed over the whole vocabulary, not estimated from samples, and averaged over all tokens:
nats per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor, PromptRow
from salmonn.model.layout import ModelInputs
from salmonn.model.network import Network
from salmonn.train.data import ClipSet
from salmonn.train.loop import Callback, FitConfig, autocast

# Positions compared at a time: with a vocabulary of 152,000, 40 MB for each term of the sum.
_POSITIONS = 64

LogProbs = Callable[[ModelInputs], Tensor]


@dataclass(frozen=True)
class KLConfig:
    """Measurement of the KL divergence from the start of a round, on held-out reference captions.

    Args:
        num_clips: number of held-out clips; 0 to measure nothing.
        every: steps between two measurements.
    """

    num_clips: int = 16
    every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1 or self.num_clips < 0:
            raise ValueError(
                f"kl.every must be at least 1 and kl.num_clips at least 0, got {self.every} and {self.num_clips}"
            )


def token_kl(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return KL(policy || reference) of N distributions over V tokens: sum of p * (log p - log q), in nats.

    Args:
        policy_logps, reference_logps: (N, V) log-probabilities.

    Returns:
        (N,), 0 where the distributions are equal.
    """
    return (policy_logps.exp() * (policy_logps - reference_logps)).sum(-1)


class KLProbe:
    """Reference captions of some clips on which a policy is compared with a reference policy; ranks share the clips.

    Every rank calls the models equally often, since a call is collective where weights are sharded.

    Args:
        clips: clips with features, the same on every rank; those without a reference caption are left out.
        processor: processor of the model.
        prompt: prompt that asks for a caption.
        batch_size: captions per forward pass; each takes tokens * vocabulary * 16 bytes.

    Raises:
        ValueError: no reference has a caption.
    """

    def __init__(self, clips: ClipSet, processor: Processor, *, prompt: str, batch_size: int = 4) -> None:
        captioned = [(one.caption, clips.features_of(one)) for one in clips.references if one.caption]
        if not captioned:
            raise ValueError(
                f"none of {len(clips.references)} references has a caption to measure the divergence on: "
                "add captions, or set kl.num_clips to 0"
            )
        # Shares are padded to equal length; the padding is computed but not counted.
        num_captions = -(-len(captioned) // dist.world_size())
        mine = dist.shard(captioned)
        self.num_counted = len(mine)
        padded = mine + captioned[:1] * (num_captions - len(mine))
        self.micro_batches: list[tuple[ModelInputs, int]] = []
        for start in range(0, num_captions, batch_size):
            part = padded[start : start + batch_size]
            rows = [PromptRow(index, prompt, caption) for index, (caption, _) in enumerate(part)]
            inputs = processor.collate(rows, [clip for _, clip in part])
            num_rows = min(max(self.num_counted - start, 0), len(part))
            self.micro_batches.append((inputs, int((inputs.labels[:num_rows, 1:] != -100).sum())))

    def kl_from_reference_policy(self, model: nn.Module, network: Network) -> float:
        """Return the KL of a network with its adapter from the same network without it, in nats per token.

        Args:
            model: the network as it is trained, possibly wrapped by the training strategy; its mode is kept.
            network: the wrapped network, with its adapter.
        """

        def without_adapter(inputs: ModelInputs) -> Tensor:
            with network.lm.disable_adapter():
                return model(inputs, distributions=True)

        # Dropout would count as a difference.
        training = model.training
        model.eval()
        kl = self._mean(partial(model, distributions=True), without_adapter)
        model.train(training)
        return kl

    def kl_between(self, policy: nn.Module, start: nn.Module) -> float:
        """Return the KL of one network from another, both in evaluation mode, in nats per token."""
        return self._mean(partial(policy, distributions=True), partial(start, distributions=True))

    @torch.no_grad()
    def _mean(self, policy: LogProbs, reference: LogProbs) -> float:
        nats, num_tokens = 0.0, 0
        for micro_batch, count in self.micro_batches:
            inputs = micro_batch.to(dist.device())
            both = (policy(inputs)[:count].split(_POSITIONS), reference(inputs)[:count].split(_POSITIONS))
            nats += sum(token_kl(one, other).double().sum().item() for one, other in zip(*both, strict=True))
            num_tokens += count
        return dist.all_reduce_sum(nats) / dist.all_reduce_sum(num_tokens)


def make_kl_probe(captioner: Captioner, clips: ClipSet, config: KLConfig, *, batch_size: int) -> KLProbe:
    """Return the first clips as a probe."""
    first, prompt = clips.head(config.num_clips), captioner.default_prompt()
    return KLProbe(first, captioner.processor, prompt=prompt, batch_size=batch_size)


def kl_callback(captioner: Captioner, clips: ClipSet, config: KLConfig, *, fit_config: FitConfig) -> Callback | None:
    """Return a callback that measures the KL divergence of a network with its adapter from the same without it."""
    if not config.num_clips:
        return None
    probe = make_kl_probe(captioner, clips, config, batch_size=fit_config.micro_batch_size)
    network = captioner.network

    def measure_kl(model: nn.Module) -> Mapping[str, float]:
        with autocast(fit_config.precision):
            return {"kl": probe.kl_from_reference_policy(model, network)}

    return Callback(measure_kl, every=config.every)
