"""Interface of a model family: everything that differs between backbones.

To add a backbone, write one file in this folder with a subclass of `Family`, and list it in
`salmonn.model.families.FAMILIES`. All other code works through this interface: nothing outside this folder compares
`config.family` with a name.
"""

import copy
import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.frame_sampling import FrameSampler
from salmonn.model.config import STEPS_PER_SECOND, SalmonnConfig
from salmonn.model.layout import ClipInputs, Layout
from salmonn.model.towers import AudioTower, WindowQFormer, to_patches
from salmonn.records import Modality

# The chat format of Qwen2, with the names that Qwen2.5-VL and video-SALMONN 2+ give to the tokens of a clip.
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CLIP_START, CLIP_END = "<|vision_start|>", "<|vision_end|>"
VIDEO_PAD, AUDIO_PAD = "<|video_pad|>", "<|audio_pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MIN_AUDIO_SECONDS = 1.0  # shorter audio is padded with silence to this length, as in the training of published models

# Published configs name Whisper's repository instead of its sizes. These are also all keys that are read of a Whisper.
WHISPER_LARGE_V3: dict[str, Any] = dict(
    num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
    max_source_positions=1500, activation_function="gelu", scale_embedding=False,
)  # fmt: skip
BERT_BASE_2_LAYERS: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12, hidden_act="gelu",
    layer_norm_eps=1e-12, cross_attention_freq=1, query_length=1,
)  # fmt: skip
# Names of the published Q-Former's weights, behind the prefix that each family gives to it.
QFORMER_WEIGHT_NAMES = {
    r"bert\.embeddings\.LayerNorm\.": "audio.qformer.qformer.layernorm.",
    r"bert\.encoder\.layer\.(\d+\.(?:attention|crossattention))\.self\.": (
        r"audio.qformer.qformer.encoder.layer.\1.attention."
    ),
    r"bert\.encoder\.layer\.(\d+\.(?:\w+\.output|intermediate_query|output_query))\.": (
        r"audio.qformer.qformer.encoder.layer.\1."
    ),
}


class Family(ABC):
    """One backbone, bound to the config of one model.

    Attributes:
        name: value of `config.family`.
        title: name and model type for error messages.
        prompts: default prompts of published models.
        published_configs: config.json of published models by hub id, as `read_config` takes it. Dry runs use them
            without a network connection.
        weight_names: patterns of weight names in published checkpoints, with their replacements.
        decoder_prefix: path of the decoder within `Network.lm`; published adapters have "model." in its place.
        sampler_class: frame sampler, whose arguments are `config.frames`.
        chat_template: Jinja template of a chat, as transformers takes it.
        turn_end, pad_token: token that ends a message of this template, and token of the padding; both end an answer.
        required_tokens: special tokens that the tokenizer must have.
        placeholder_tokens: tokens that stand for visual and audio tokens in the text, unless their ids are negative.
        config_parts: sections that a saved config.json must have.
        ignored_weights: patterns of weights in published checkpoints that belong to parts without influence on text.
        hears: whether the model takes audio.
        penalizes_prompt: whether the repetition penalty covers the prompt, or the answer alone.
        has_published_positions: whether `layout` can number positions as the published inference code does.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    prompts: ClassVar[Mapping[Modality, str]]
    published_configs: ClassVar[Mapping[str, dict[str, Any]]]
    weight_names: ClassVar[Mapping[str, str]]
    decoder_prefix: ClassVar[str]
    sampler_class: ClassVar[Any]
    chat_template: ClassVar[str] = CHAT_TEMPLATE
    turn_end: ClassVar[str] = TURN_END
    pad_token: ClassVar[str] = PAD
    required_tokens: ClassVar[tuple[str, ...]] = (PAD, TURN_START, TURN_END)
    placeholder_tokens: ClassVar[tuple[str, str]] = (VIDEO_PAD, AUDIO_PAD)
    config_parts: ClassVar[tuple[str, ...]] = ("lm", "whisper", "qformer")
    ignored_weights: ClassVar[tuple[str, ...]] = ()
    hears: ClassVar[bool] = True
    penalizes_prompt: ClassVar[bool] = False
    has_published_positions: ClassVar[bool] = False

    def __init__(self, config: SalmonnConfig) -> None:
        self.config = config

    # Loading

    @classmethod
    @abstractmethod
    def can_read(cls, values: Mapping[str, Any]) -> bool:
        """Return whether a published config.json describes a model of this family."""

    @classmethod
    @abstractmethod
    def read_config(cls, values: dict[str, Any]) -> SalmonnConfig:
        """Convert a published config.json.

        Raises:
            ValueError: the checkpoint has an option that is not supported.
        """

    @abstractmethod
    def build_parts(self, *, attn_implementation: str | None) -> tuple[nn.Module, nn.Module | None, Any]:
        """Build vision tower, audio tower (None if the model does not hear) and language model, with fresh weights.

        A tower returns the tokens of each clip: (N_i, D), or (N_i, (1 + K) D) from a vision tower with deep features,
        see `num_deep_layers`. The vision tower takes the `pixels` and the `grid` of each clip's `ClipInputs`, the audio
        tower each clip's `mel`. The encoder itself, a model of transformers, is their attribute `encoder`.

        Args:
            attn_implementation: attention of the towers, as transformers names it.
        """

    @property
    def num_deep_layers(self) -> int:
        """Number K of the decoder's first layers after which features of the vision tower are added (DeepStack).

        The decoder takes them as `visual_pos_masks` and `deepstack_visual_embeds`, as those of transformers do.
        """
        return 0

    @classmethod
    def own_weight_name(cls, name: str) -> str:
        """Return our name of a weight of a published checkpoint; a name that is ours already may change."""
        for pattern, replacement in cls.weight_names.items():
            name = re.sub(pattern, replacement, name)
        return name

    def split_weight(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of a weight that published checkpoints have one by one, such as experts, by our names."""
        return {name: weight}

    # From a clip to model inputs

    @property
    def frame_sampler(self) -> FrameSampler:
        """The rule that chooses and scales the frames of a clip."""
        sampler: FrameSampler = self.sampler_class(**(self.config.frames or {}))
        return sampler

    def with_frames(self, frames: Mapping[str, float | None] | None) -> SalmonnConfig:
        """Return a copy of the config with changed arguments of the frame sampler, such as more frames for training.

        Raises:
            ValueError: the sampler has no such argument.
        """
        changed = copy.deepcopy(self.config)
        arguments = {**(self.config.frames or {}), **(frames or {})}
        if frames:
            changed.frames = arguments
        known = [field.name for field in dataclasses.fields(self.sampler_class)]
        if unknown := sorted(arguments.keys() - known):
            raise ValueError(
                f"frames has no option {', '.join(unknown)} for a {self.name} model; its options are {', '.join(known)}"
            )
        return changed

    @abstractmethod
    def clip_inputs(self, frames: Tensor, mel: Tensor, *, seconds: float) -> ClipInputs:
        """Convert sampled frames and log-mel chunks to the towers' inputs.

        Args:
            frames: (F, 3, H, W) uint8, scaled by the frame sampler.
            mel: (C, M, T) log-mel chunks.
            seconds: duration of the video.
        """

    def max_audio_seconds(self, video_seconds: float) -> float | None:
        """Return the duration that longer audio is cut to; None for no limit."""
        return None

    @cached_property
    def mel_extractor(self) -> WhisperFeatureExtractor:
        """Whisper's log-mel features of the audio encoder's chunks."""
        return WhisperFeatureExtractor(
            feature_size=self.config.whisper["num_mel_bins"], chunk_length=self.config.chunk_seconds
        )

    def log_mel(self, waveform: np.ndarray) -> Tensor:
        """Compute the log-mel chunks (C, M, T) of audio (S,) at 16 kHz, not longer than `max_audio_seconds`."""
        chunk = self.config.chunk_seconds * SAMPLE_RATE_HZ
        num_chunks = self.mel_shape(len(waveform) / SAMPLE_RATE_HZ)[0]
        chunks = [waveform[number * chunk : (number + 1) * chunk] for number in range(num_chunks)]
        features: Tensor = self.mel_extractor(chunks, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
        return features

    def mel_shape(self, seconds: float) -> tuple[int, int, int]:
        """Return the shape (C, M, T) of the log-mel chunks of an audio duration."""
        config = self.config
        duration = max(seconds, MIN_AUDIO_SECONDS) - config.tail_tolerance_seconds
        return (
            math.ceil(duration / config.chunk_seconds),
            config.whisper["num_mel_bins"],
            config.chunk_seconds * 2 * STEPS_PER_SECOND,
        )

    # From model inputs to tokens

    def timestamps(self, clip: ClipInputs) -> list[str]:
        """Return the texts that the layout inserts among the clip's tokens, such as a frame's time or a marker."""
        return []

    @abstractmethod
    def layout(
        self, clip: ClipInputs, *, timestamp_ids: Sequence[Sequence[int]] = (), published_positions: bool = False
    ) -> Layout:
        """Return order and rotary positions of a clip's tokens.

        Args:
            clip: the towers' inputs; only their sizes matter.
            timestamp_ids: token ids of each of the `timestamps`.
            published_positions: number positions as the published inference code does instead of as in training.
        """

    @abstractmethod
    def surround_clip(self, before: str, after: str) -> tuple[str, list[str]]:
        """Put the family's markers around a clip's tokens in a chat.

        Args:
            before: text of the chat in front of the clip.
            after: text behind it.

        Returns:
            The text in front of the clip's tokens, and the texts behind them; each is tokenized separately.
        """

    @abstractmethod
    def rotary_positions(self, position_ids: Tensor) -> Tensor:
        """Select what the decoder's rotary embedding takes of (3, B, L) positions: (3, B, L) or (B, L)."""

    # Dry run

    @abstractmethod
    def count_patches(self, clip: ClipInputs) -> int:
        """Return the number of patches in the vision encoder's layers."""

    @abstractmethod
    def vision_peak_bytes(self, clip: ClipInputs, *, patch_bytes: int, weight_bytes: int, matmul_bytes: int) -> int:
        """Return the peak memory of the vision tower in inference.

        Args:
            clip: the towers' inputs.
            patch_bytes: temporaries of a transformer layer for each patch.
            weight_bytes: size of a number in weights and between layers.
            matmul_bytes: size of a number in matrix products.
        """

    def count_audio_steps(self, clip: ClipInputs) -> int:
        """Return the number of steps in the audio encoder's layers: its first convolutions halve that of the mel."""
        return len(clip.mel) * (clip.mel.shape[-1] // 2)

    def build_audio_tower(self, *, width: int, attn_implementation: str | None) -> AudioTower:
        """Build the Whisper encoder, the window Q-Former and a linear projection to width D."""
        config = self.config
        encoder = WhisperEncoder(WhisperConfig(**config.whisper, attn_implementation=attn_implementation))
        qformer = Blip2QFormerModel(Blip2QFormerConfig(**config.qformer))
        window = WindowQFormer(
            qformer, num_queries=config.num_queries, window=config.window_steps, stride=config.stride_steps
        )
        return AudioTower(encoder, window, nn.Linear(qformer.config.hidden_size, width))


class GridFamily(Family):
    """A backbone with a vision tower for patches on a grid and 3-D rotary positions, as Qwen2-VL and its successors."""

    @property
    def vision_config(self) -> dict[str, Any]:
        """Arguments of the vision tower's config."""
        values: dict[str, Any] = self.config.lm["vision_config"]
        return values

    @property
    def num_deep_layers(self) -> int:
        return len(self.vision_config.get("deepstack_visual_indexes", ()))

    def clip_inputs(self, frames: Tensor, mel: Tensor, *, seconds: float) -> ClipInputs:
        vision = self.vision_config
        pixels, grid = to_patches(frames, patch=vision["patch_size"], merge=vision["spatial_merge_size"])
        return ClipInputs(pixels, mel, num_frames=len(frames), seconds=seconds, grid=grid)

    def token_grid(self, clip: ClipInputs) -> tuple[int, int, int] | None:
        """Return the steps, rows and columns of a clip's visual tokens; None without video."""
        steps, rows, columns = clip.grid
        merge = self.vision_config["spatial_merge_size"]
        return (steps, rows // merge, columns // merge) if clip.num_frames else None

    def surround_clip(self, before: str, after: str) -> tuple[str, list[str]]:
        """Remove the line break behind the clip, so that the prompt follows it directly."""
        return before, [after.removeprefix("\n")]

    def rotary_positions(self, position_ids: Tensor) -> Tensor:
        """Return all three rows, (3, B, L)."""
        return position_ids

    def count_patches(self, clip: ClipInputs) -> int:
        return len(clip.pixels)

    def vision_peak_bytes(self, clip: ClipInputs, *, patch_bytes: int, weight_bytes: int, matmul_bytes: int) -> int:
        """See `Family`.

        First the uint8 pixels and two float32 copies while they are normalized; then the first layer's temporaries.
        Attention rotates queries and keys in float32 (4 D of 4 bytes, with 3 D in matrix products). Or four position
        embeddings of each patch, where there are any, while they are looked up and weighted (8 D).
        """
        num_pixels, width = clip.pixels.numel(), int(self.vision_config["hidden_size"])
        attention = width * (4 * 4 + 3 * matmul_bytes + 2 * weight_bytes)
        lookup = 8 * width * weight_bytes if "num_position_embeddings" in self.vision_config else 0
        return num_pixels + max(2 * 4 * num_pixels, len(clip.pixels) * max(attention, patch_bytes, lookup))


def without_dtypes(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the types that a checkpoint was saved in; the type that it is loaded in is chosen elsewhere."""
    kept = {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")}
    return {key: without_dtypes(value) if isinstance(value, dict) else value for key, value in kept.items()}


def convert_qformer_config(bert: Mapping[str, Any], *, encoder_width: int) -> dict[str, Any]:
    """Convert a published Q-Former's config, which has BERT's keys, to those of transformers' BLIP-2."""
    shared = [
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
        "hidden_dropout_prob", "attention_probs_dropout_prob",
    ]  # fmt: skip
    return {key: bert[key] for key in shared if key in bert} | {
        "encoder_hidden_size": encoder_width,
        "cross_attention_frequency": bert["cross_attention_freq"],
    }
