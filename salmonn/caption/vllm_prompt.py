"""Prompts of our models for vLLM, which runs the language model of video-SALMONN 2 and 2+.

The towers run here, and vLLM receives the tokens of a clip in the place of its placeholders, together with the rotary
positions of the whole prompt. This module imports no vLLM.
"""

from typing import Any

import torch
from torch import Tensor

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import Prompt
from salmonn.model.families.base import TURN_START
from salmonn.model.layout import ClipFeatures, ModelInputs

ARCHITECTURE = "SalmonnForCausalLM"


@torch.no_grad()
def to_vllm_prompt(
    captioner: Captioner, prompt: Prompt, clip: ClipFeatures, *, is_penalized: bool = False
) -> dict[str, Any]:
    """Return a prompt about an encoded clip for vLLM.

    vLLM's repetition penalty counts the ids of the prompt. Those of the clip have no other effect, so they are chosen
    such that vLLM counts the tokens that our penalty counts (see `Family.penalizes_prompt`).

    Args:
        captioner: model that encoded the clip; its language model is not used.
        prompt: prompt with its history.
        clip: encoded clip of N tokens.
        is_penalized: whether the answer has a repetition penalty. Where it must not count the prompt, the whole prompt
            is then sent as tokens of a clip.
    """
    row = PromptRow(0, prompt.text, history=prompt.history, system=prompt.system, clip_turn=prompt.clip_turn)
    inputs = captioner.processor.collate([row], [clip])
    ids = inputs.input_ids[0]
    # It starts each message, and never occurs in an answer.
    uncounted = captioner.processor.tokenizer.convert_tokens_to_ids(TURN_START)
    is_clip = torch.isin(ids, torch.tensor(captioner.network.config.placeholder_ids))
    start, tokens = is_clip.nonzero()[0], clip.read_tokens()
    if is_penalized and not captioner.network.family.penalizes_prompt:
        start, tokens = torch.zeros_like(start), captioner.network.embed(inputs.to(captioner.network.device))[0]
        ids = torch.full_like(ids, uncounted)
    else:
        counted = _counted_ids(captioner, inputs, is_clip)
        hidden = torch.full((int(is_clip.sum()),), uncounted)
        hidden[: len(counted)] = counted
        ids = ids.masked_scatter(is_clip, hidden)
    fields = dict(
        clip_tokens=tokens.cpu().unsqueeze(0),
        prompt_positions=inputs.position_ids.transpose(0, 1).contiguous(),
        clip_start=start,
    )
    return {"prompt_token_ids": ids.tolist(), "multi_modal_data": {"video": fields}}


def _counted_ids(captioner: Captioner, inputs: ModelInputs, is_clip: Tensor) -> Tensor:
    """Return what a repetition penalty counts of a clip: its placeholders and the text within it, each once."""
    ids = torch.cat([inputs.input_ids[0][is_clip], torch.tensor(inputs.layouts[0].timestamp_ids, dtype=torch.long)])
    ids = ids.unique()
    # A placeholder may be outside the vocabulary, which vLLM refuses.
    return ids[(ids >= 0) & (ids < captioner.network.lm.get_input_embeddings().num_embeddings)]
