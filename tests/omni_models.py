"""Random Qwen-Omni models: a checkpoint in the published layout, and the same model and processor of transformers."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

from salmonn.caption.prompt import train_tokenizer
from salmonn.media.clip import Clip

SAMPLE_RATE_HZ = 16_000
OMNI_TOKENS = {
    "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip

QWEN3_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A model as transformers runs it.

    Args:
        model: the thinker.
        processor: transformers' processor around a real tokenizer and feature extractor. Its video processor, which
            needs torchvision, is replaced by its sizes; all methods are transformers' own.
        folder: the checkpoint in the published layout.
        count_tokens: transformers' number of audio tokens of numbers of mel frames.
        audio_options: how the processor computes log-mel features.
    """

    model: Any
    processor: Any
    folder: Path
    count_tokens: Callable[[Tensor], Tensor]
    audio_options: dict[str, Any]

    def process(
        self, text: str, *, grid: Sequence[int] | None, waveform: np.ndarray | None, seconds_per_grid: float = 1.0
    ) -> dict[str, Any]:
        """Return the inputs of the model for a chat with one placeholder of a clip, without its pixels."""
        inputs: dict[str, Any] = {}
        num_audio = []
        if waveform is not None:
            features = self.processor.feature_extractor(
                waveform, sampling_rate=SAMPLE_RATE_HZ, return_attention_mask=True, return_tensors="pt",
                **self.audio_options,
            )  # fmt: skip
            inputs["input_features"], mask = features["input_features"], features["attention_mask"]
            inputs["feature_attention_mask"] = mask
            num_audio = [int(self.count_tokens(mask.sum(-1)))]
        if grid is not None:
            inputs["video_grid_thw"] = torch.tensor([grid])
            inputs["video_second_per_grid"] = torch.tensor([seconds_per_grid])
            inputs["use_audio_in_video"] = bool(num_audio)
        grids = [] if grid is None else [np.array(grid)]
        text = self.expand_placeholders(text, num_audio=num_audio, grids=grids, seconds_per_grid=seconds_per_grid)
        ids = torch.tensor([self.processor.tokenizer.encode(text, add_special_tokens=False)])
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def expand_placeholders(
        self, text: str, *, num_audio: list[int], grids: list[np.ndarray], seconds_per_grid: float
    ) -> str:
        """Replace the placeholder of a clip by those of all its tokens, as the processor does."""
        processor = self.processor
        timing = dict(seconds_per_chunk=2.0, position_id_per_seconds=self.model.config.position_id_per_seconds)
        both = bool(num_audio and grids)
        if hasattr(processor, "replace_multimodal_special_tokens"):  # of transformers before 5.2x
            (text,) = processor.replace_multimodal_special_tokens(
                [text], iter(num_audio), iter([]), iter(grids), video_second_per_grid=iter([seconds_per_grid]),
                use_audio_in_video=both, **timing,
            )  # fmt: skip
        elif grids:
            video = processor.replace_video_token(
                {"video_grid_thw": grids, "video_second_per_grid": [seconds_per_grid]},
                0,
                processed_audio={"num_audio_tokens": num_audio},
                video_to_audio_indices=[0 if both else None],
                load_audio_from_video=both,
                **timing,
            )
            text = text.replace(processor.video_token, video)
        else:
            audio = processor.replace_audio_token({"num_audio_tokens": num_audio}, audio_idx=0)
            text = text.replace(processor.audio_token, audio)
        return text


def make_tokenizer(tokens: dict[str, str], texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(tokens.values())}, replace_extra_special_tokens=False
    )
    return tokenizer


def make_clip(*, frames: int = 0, audio_seconds: float = 0.0, seconds: float | None = None, seed: int = 0) -> Clip:
    """Return a clip of random frames, two a second unless `seconds` is given, and of noise."""
    generator = np.random.default_rng(seed)
    shape = (frames, 84, 112, 3)
    duration = (frames / 2 if seconds is None else seconds) if frames else 0.0
    return Clip(
        path="clip.mp4",
        frames=generator.integers(0, 256, shape if frames else (0, 0, 0, 3)).astype(np.uint8),
        frame_times=np.linspace(0, duration, frames, endpoint=False),
        waveform=generator.normal(0, 0.1, round(audio_seconds * SAMPLE_RATE_HZ)).astype(np.float32)
        if audio_seconds
        else None,
        start_seconds=0.0,
        video_seconds=duration,
        duration_seconds=max(duration, audio_seconds),
    )


def enlarge(model: torch.nn.Module, factor: float) -> None:
    """Multiply all matrices, so that the tokens of a random model depend on its inputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)


def published_name(name: str) -> str:
    """Return the name of a weight in the published checkpoints, which are older than that in transformers."""
    name = re.sub(r"^model\.(visual|audio_tower)\.", r"\1.", name)
    return "thinker." + re.sub(r"^model\.language_model\.", "model.", name)


def split_experts(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return the matrices of all experts by their published names; another weight as it is."""
    if ".mlp.experts." not in name:
        return {name: value}
    start, part = name.rsplit(".", 1)
    halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
    return {
        f"{start}.{number}.{half}.weight": matrix.contiguous()
        for number, expert in enumerate(value)
        for half, matrix in zip(halves, expert.chunk(len(halves)), strict=True)
    }


def save_published(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, *, model_type: str) -> None:
    """Write a thinker as a whole published model, with a weight of the talker."""
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        weights |= split_experts(published_name(name), value)
    folder.mkdir(parents=True)
    save_file({**weights, "talker.model.norm.weight": torch.ones(3)}, str(folder / "model.safetensors"))
    values = {"model_type": model_type, "thinker_config": model.config.to_dict(), "talker_config": {}}
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(str(folder))


def make_qwen2_5_omni(
    folder: Path, *, texts: Iterable[str] = ("a red circle",), vocab_size: int = 264, head_dim: int = 16
) -> Published:
    """Make a Qwen2.5-Omni of 0.2 million parameters, whose tokenizer is trained on texts; `head_dim` is 16 or 32."""
    tokenizer = make_tokenizer(OMNI_TOKENS, texts, vocab_size=vocab_size)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in OMNI_TOKENS.items()}
    torch.manual_seed(0)
    config = Qwen2_5OmniThinkerConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=64 // head_dim, num_key_value_heads=32 // head_dim, max_position_embeddings=4096,
            rope_parameters=dict(
                rope_type="default", rope_theta=10_000.0, mrope_section=[head_dim * part // 16 for part in (2, 3, 3)]
            ),
        ),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1], out_hidden_size=64,
        ),
        audio_config=dict(
            num_mel_bins=128, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=32,
            n_window=20, output_dim=64,
        ),
        image_token_index=ids["image_token"], video_token_index=ids["video_token"],
        audio_token_index=ids["audio_token"], vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"], audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
    )  # fmt: skip
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    enlarge(model, 6)
    save_published(model, tokenizer, folder, model_type="qwen2_5_omni")
    tower = next(module for module in model.modules() if isinstance(module, Qwen2_5OmniAudioEncoder))
    return Published(
        model,
        make_processor(Qwen2_5OmniProcessor, tokenizer, OMNI_TOKENS),
        folder,
        lambda lengths: tower._get_feat_extract_output_lengths(lengths)[1],
        {"padding": "max_length"},
    )


def make_qwen3_omni(folder: Path, *, texts: Iterable[str] = ("a red circle",), vocab_size: int = 264) -> Published:
    """Make a Qwen3-Omni with four experts, two for each token; see `make_qwen2_5_omni`."""
    tokenizer = make_tokenizer(QWEN3_TOKENS, texts, vocab_size=vocab_size)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in QWEN3_TOKENS.items()}
    torch.manual_seed(0)
    config = Qwen3OmniMoeThinkerConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, moe_intermediate_size=48,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
            num_experts_per_tok=2, max_position_embeddings=4096,
            rope_parameters=dict(
                rope_type="default", rope_theta=10_000.0, mrope_section=[4, 2, 2], mrope_interleaved=True
            ),
        ),
        vision_config=dict(
            depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        ),
        audio_config=dict(
            num_mel_bins=128, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=32,
            n_window=50, n_window_infer=200, downsample_hidden_size=8, output_dim=64,
        ),
        image_token_id=ids["image_token"], video_token_id=ids["video_token"], audio_token_id=ids["audio_token"],
        vision_start_token_id=ids["vision_bos_token"], vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"], audio_end_token_id=ids["audio_eos_token"],
        position_id_per_seconds=13,
    )  # fmt: skip
    model = Qwen3OmniMoeThinkerForConditionalGeneration(config).eval()
    enlarge(model, 6)
    save_published(model, tokenizer, folder, model_type="qwen3_omni_moe")
    return Published(
        model,
        make_processor(Qwen3OmniMoeProcessor, tokenizer, QWEN3_TOKENS),
        folder,
        _get_feat_extract_output_lengths,
        {"padding": True, "truncation": False},
    )


def make_processor(processor_class: type, tokenizer: PreTrainedTokenizerFast, tokens: dict[str, str]) -> Any:
    """Make a processor of transformers without its image and video processors; it only gets their sizes."""
    processor = processor_class.__new__(processor_class)
    vars(processor).update(
        tokens,
        tokenizer=tokenizer,
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        image_processor=SimpleNamespace(merge_size=2),
    )
    return processor
