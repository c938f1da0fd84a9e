"""The one place that puts a network together, and reads and writes it as a folder (config.json + safetensors)."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from salmonn.model.audio import AudioTower
from salmonn.model.network import Network
from salmonn.model.qformer import WindowQFormer
from salmonn.model.vision import VisionTower
from salmonn.records import write_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MEL_HZ = 100  # Whisper's log-mel frames a second; its encoder halves them


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a network and to feed it.

    Args:
        lm, vision, whisper, qformer: arguments of transformers' own configs (Qwen2, SigLIP, Whisper, BLIP-2 Q-Former).
        placeholder_id: token id that stands for a clip's token.
        num_queries: Q-Former queries a window.
        window_seconds: length of a Q-Former window.
        frames_per_second, max_frames: how densely a clip is seen.
        family: which kind of network this is.
    """

    lm: dict[str, Any]
    vision: dict[str, Any]
    whisper: dict[str, Any]
    qformer: dict[str, Any]
    placeholder_id: int
    num_queries: int = 1
    window_seconds: float = 0.5
    frames_per_second: float = 1.0
    max_frames: int = 110
    family: Literal["tiny"] = "tiny"

    # Cached, as they are asked for each clip and transformers' configs take a millisecond to make.
    @cached_property
    def chunk_seconds(self) -> int:
        """Length of the chunks of sound that the Whisper encoder takes."""
        return WhisperConfig(**self.whisper).max_source_positions * 2 // MEL_HZ

    @cached_property
    def num_mel_bins(self) -> int:
        """Mel bins M of the Whisper encoder."""
        return WhisperConfig(**self.whisper).num_mel_bins

    @cached_property
    def frame_size(self) -> int:
        """Side of a frame in pixels, as the vision tower takes it."""
        return SiglipVisionConfig(**self.vision).image_size

    @cached_property
    def num_patches(self) -> int:
        """Patches N of a frame."""
        config = SiglipVisionConfig(**self.vision)
        return (config.image_size // config.patch_size) ** 2


def build(config: ModelConfig) -> Network:
    """Build a network with fresh weights."""
    lm = Qwen2ForCausalLM(Qwen2Config(**config.lm))
    # Six channels: a frame and the one before it.
    vision = SiglipVisionModel(SiglipVisionConfig(**config.vision, num_channels=6, vision_use_head=False))
    whisper = WhisperEncoder(WhisperConfig(**config.whisper))
    qformer = Blip2QFormerModel(Blip2QFormerConfig(**config.qformer, encoder_hidden_size=whisper.config.d_model))
    width, seen = lm.config.hidden_size, vision.config.hidden_size
    steps = round(whisper.config.max_source_positions * config.window_seconds / config.chunk_seconds)
    window = WindowQFormer(qformer, num_queries=config.num_queries, steps_per_window=steps)
    return Network(
        VisionTower(vision, _projector(seen, width), _projector(config.num_patches * seen, width)),
        AudioTower(whisper, window, _projector(qformer.config.hidden_size, width)),
        lm,
        placeholder_id=config.placeholder_id,
        window_seconds=config.window_seconds,
    )


def _projector(width_in: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))


def tiny(*, vocab_size: int, placeholder_id: int, eos_token_id: int, pad_token_id: int) -> ModelConfig:
    """Sizes of the shipped toy model: about 1.6 million parameters, clips of 8 s at 2 frames a second.

    Fresh weights have a deviation of about 1 / sqrt(width). The published 0.02 suits widths of thousands: here
    Whisper's convolutions would give a hundredth of what its fixed positions add, and pitch would be lost among them.
    """
    return ModelConfig(
        lm=dict(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.09,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            bos_token_id=None,
        ),
        vision=dict(
            image_size=48,
            patch_size=16,
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=3,
            num_attention_heads=4,
        ),
        whisper=dict(
            num_mel_bins=40,
            max_source_positions=400,
            d_model=96,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=288,
            decoder_layers=1,
            init_std=0.1,
            # The decoder half is never built, but its config is checked all the same.
            vocab_size=vocab_size,
            pad_token_id=pad_token_id,
            bos_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            decoder_start_token_id=pad_token_id,
        ),
        qformer=dict(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=1,
            num_attention_heads=4,
            cross_attention_frequency=1,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        placeholder_id=placeholder_id,
        frames_per_second=2.0,
        max_frames=16,
    )


def save(network: Network, config: ModelConfig, path: Path | str) -> None:
    """Write config.json and model.safetensors to a folder; the weights must carry no adapter."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".{WEIGHTS_NAME}.tmp"
    safetensors.torch.save_model(network, str(temporary))
    temporary.chmod(0o644)  # safetensors writes for the owner alone
    temporary.replace(path / WEIGHTS_NAME)
    # The config comes last: a folder that has one is whole.
    write_json(path / CONFIG_NAME, asdict(config))


def load_config(path: Path | str) -> ModelConfig:
    """Read a model folder's config.json.

    Raises:
        ValueError: the folder is no model of this project; the message says what is missing or unknown.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"no model in {path}: there is no {CONFIG_NAME}. Give the folder of a saved model.")
    values = json.loads(file.read_text(encoding="utf-8"))
    try:
        return ModelConfig(**values)
    except TypeError as error:
        raise ValueError(f"{file} is not a config of this project: {error}") from error


def load(path: Path | str) -> tuple[Network, ModelConfig]:
    """Build the network that a folder describes and load its weights.

    Raises:
        ValueError: the folder or its weights do not fit; the message names missing and unexpected keys.
    """
    config = load_config(path)
    network = build(config)
    weights = Path(path) / WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{path} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: the folder is incomplete")
    try:
        missing, unexpected = safetensors.torch.load_model(network, str(weights), strict=False)
    except (RuntimeError, safetensors.SafetensorError) as error:  # sizes that differ; a damaged file
        raise ValueError(f"{weights} does not fit its config, or is damaged: {error}") from error
    if missing or unexpected:
        raise ValueError(
            f"{weights} does not fit its config: missing {sorted(missing) or 'none'}, "
            f"unexpected {sorted(unexpected) or 'none'}"
        )
    return network.eval(), config
