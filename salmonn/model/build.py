"""The one place that builds a network's parts from sizes. Weights come later: from a checkpoint, or by chance."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from salmonn.model.audio import AudioTower
from salmonn.model.config import SalmonnConfig
from salmonn.model.qformer import WindowQFormer
from salmonn.model.vision import QwenTower, SiglipTower


@dataclass(frozen=True)
class NetworkParts:
    """The towers and the language model, of one width."""

    vision: nn.Module
    audio: nn.Module
    lm: Any


def build_parts(config: SalmonnConfig, *, attn_implementation: str | None = None) -> NetworkParts:
    """Build the parts of a family."""
    builders = {"salmonn2": _salmonn2, "salmonn2-plus": _plus}
    return builders[config.family](config, {"attn_implementation": attn_implementation})


def _salmonn2(config: SalmonnConfig, attention: dict[str, Any]) -> NetworkParts:
    lm = Qwen2ForCausalLM(Qwen2Config(**config.lm, **attention))
    width = lm.config.hidden_size
    encoder = SiglipVisionModel(SiglipVisionConfig(**config.vision, **attention))
    vision = SiglipTower(encoder, _mlp(encoder.config.hidden_size, width), width=width, pool=config.pool)
    audio = _audio(config, attention, width=width)
    audio.norm = nn.LayerNorm(audio.encoder.config.d_model)
    audio.projector = nn.Sequential(audio.projector, *_mlp(width, width))
    audio.tell_chunk = True
    return NetworkParts(vision, audio, lm)


def _plus(config: SalmonnConfig, attention: dict[str, Any]) -> NetworkParts:
    lm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config.lm, **attention))
    # The network runs the tower itself; the language model is given embeddings.
    vision, lm.model.visual = QwenTower(lm.model.visual), None
    return NetworkParts(vision, _audio(config, attention, width=lm.get_input_embeddings().embedding_dim), lm)


def _audio(config: SalmonnConfig, attention: dict[str, Any], *, width: int) -> AudioTower:
    encoder = WhisperEncoder(WhisperConfig(**config.whisper, **attention))
    qformer = Blip2QFormerModel(Blip2QFormerConfig(**config.qformer))
    window = WindowQFormer(
        qformer, num_queries=config.num_queries, window=config.window_steps, stride=config.stride_steps
    )
    return AudioTower(encoder, nn.Identity(), window, nn.Linear(qformer.config.hidden_size, width), tell_chunk=False)


def _mlp(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))
