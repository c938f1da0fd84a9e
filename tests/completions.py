"""Completions for clips that have been read or encoded before, and tokens for model inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.constraint import JsonGrammars
from salmonn.caption.generate import DecodeBatch, SampledToken
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.prompt import Prompt
from salmonn.caption.streaming import Completion
from salmonn.model.layout import ClipInfo, ModelInputs
from salmonn.model.network import DecodeFunction, Network


def complete(
    captioner: Captioner,
    clips: Sequence[Any],
    prompts: Sequence[str | Prompt],
    *,
    num_samples: int = 1,
    seeds: Sequence[int] | None = None,
    sampling: Any = None,
    **options: Any,
) -> list[Completion]:
    """Answer prompts[i] about clips[i]; seeds are 0, 1, 2, ... by default."""
    requests = [
        CaptionRequest(Path("clip"), prompt, sampling, seed=seed, num_samples=num_samples)
        if isinstance(prompt, str)
        else CaptionRequest(
            Path("clip"), prompt.text, sampling, seed=seed, history=prompt.history, system=prompt.system
        )
        for prompt, seed in zip(prompts, range(len(prompts)) if seeds is None else seeds, strict=True)
    ]
    samples = captioner.generate(requests, clips=clips, **options)
    return [
        Completion(caption.text, caption.finished, ClipInfo(caption.modality, caption.complete, caption.warnings))
        for captions in samples
        for caption in captions
    ]


def generate(
    network: Network,
    inputs: ModelInputs,
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    num_samples: int = 1,
    seeds: Sequence[int] | None = None,
    grammars: JsonGrammars | None = None,
) -> list[list[SampledToken]]:
    """Generate N samples for each of B prompts; takes the arguments of `DecodeBatch` and its `add`.

    Args:
        grammars: compiler of JSON schemas, for sampling parameters that have one.

    Returns:
        B * N lists of tokens, the samples of a prompt in succession; the last one is a stop token unless the token
        limit was reached.
    """
    batch = DecodeBatch(network, stop_ids=stop_ids, grammars=grammars)
    rows = batch.add(inputs, sampling=sampling, num_samples=num_samples, seeds=seeds)
    generated: list[list[SampledToken]] = [[] for _ in rows]
    while batch:
        for row, token in batch.step().items():
            generated[row].append(token)
    return generated


@torch.no_grad()
def decode_difference(network: Network, inputs: ModelInputs, layers: DecodeFunction) -> float:
    """Return the largest difference of logits, in standard deviations, that layers make in three decode steps."""
    (logits, expected_cache, _), (_, cache, _) = network.prefill(inputs), network.prefill(inputs)
    found = []
    for _ in range(3):
        tokens = logits.argmax(-1)
        logits = network.decode_step(tokens, expected_cache)
        found.append(float((network.decode_step(tokens, cache, layers=layers) - logits).abs().max() / logits.std()))
    return max(found)
