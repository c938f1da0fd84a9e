"""video-SALMONN 2: SigLIP on single frames, Whisper with a window Q-Former, and Qwen2 with plain rotary positions."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.model.config import STEPS_PER_SECOND, SalmonnConfig
from salmonn.model.families.base import (
    BERT_BASE_2_LAYERS,
    QFORMER_WEIGHT_NAMES,
    WHISPER_LARGE_V3,
    Family,
    convert_qformer_config,
)
from salmonn.model.layout import ClipInputs, Layout
from salmonn.model.towers import AudioTower, SiglipTower
from salmonn.records import Modality

SIGLIP_SO400M: dict[str, Any] = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
    image_size=384, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
)  # fmt: skip
# The config.json of the published model; its code names the other parts.
PUBLISHED_7B: dict[str, Any] = dict(
    model_type="video_salmonn_2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768, hidden_act="silu", rms_norm_eps=1e-6,
    rope_theta=1_000_000.0, tie_word_embeddings=False, bos_token_id=151643, eos_token_id=151645, add_time_token=True,
    mm_spatial_pool_stride=2, audio_config=dict(second_per_window=0.5, num_speech_query_token=1),
)  # fmt: skip
LM_KEYS = [
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    "attention_dropout", "bos_token_id", "pad_token_id", "eos_token_id",
]  # fmt: skip


class Salmonn2(Family):
    """video-SALMONN 2. The audio that belongs to a frame follows it; positions count up."""

    name = "salmonn2"
    title = "video-SALMONN 2 (video_salmonn_2)"
    # The published caption prompt, and its parts for one modality.
    prompts: ClassVar[Mapping[Modality, str]] = {
        "both": "Give a detailed account of everything in the video, capturing all the specifics. While doing so, also "
        "include as much information from the audio as possible, ensuring that the descriptions of audio and video are "
        "well-synchronized.",
        "visual": "Give a detailed account of everything in the video, capturing all the specifics.",
        "audio": "Give a detailed account of everything in the audio, capturing all the specifics.",
    }
    published_configs: ClassVar[Mapping[str, dict[str, Any]]] = {"tsinghua-ee/video-SALMONN-2": PUBLISHED_7B}
    weight_names: ClassVar[Mapping[str, str]] = {
        r"^model\.vision_tower\.vision_tower\.vision_model\.": "vision.encoder.",
        r"^model\.mm_projector\.": "vision.projector.",
        r"^model\.image_newline": "vision.newline",
        r"^model\.(layers|norm|embed_tokens)\.": r"lm.model.\1.",
        r"^lm_head\.": "lm.lm_head.",
        r"^speech_encoder\.": "audio.encoder.",
        r"^ln_speech\.": "audio.norm.",
        r"^speech_query_tokens": "audio.qformer.queries",
        r"^speech_llama_proj\.": "audio.projector.0.",
        r"^final_linear\.0\.": "audio.projector.1.",
        r"^final_linear\.2\.": "audio.projector.3.",
        **{rf"^speech_Qformer\.{pattern}": ours for pattern, ours in QFORMER_WEIGHT_NAMES.items()},
    }
    decoder_prefix = "model."
    sampler_class = FixedRateSampler

    @classmethod
    def can_read(cls, values: Mapping[str, Any]) -> bool:
        return bool(values.get("config", values).get("model_type") == "video_salmonn_2")

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> SalmonnConfig:
        flat = values.get("config", values)
        # The published code keeps its command line in the config.
        audio = values.get("audio_config") or flat.get("model_args") or {}
        if audio.get("mm_pooling_position", "after") != "after" or audio.get("mm_spatial_pool_mode", "max") != "max":
            raise ValueError(
                "the checkpoint pools patches in an unsupported way; use one with max pooling after the projection"
            )
        siglip = SIGLIP_SO400M | {key: values["siglip"][key] for key in SIGLIP_SO400M if "siglip" in values}
        whisper = WHISPER_LARGE_V3 | {key: values["whisper"][key] for key in WHISPER_LARGE_V3 if "whisper" in values}
        qformer = BERT_BASE_2_LAYERS | values.get("qformer", {})
        return SalmonnConfig(
            family=cls.name,
            lm={key: flat[key] for key in LM_KEYS if key in flat},
            # The published features are the input of the last layer.
            vision=siglip | {"num_hidden_layers": siglip["num_hidden_layers"] - 1, "vision_use_head": False},
            whisper=whisper,
            qformer=convert_qformer_config(qformer, encoder_width=whisper["d_model"]),
            num_queries=audio.get("num_speech_query_token", 1),
            window_seconds=audio.get("second_per_window", 0.5),
            stride_seconds=audio.get("second_stride"),
            tail_tolerance_seconds=0.0,
            timestamp_tokens=flat.get("add_time_token", True),
            frames={"side": siglip["image_size"]},
            prompts=dict(cls.prompts),
            max_new_tokens=1024,
            batch_size=1,
            pool=flat.get("mm_spatial_pool_stride") or 2,
            tie_word_embeddings=flat.get("tie_word_embeddings", False),
        )

    def build_parts(self, *, attn_implementation: str | None) -> tuple[nn.Module, AudioTower, Any]:
        config = self.config
        lm = Qwen2ForCausalLM(Qwen2Config(**config.lm, attn_implementation=attn_implementation))
        width = lm.config.hidden_size
        encoder = SiglipVisionModel(SiglipVisionConfig(**config.vision, attn_implementation=attn_implementation))
        vision = SiglipTower(encoder, _mlp(encoder.config.hidden_size, width), width=width, pool=config.pool)
        audio = self.build_audio_tower(width=width, attn_implementation=attn_implementation)
        audio.norm = nn.LayerNorm(audio.encoder.config.d_model)
        audio.projector = nn.Sequential(audio.projector, *_mlp(width, width))
        audio.adds_chunk_positions = True
        return vision, audio, lm

    def clip_inputs(self, frames: Tensor, mel: Tensor, *, seconds: float) -> ClipInputs:
        return ClipInputs(frames.contiguous(), mel, num_frames=len(frames), seconds=seconds)

    def max_audio_seconds(self, video_seconds: float) -> float | None:
        """Return the duration of the video, or without one that of the longest video sampled at the full rate."""
        sampler = self.frame_sampler
        assert isinstance(sampler, FixedRateSampler)
        return video_seconds or sampler.max_seconds

    def timestamps(self, clip: ClipInputs) -> list[str]:
        """Return the end time of each frame in seconds for clips without audio."""
        if not self.config.timestamp_tokens or len(clip.mel):
            return []
        step = clip.seconds / max(clip.num_frames, 1)
        return [str(round(step * number, 1)) for number in range(1, clip.num_frames + 1)]

    def layout(
        self, clip: ClipInputs, *, timestamp_ids: Sequence[Sequence[int]] = (), published_positions: bool = False
    ) -> Layout:
        assert not published_positions
        return interleave_by_frame(
            clip.num_frames,
            self.tokens_per_frame,
            num_audio=len(clip.mel) * self.config.tokens_per_chunk,
            # The published code counts encoder steps here, although a second has two tokens.
            num_during_video=round(clip.seconds * STEPS_PER_SECOND),
            timestamp_ids=timestamp_ids,
        )

    @property
    def tokens_per_frame(self) -> int:
        """Number of tokens of a frame: a square of pooled patches, with one more at the end of each row."""
        side = self.config.vision["image_size"] // self.config.vision["patch_size"] // self.config.pool
        return int(side * (side + 1))

    def surround_clip(self, before: str, after: str) -> tuple[str, list[str]]:
        """Add a line break behind the clip. Tokenized with the one that follows it, it would become a single token."""
        return before, ["\n", after]

    def rotary_positions(self, position_ids: Tensor) -> Tensor:
        """Return the first of three equal rows, (B, L)."""
        return position_ids[0]

    def count_patches(self, clip: ClipInputs) -> int:
        per_side: int = self.config.vision["image_size"] // self.config.vision["patch_size"]
        return clip.num_frames * per_side**2

    def vision_peak_bytes(self, clip: ClipInputs, *, patch_bytes: int, weight_bytes: int, matmul_bytes: int) -> int:
        """See `Family`.

        First the uint8 pixels and two scaled copies; then a layer's temporaries or three tensors of the projector.
        """
        num_pixels = clip.pixels.numel()
        of_patch = max(patch_bytes, 3 * matmul_bytes * int(self.config.lm["hidden_size"]))
        return num_pixels + max(2 * weight_bytes * num_pixels, self.count_patches(clip) * of_patch)


def _mlp(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))


def interleave_by_frame(
    num_frames: int,
    frame_tokens: int,
    *,
    num_audio: int,
    num_during_video: int,
    timestamp_ids: Sequence[Sequence[int]] = (),
) -> Layout:
    """Lay out each frame, then its share of the audio tokens or its timestamp; positions count up.

    The first `num_during_video` audio tokens are stretched to a multiple of the number of frames, by repeating the
    nearest, and distributed evenly; the others follow at the end. Timestamps are padded with zeros to the longest.

    Args:
        num_frames: F.
        frame_tokens: P tokens of each frame.
        num_audio: A audio tokens.
        num_during_video: number of audio tokens that belong to the duration of the video.
        timestamp_ids: (F,) token ids of each frame's timestamp.
    """
    visual = torch.arange(num_frames * frame_tokens).reshape(num_frames, frame_tokens)
    audio = torch.arange(num_audio) + visual.numel()
    order = audio
    if num_frames:
        front = min(num_during_video, num_audio)
        per_frame = -(-front // num_frames)
        shares = audio[:front]
        if front:  # stretched by the nearest, rounding in float32 as the published code does
            wide = F.interpolate(shares[None, None].float(), size=per_frame * num_frames, mode="nearest")
            shares = wide[0, 0].long()
        columns = [visual, shares.reshape(num_frames, per_frame)]
        if timestamp_ids:
            start = visual.numel() + num_audio
            lengths = [len(ids) for ids in timestamp_ids]
            # Index start + sum(lengths) is one past the last token: it stands for zeros.
            padded = torch.full((num_frames, max(lengths)), start + sum(lengths))
            for row, length in enumerate(lengths):
                padded[row, :length] = torch.arange(length) + start + sum(lengths[:row])
            columns.append(padded)
        order = torch.cat([torch.cat(columns, dim=1).flatten(), audio[front:]])
    flat_ids = tuple(token for ids in timestamp_ids for token in ids)
    return Layout(order, torch.arange(len(order)).expand(3, -1), visual.numel(), flat_ids)


def tiny_config(*, vocab_size: int, eos_token_id: int, pad_token_id: int) -> SalmonnConfig:
    """Return the config of the shipped toy model: about 2 million parameters, clips of 8 s at 2 frames per second.

    It is a video-SALMONN 2, the same code at a thousandth of the size.

    Fresh weights have a standard deviation of about 1 / sqrt(width). The published 0.02 suits widths of thousands: at
    this size, Whisper's convolutions would output a hundredth of its fixed position embeddings, and the pitch would be
    lost.
    """
    std = 0.09
    # Whisper's decoder is never built, but transformers validates its config.
    whisper_decoder = dict(
        decoder_layers=1, vocab_size=vocab_size, decoder_start_token_id=pad_token_id, pad_token_id=pad_token_id,
        bos_token_id=pad_token_id, eos_token_id=eos_token_id,
    )  # fmt: skip
    return SalmonnConfig(
        family=Salmonn2.name,
        lm=dict(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=4096, initializer_range=std, tie_word_embeddings=True,
            eos_token_id=eos_token_id, pad_token_id=pad_token_id, bos_token_id=None,
        ),
        vision=dict(
            image_size=48, patch_size=16, hidden_size=96, intermediate_size=288, num_hidden_layers=3,
            num_attention_heads=4, vision_use_head=False,
        ),
        whisper=dict(
            num_mel_bins=40, max_source_positions=400, d_model=96, encoder_layers=2, encoder_attention_heads=4,
            encoder_ffn_dim=288, init_std=0.1, **whisper_decoder,
        ),
        qformer=dict(
            hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
            cross_attention_frequency=1, initializer_range=0.1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, encoder_hidden_size=96,
        ),
        pool=1,
        frames=dict(frames_per_second=2.0, max_frames=16, side=48),
        timestamp_tokens=False,
        system_prompt="",
        batch_size=32,  # a decode step of 32 clips takes little longer than of one
        initializer_range=std,
        tie_word_embeddings=True,
    )  # fmt: skip
