"""The language model of video-SALMONN 2 and 2+ in vLLM: text and clips' tokens that our towers have computed.

vLLM imports this module in its own processes, see `register`. Each prompt has one item, a clip, whose modality is
"video" and whose fields `salmonn.caption.vllm_prompt.to_vllm_prompt` makes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.inputs import mm_input
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import DictEmbeddingItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
)

FIELDS = ("clip_tokens", "prompt_positions", "clip_start")


def _field_configs(_: Mapping[str, Tensor]) -> dict[str, Any]:
    # Positions are read on the CPU before the batch is copied to the device.
    return {name: MultiModalFieldConfig.batched("video", keep_on_cpu=name != "clip_tokens") for name in FIELDS}


class ClipParser(MultiModalDataParser):
    """Parser of the only kind of item: a clip that has been encoded."""

    def _parse_video_data(self, data: Any) -> DictEmbeddingItems:
        if not isinstance(data, Mapping):
            raise ValueError(f"a clip must be a mapping with {', '.join(FIELDS)}, got {type(data).__name__}")
        items = DictEmbeddingItems(data, modality="video", required_fields=set(FIELDS), fields_factory=_field_configs)
        tokens, width = data["clip_tokens"], self.expected_hidden_size
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            raise ValueError(f"clip_tokens must be (1, N, {width}), got {tuple(tokens.shape)}")
        return items


class ClipProcessingInfo(BaseProcessingInfo):
    """What vLLM plans memory with: one clip for each prompt, as long as the whole prompt at most."""

    def get_data_parser(self) -> ClipParser:
        return ClipParser(expected_hidden_size=self.ctx.model_config.get_inputs_embeds_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"video": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"video": seq_len}


class ClipDummyInputs(BaseDummyInputsBuilder[ClipProcessingInfo]):
    """A clip of zeros that fills the prompt, for vLLM's measurement of memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        if not mm_counts.get("video"):
            return {}
        width = self.info.ctx.model_config.get_inputs_embeds_size()
        positions = torch.arange(seq_len).expand(1, 3, -1)
        tokens = torch.zeros(1, seq_len, width)
        return {
            "video": dict(clip_tokens=tokens, prompt_positions=positions, clip_start=torch.zeros(1, dtype=torch.long))
        }


class ClipProcessor(BaseMultiModalProcessor[ClipProcessingInfo]):
    """Processor of prompts in which each token of the clip already has its placeholder: nothing is replaced."""

    requires_tokenizer = False

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        """Return a prompt that is one clip."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        return ProcessorInputs(prompt=[0] * seq_len, mm_data_items=self.info.parse_mm_data(data, validate=False))

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return _field_configs(hf_inputs)

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        return []

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Return the prompt with the place of its clip.

        Raises:
            ValueError: the clip's tokens or positions do not fit the prompt.
        """
        items = inputs.mm_data_items
        kwargs: dict[str, Tensor] = {}
        for group in items.values():
            kwargs.update(group.get_passthrough_data())
        places = {}
        if kwargs:
            start, count, length = int(kwargs["clip_start"]), kwargs["clip_tokens"].shape[1], len(inputs.prompt)
            if not 0 <= start <= start + count <= length:
                raise ValueError(f"a clip of {count} tokens at {start} exceeds its prompt of {length} tokens")
            if kwargs["prompt_positions"].shape != (1, 3, length):
                shape = tuple(kwargs["prompt_positions"].shape)
                raise ValueError(f"prompt_positions must be (1, 3, {length}), a column for each token, got {shape}")
            places = {"video": [PlaceholderRange(offset=start, length=count)]}
        hashes = inputs.get_mm_hashes(self.info.model_id, self.info.ctx.get_mm_config().mm_hasher_algorithm)
        fields = MultiModalKwargsItems.from_hf_inputs(BatchFeature(kwargs), _field_configs(kwargs) if kwargs else {})
        return mm_input(prompt_token_ids=inputs.prompt, mm_kwargs=fields, mm_hashes=hashes, mm_placeholders=places)


@MULTIMODAL_REGISTRY.register_processor(ClipProcessor, info=ClipProcessingInfo, dummy_inputs=ClipDummyInputs)
class SalmonnForCausalLM(Qwen2ForCausalLM, SupportsMultiModal, SupportsMRoPE):
    """Qwen2, with plain or 3-D rotary positions as its config says, that reads encoded clips."""

    embed_input_ids = SupportsMultiModal.embed_input_ids  # that of Qwen2 takes no clips

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None

    def get_language_model(self) -> Any:
        return self.model

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Return the tokens of each clip, (N_i, D)."""
        weight = self.model.embed_tokens.weight
        return [tokens.to(weight) for tokens in kwargs.get("clip_tokens", ())]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Return the positions (3, L) that came with the clip, and the offset of those of the answer from its index."""
        if mm_features:
            positions = mm_features[0].data["prompt_positions"].data.reshape(3, -1)
        else:
            positions = torch.arange(len(input_tokens)).expand(3, -1)
        return positions, int(positions[0, -1]) + 1 - positions.shape[1]
