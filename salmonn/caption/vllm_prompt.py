"""Prompts and a plugin for vLLM, which then runs the language model of video-SALMONN 2 and 2+.

The towers run here, and vLLM receives the tokens of a clip in the place of its placeholders, together with the rotary
positions of the whole prompt. This module imports no vLLM.
"""

from typing import Any

import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import Prompt
from salmonn.model.layout import ClipFeatures

ARCHITECTURE = "SalmonnForCausalLM"


@torch.no_grad()
def to_vllm_prompt(captioner: Captioner, prompt: Prompt, clip: ClipFeatures) -> dict[str, Any]:
    """Return a prompt about an encoded clip for `vllm.LLM.generate`.

    Args:
        captioner: model that encoded the clip, and that `tools/export_lm.py` wrote for vLLM.
        prompt: prompt with its history.
        clip: encoded clip of N tokens.
    """
    row = PromptRow(0, prompt.text, history=prompt.history, system=prompt.system, clip_turn=prompt.clip_turn)
    inputs = captioner.processor.collate([row], [clip])
    ids = inputs.input_ids[0]
    is_clip = torch.isin(ids, torch.tensor(captioner.network.config.placeholder_ids))
    fields = dict(
        clip_tokens=clip.read_tokens().float().cpu().unsqueeze(0),
        prompt_positions=inputs.position_ids.transpose(0, 1).contiguous(),
        clip_start=is_clip.nonzero()[0],
    )
    # A placeholder may be outside the vocabulary, which vLLM refuses.
    return {"prompt_token_ids": ids.masked_fill(is_clip, 0).tolist(), "multi_modal_data": {"video": fields}}
