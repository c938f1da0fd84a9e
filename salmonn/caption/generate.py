"""Generation: greedy or nucleus sampling of answers, batched, through transformers' own generate."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from salmonn.model.network import Inputs, Network


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        temperature: 0 takes the most likely token each time (greedy).
        top_p: nucleus: the smallest set of tokens with this probability.
        max_new_tokens: limit of an answer's length.
        repetition_penalty: above 1, tokens that stand in the prompt (salmonn2-plus) or in the answer already are made
            less likely by this factor; none takes the model's own.
    """

    temperature: float = 0.0
    top_p: float = 0.9
    max_new_tokens: int = 160
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}")

    def to_transformers(self, *, stop_ids: Sequence[int], pad_token_id: int) -> GenerationConfig:
        """The same as transformers names it; an answer ends with any of `stop_ids`."""
        drawn = dict(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=0)
        return GenerationConfig(
            **(drawn if self.temperature else {"do_sample": False}),
            max_new_tokens=self.max_new_tokens,
            use_cache=True,  # a checkpoint's config may say otherwise, as training left it
            eos_token_id=list(stop_ids),
            pad_token_id=pad_token_id,
            repetition_penalty=self.repetition_penalty,
        )


class _Penalty(LogitsProcessor):
    """The repetition penalty of transformers, over the prompts too where they are given.

    The published 2+ generates from ids, and so its penalty sees them; video-SALMONN 2 generates from embeddings.

    Args:
        penalty: above 1 makes what was said less likely.
        prompts: (B, L) ids of the prompts.
    """

    def __init__(self, penalty: float, prompts: Tensor | None) -> None:
        self.penalise = RepetitionPenaltyLogitsProcessor(penalty)
        self.prompts = prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See transformers."""
        seen = input_ids if self.prompts is None else torch.cat([self.prompts.to(input_ids), input_ids], dim=1)
        return self.penalise(seen, scores) if seen.shape[1] else scores


def _prompts(inputs: Inputs, num_samples: int) -> Tensor:
    """Ids of the prompts, with the first of each in the place of its padding, which nobody said."""
    first = inputs.attention_mask.argmax(1, keepdim=True)
    ids = inputs.input_ids.where(inputs.attention_mask.bool(), inputs.input_ids.gather(1, first))
    return ids.repeat_interleave(num_samples, dim=0)


@torch.no_grad()
def generate(
    network: Network, inputs: Inputs, *, config: GenerationConfig, num_samples: int = 1, seed: int = 0
) -> list[list[int]]:
    """Answer each row.

    Args:
        network: in evaluation mode.
        inputs: B prompts, padded on the left.
        config: how answers are drawn.
        num_samples: N answers to each row.
        seed: of the draws, which depend on nothing else.

    Returns:
        B * N lists of token ids, a row's samples one after the other; each ends with the end token if it is finished.
    """
    stop_ids = set(config.eos_token_id or [])
    config, penalties = copy.copy(config), LogitsProcessorList()
    penalty = network.config.repetition_penalty if config.repetition_penalty is None else config.repetition_penalty
    config.repetition_penalty = None  # ours takes its place
    if penalty != 1:
        told = inputs if network.config.family == "salmonn2-plus" else None
        penalties.append(_Penalty(penalty, None if told is None else _prompts(told, num_samples)))
    given = {
        "inputs_embeds": network.embed(inputs),
        "attention_mask": inputs.attention_mask,
        "position_ids": network.positions(inputs.position_ids),
    }
    cache = None
    if num_samples > 1:
        # What the samples of a row have in common goes through once; generate goes on from its last token.
        common = {"inputs_embeds": given["inputs_embeds"][:, :-1], "attention_mask": given["attention_mask"][:, :-1]}
        common["position_ids"] = given["position_ids"][..., :-1]
        cache = network.lm.get_decoder()(**common, use_cache=True).past_key_values
        cache.batch_repeat_interleave(num_samples)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = network.lm.generate(
            # Repeated here and not by num_return_sequences: some releases of transformers ask for ids to do that.
            inputs_embeds=given["inputs_embeds"].repeat_interleave(num_samples, dim=0),
            attention_mask=given["attention_mask"].repeat_interleave(num_samples, dim=0),
            position_ids=given["position_ids"].repeat_interleave(num_samples, dim=-2),
            past_key_values=cache,
            generation_config=config,
            logits_processor=penalties,
        )
    answers = []
    for ids in output.tolist():
        ends = [place for place, token in enumerate(ids) if token in stop_ids]
        answers.append(ids[: ends[0] + 1] if ends else ids)
    return answers
