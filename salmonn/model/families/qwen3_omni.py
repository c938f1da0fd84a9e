"""Qwen3-Omni: its thinker, with the vision transformer of Qwen3-VL, its own audio encoder and a mixture of experts.

The weights of talker and code2wav, which speak, are ignored. Qwen3-Omni-30B-A3B-Captioner is such a model for audio.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from transformers import GenerationMixin, Qwen3OmniMoeThinkerConfig, WhisperFeatureExtractor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoePreTrainedModel,
    Qwen3OmniMoeThinkerTextModel,
    Qwen3OmniMoeVisionEncoder,
)

from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.model.attention import use_window_attention
from salmonn.model.families.base import AUDIO_PAD, CLIP_END, CLIP_START, VIDEO_PAD, GridFamily
from salmonn.model.families.qwen2_5_omni import Qwen2_5Omni, surround
from salmonn.model.layout import Layout
from salmonn.model.towers import QwenTower, UnpaddedAudioTower

# The thinker in the config.json of Qwen/Qwen3-Omni-30B-A3B-Instruct, without the defaults of transformers' classes.
PUBLISHED_30B: dict[str, Any] = dict(
    model_type="qwen3_omni_moe",
    thinker_config=dict(
        text_config=dict(
            vocab_size=152064, hidden_size=2048, intermediate_size=768, moe_intermediate_size=768,
            num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], hidden_act="silu",
            max_position_embeddings=65536, rms_norm_eps=1e-6, rope_theta=1_000_000, attention_bias=False,
            rope_scaling=dict(rope_type="default", mrope_interleaved=True, mrope_section=[24, 20, 20]),
            use_sliding_window=False, tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=27, hidden_size=1152, hidden_act="gelu_pytorch_tanh", intermediate_size=4304, num_heads=16,
            in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=2048,
            num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24],
        ),
        audio_config=dict(
            num_mel_bins=128, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, d_model=1280,
            activation_function="gelu", scale_embedding=False, max_source_positions=1500, n_window=50,
            n_window_infer=800, conv_chunksize=500, downsample_hidden_size=480, output_dim=2048,
        ),
        audio_token_id=151675, image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653, audio_start_token_id=151669, audio_end_token_id=151670,
        position_id_per_seconds=13, seconds_per_chunk=2, tie_word_embeddings=False,
    ),
)  # fmt: skip
MIN_SAMPLES = 320  # the fewest that Whisper's features can be computed from


class Qwen3Omni(Qwen2_5Omni):
    """Qwen3-Omni's thinker. Video and audio tokens are interleaved by time; positions are 13 a second.

    The vision tower outputs each token's embedding and K deep features, which are added to its hidden states after the
    decoder's first K layers.
    """

    name = "qwen3-omni"
    title = "Qwen3-Omni (qwen3_omni_moe)"
    published_configs: ClassVar[Mapping[str, dict[str, Any]]] = {
        "Qwen/Qwen3-Omni-30B-A3B-Instruct": PUBLISHED_30B,
        "Qwen/Qwen3-Omni-30B-A3B-Captioner": PUBLISHED_30B,
    }
    required_tokens = (*GridFamily.required_tokens, CLIP_START, CLIP_END, "<|audio_start|>", "<|audio_end|>")
    placeholder_tokens = (VIDEO_PAD, AUDIO_PAD)
    ignored_weights = (r"^talker\.", r"^code2wav\.")
    config_class = Qwen3OmniMoeThinkerConfig
    model_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    default_system_prompt = ""
    default_positions_per_second = 13
    published_frames_per_second = 1.0  # the default of transformers' processor, although Qwen samples two a second
    # Qwen's limits in tokens: 128 to 768 in two frames, and 0.9 * 128,000 in all.
    default_frames: ClassVar[dict[str, int]] = {
        "min_pixels": 131_072, "max_pixels": 786_432, "total_pixels": 117_964_800,
    }  # fmt: skip

    def build_parts(self, *, attn_implementation: str | None) -> tuple[nn.Module, nn.Module, Any]:
        config = Qwen3OmniMoeThinkerConfig(**self.config.lm, attn_implementation=attn_implementation)
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        register_expert_names()
        vision = QwenTower(
            Qwen3OmniMoeVisionEncoder(config.vision_config), mean=IMAGENET_STANDARD_MEAN, std=IMAGENET_STANDARD_STD
        )
        audio = UnpaddedAudioTower(Qwen3OmniMoeAudioEncoder(config.audio_config), count_tokens=self.count_audio_tokens)
        for tower in (vision, audio):
            use_window_attention(tower.encoder.config)
        return vision, audio, Qwen3OmniDecoder(config.text_config)

    def split_weight(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Return the matrices of each expert; see `Family`."""
        if ".mlp.experts." not in name:
            return {name: weight}
        start, _, part = name.rpartition(".")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
        return {
            f"{start}.{number}.{half}.weight": matrix.contiguous()
            for number, expert in enumerate(weight)
            for half, matrix in zip(names, expert.chunk(len(names)), strict=True)
        }

    # Audio

    def max_audio_seconds(self, video_seconds: float) -> float | None:
        """Return None: audio is not cut off."""
        return None

    @cached_property
    def mel_extractor(self) -> WhisperFeatureExtractor:
        """Whisper's log-mel features of any length."""
        return WhisperFeatureExtractor(feature_size=self.config.lm["audio_config"]["num_mel_bins"])

    def log_mel(self, waveform: np.ndarray) -> Tensor:
        """Compute log-mel features (1, M, T), one frame for each whole 10 ms, of audio (S,) at 16 kHz."""
        padded = np.pad(waveform, (0, max(MIN_SAMPLES - len(waveform), 0)))
        features: Tensor = self.mel_extractor(
            padded, sampling_rate=SAMPLE_RATE_HZ, padding=True, truncation=False, return_tensors="pt"
        ).input_features
        return features

    def mel_shape(self, seconds: float) -> tuple[int, int, int]:
        """Return the shape (1, M, T) of the log-mel features of an audio duration."""
        samples = max(round(seconds * SAMPLE_RATE_HZ), MIN_SAMPLES)
        return 1, self.config.lm["audio_config"]["num_mel_bins"], samples // self.mel_extractor.hop_length

    def count_audio_tokens(self, num_frames: int) -> int:
        """Return the number of audio tokens for a number of mel frames: an eighth of each chunk's, 13 a second."""
        chunk = 2 * int(self.config.lm["audio_config"].get("n_window", 50))
        per_chunk = _eighth(chunk)
        return num_frames // chunk * per_chunk + _eighth(num_frames % chunk)

    # Layout

    def interleave(self, positions: Tensor, *, num_visual: int, markers: Sequence[Sequence[int]]) -> Layout:
        """Lay out all tokens by their first position, visual ones first, between markers; see `Qwen2_5Omni`."""
        order = positions[0].argsort(stable=True)
        return surround(order, positions, num_visual=num_visual, markers=markers, marker_step=1)


def register_expert_names() -> None:
    """Let transformers join the matrices of all experts, which published checkpoints have one by one.

    Recent releases do it for the text model wherever it is, others for the whole thinker alone.
    """
    if get_checkpoint_conversion_mapping("qwen3_omni_moe_text") is None:
        mapping = get_checkpoint_conversion_mapping("qwen3_omni_moe_thinker")
        register_checkpoint_conversion_mapping(Qwen3OmniDecoder.__name__, mapping, overwrite=True)


def _eighth(num_frames: int) -> int:
    """Return the number of frames after three convolutions, which halve it and round up."""
    for _ in range(3):
        num_frames = (num_frames + 1) // 2
    return num_frames


class Qwen3OmniDecoder(Qwen3OmniMoePreTrainedModel, GenerationMixin):
    """The thinker's text model with its output embeddings, without the towers."""

    config: Qwen3OmniMoeTextConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen3OmniMoeTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen3OmniMoeThinkerTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
