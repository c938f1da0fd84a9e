"""Qwen2.5-Omni: its thinker, which reads video and audio in turn, two seconds of each at a time, and writes text.

AVoCaDO, AVSCap, TimeChat-Captioner, ASID-Captioner, OmniCaptioner-IF and UGC-VideoCaptioner are such models. The
weights of the talker, which speaks, are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerConfig, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniPreTrainedModel,
    Qwen2_5OmniThinkerTextModel,
    Qwen2_5OmniVisionEncoder,
)

from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.frame_sampling import EvenCountSampler
from salmonn.model.attention import use_window_attention
from salmonn.model.config import SalmonnConfig
from salmonn.model.families.base import GridFamily, without_dtypes
from salmonn.model.families.salmonn2_plus import Salmonn2Plus
from salmonn.model.layout import ClipInputs, Layout
from salmonn.model.towers import QwenTower, UnpaddedAudioTower
from salmonn.records import Modality

SYSTEM_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
MAX_AUDIO_SECONDS = 300  # chunk_length of the published preprocessor_config.json
MIN_MEL_FRAMES = 3  # audio that is shorter has no token; it is padded with silence


def _published_config(*, width: int = 3584, vision_intermediate: int = 3420, **decoder: Any) -> dict[str, Any]:
    """Return the config.json of a size, without talker and token2wav, by its differences from the 7B model."""
    text = dict(
        vocab_size=152064, hidden_size=width, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, hidden_act="silu", max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1_000_000.0, rope_scaling=dict(rope_type="default", type="default", mrope_section=[16, 24, 24]),
        use_sliding_window=False,
    )  # fmt: skip
    vision = dict(
        depth=32, hidden_size=1280, hidden_act="silu", intermediate_size=vision_intermediate, num_heads=16,
        in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
        out_hidden_size=width, fullatt_block_indexes=[7, 15, 23, 31],
    )  # fmt: skip
    audio = dict(
        num_mel_bins=128, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, d_model=1280,
        activation_function="gelu", scale_embedding=False, max_source_positions=1500, n_window=100, output_dim=width,
    )  # fmt: skip
    thinker = dict(
        text_config=text | decoder, vision_config=vision, audio_config=audio, audio_token_index=151646,
        image_token_index=151655, video_token_index=151656, position_id_per_seconds=25, seconds_per_chunk=2,
        audio_start_token_id=151647, audio_end_token_id=151648, vision_start_token_id=151652,
        vision_end_token_id=151653, tie_word_embeddings=False,
    )  # fmt: skip
    return dict(model_type="qwen2_5_omni", thinker_config=thinker)


PUBLISHED_7B = _published_config()
PUBLISHED_3B = _published_config(
    width=2048, vocab_size=151936, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
    num_key_value_heads=2,
)  # fmt: skip


class Qwen2_5Omni(GridFamily):
    """Qwen2.5-Omni's thinker. Positions are time, row and column, 25 a second (TMRoPE, arXiv 2503.20215)."""

    name = "qwen2.5-omni"
    title = "Qwen2.5-Omni (qwen2_5_omni)"
    # ASID-Captioner's demo has the prompt of video-SALMONN 2+; a captioner with another prompt takes it with --prompt.
    prompts: ClassVar[Mapping[Modality, str]] = Salmonn2Plus.prompts
    published_configs: ClassVar[Mapping[str, dict[str, Any]]] = {
        "Qwen/Qwen2.5-Omni-7B": PUBLISHED_7B,
        "Qwen/Qwen2.5-Omni-3B": PUBLISHED_3B,
        "AVoCaDO-Captioner/AVoCaDO": PUBLISHED_7B,
    }
    # The names of published checkpoints, of a thinker that was saved alone, and of one that recent transformers saved.
    weight_names: ClassVar[Mapping[str, str]] = {
        r"^(?:thinker\.)?(?:model\.)?visual\.": "vision.encoder.",
        r"^(?:thinker\.)?(?:model\.)?audio_tower\.": "audio.encoder.",
        r"^(?:thinker\.)?model\.(?:language_model\.)?(layers|norm|embed_tokens)\.": r"lm.model.\1.",
        r"^(?:thinker\.)?lm_head\.": "lm.lm_head.",
    }
    decoder_prefix = "model."
    sampler_class = EvenCountSampler
    required_tokens = (
        *GridFamily.required_tokens, "<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>",
    )  # fmt: skip
    placeholder_tokens = ("<|VIDEO|>", "<|AUDIO|>")
    config_parts = ("lm",)
    ignored_weights = (r"^talker\.", r"^token2wav\.")
    penalizes_prompt = True
    has_published_positions = True
    config_class: ClassVar[Any] = Qwen2_5OmniThinkerConfig
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    default_system_prompt: ClassVar[str] = SYSTEM_PROMPT
    default_positions_per_second: ClassVar[int] = 25
    published_frames_per_second: ClassVar[float | None] = (
        None  # that published positions assume; None for the sampler's
    )
    # AVoCaDO, ASID-Captioner and DiaDem are run with these limits; those of Qwen's own examples are the sampler's.
    default_frames: ClassVar[dict[str, int]] = {"max_pixels": 401_408, "total_pixels": 20_070_400}

    @classmethod
    def can_read(cls, values: Mapping[str, Any]) -> bool:
        return values.get("model_type") in cls.model_types

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> SalmonnConfig:
        values = without_dtypes(values.get("thinker_config", values))
        parts = ("text_config", "vision_config", "audio_config")
        if missing := [part for part in parts if not values.get(part)]:
            raise ValueError(
                f"the thinker's config has no {', '.join(missing)}; use a checkpoint that sees, hears and writes"
            )
        config = cls.config_class(**values)
        vision = config.vision_config
        return SalmonnConfig(
            family=cls.name,
            lm=values,
            placeholder_ids=(config.video_token_id, config.audio_token_id),
            frames={"factor": vision.patch_size * vision.spatial_merge_size, **cls.default_frames},
            system_prompt=cls.default_system_prompt,
            prompts=dict(cls.prompts),
            max_new_tokens=4096,
            batch_size=1,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def build_parts(self, *, attn_implementation: str | None) -> tuple[nn.Module, nn.Module, Any]:
        config = Qwen2_5OmniThinkerConfig(**self.config.lm, attn_implementation=attn_implementation)
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        vision = QwenTower(Qwen2_5OmniVisionEncoder(config.vision_config))
        audio = UnpaddedAudioTower(Qwen2_5OmniAudioEncoder(config.audio_config), count_tokens=self.count_audio_tokens)
        for tower in (vision, audio):
            use_window_attention(tower.encoder.config)
        return vision, audio, Qwen2_5OmniDecoder(config.text_config)

    # Audio

    def max_audio_seconds(self, video_seconds: float) -> float | None:
        return MAX_AUDIO_SECONDS

    @cached_property
    def mel_extractor(self) -> WhisperFeatureExtractor:
        """Whisper's log-mel features of up to 300 s."""
        bins = self.config.lm["audio_config"]["num_mel_bins"]
        return WhisperFeatureExtractor(feature_size=bins, chunk_length=MAX_AUDIO_SECONDS)

    def log_mel(self, waveform: np.ndarray) -> Tensor:
        """Compute log-mel features (1, M, T), one frame for each 10 ms, of audio (S,) at 16 kHz.

        Published processors pad audio with silence to 300 s; the few samples of it that a frame overlaps are enough.
        """
        mel = self.mel_extractor
        frames = self.mel_shape(len(waveform) / SAMPLE_RATE_HZ)[2]
        length = min(frames * mel.hop_length + mel.n_fft, mel.n_samples)
        features = mel(waveform, sampling_rate=SAMPLE_RATE_HZ, max_length=length, return_tensors="pt").input_features
        return features[..., :frames].contiguous()

    def mel_shape(self, seconds: float) -> tuple[int, int, int]:
        """Return the shape (1, M, T) of the log-mel features of an audio duration, of at most 300 s."""
        frames = math.ceil(round(min(seconds, MAX_AUDIO_SECONDS) * 100, 6))
        return 1, self.config.lm["audio_config"]["num_mel_bins"], max(frames, MIN_MEL_FRAMES)

    def count_audio_tokens(self, num_frames: int) -> int:
        """Return the number of audio tokens for a number of mel frames: 25 a second."""
        return ((num_frames - 1) // 2 + 1) // 2

    # Layout

    def timestamps(self, clip: ClipInputs) -> list[str]:
        """Return the markers around the clip."""
        vision_start, vision_end, audio_start, audio_end = self.required_tokens[-4:]
        if not len(clip.mel):
            return [vision_start, vision_end]
        if not clip.num_frames:
            return [audio_start, audio_end]
        return [vision_start + audio_start, audio_end + vision_end]

    def layout(
        self, clip: ClipInputs, *, timestamp_ids: Sequence[Sequence[int]] = (), published_positions: bool = False
    ) -> Layout:
        grid = self.token_grid(clip)
        num_audio = self.count_audio_tokens(clip.mel.shape[-1]) if len(clip.mel) else 0
        rate = self.config.lm.get("position_id_per_seconds", self.default_positions_per_second)
        seconds_per_grid = self.seconds_per_grid(clip, published=published_positions)
        return self.interleave(
            positions_in_time(grid, num_audio=num_audio, positions_per_grid=seconds_per_grid * rate),
            num_visual=math.prod(grid) if grid else 0,
            markers=timestamp_ids,
        )

    def interleave(self, positions: Tensor, *, num_visual: int, markers: Sequence[Sequence[int]]) -> Layout:
        """Lay out the grid steps of a chunk of time, then its audio tokens, then the next chunk, between markers.

        Args:
            positions: (3, V + A) positions of the visual and the audio tokens, from 0 on.
            num_visual: V.
            markers: token ids in front of the clip and behind it.
        """
        rate = self.config.lm.get("position_id_per_seconds", self.default_positions_per_second)
        size = int(rate * self.config.lm.get("seconds_per_chunk", 2))
        parts = [
            torch.arange(len(times)).tensor_split(_chunk_bounds(times, size)) if len(times) else ()
            for times in (positions[0, :num_visual], positions[0, num_visual:])
        ]
        visual, audio = parts[0], [part + num_visual for part in parts[1]]
        chunks = zip_longest(visual, audio, fillvalue=torch.zeros(0, dtype=torch.long))
        order = torch.cat([part for chunk in chunks for part in chunk])
        # Both markers at the start, or at the end, have the same position.
        return surround(order, positions, num_visual=num_visual, markers=markers, marker_step=0)

    def seconds_per_grid(self, clip: ClipInputs, *, published: bool) -> float:
        """Return the time between two steps of the grid, of two frames each.

        As published, it follows from the nominal rate. For another number of frames, as in a video that is too long
        for the rate, the published code still takes that time, so that picture and sound drift apart; here it is the
        real one.
        """
        sampler = self.frame_sampler
        assert isinstance(sampler, EvenCountSampler)
        if published:
            return 2 / (self.published_frames_per_second or sampler.frames_per_second)
        if not clip.num_frames or clip.num_frames == sampler.count_wanted(clip.seconds):
            return 2 / sampler.frames_per_second
        return 2 * clip.seconds / clip.num_frames


class Qwen2_5OmniDecoder(Qwen2_5OmniPreTrainedModel, GenerationMixin):
    """The thinker's text model with its output embeddings, without the towers."""

    config: Qwen2_5OmniTextConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen2_5OmniTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen2_5OmniThinkerTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def positions_in_time(grid: tuple[int, int, int] | None, *, num_audio: int, positions_per_grid: float) -> Tensor:
    """Return the positions (3, V + A) of visual and audio tokens, from 0 on.

    A visual token of grid step k has (floor(k * positions_per_grid), row, column), the j-th audio token (j, j, j).

    Args:
        grid: steps, rows and columns of visual tokens; None without video.
        num_audio: A.
        positions_per_grid: positions in time from a grid step to the next.
    """
    steps, rows, columns = grid or (0, 1, 1)
    cells = torch.arange(rows * columns).repeat(steps)
    times = (torch.arange(steps) * positions_per_grid).long().repeat_interleave(rows * columns)
    visual = torch.stack([times, cells // columns, cells % columns])
    return torch.cat([visual, torch.arange(num_audio).expand(3, -1)], dim=1)


def surround(
    order: Tensor, positions: Tensor, *, num_visual: int, markers: Sequence[Sequence[int]], marker_step: int
) -> Layout:
    """Put markers around a clip's tokens.

    As published, the markers at the end follow the greatest position of the last tokens of one kind.

    Args:
        order: (V + A,) indices of the tokens.
        positions: (3, V + A) positions of the visual and the audio tokens, from 0 on.
        num_visual: V.
        markers: token ids in front of the clip and behind it.
        marker_step: 1 if the markers at one end count up, 0 if they share a position.
    """
    num_start, num_end = (len(ids) for ids in markers)
    start = torch.arange(num_start) * marker_step
    inner = positions + int(start[-1]) + 1
    is_visual = order < num_visual
    is_last_run = (is_visual != is_visual[-1]).flip(0).cumsum(0).flip(0) == 0
    end = torch.arange(num_end) * marker_step + int(inner[:, order[is_last_run]].max()) + 1
    num_tokens = len(order)
    full = torch.cat([torch.arange(num_start) + num_tokens, order, torch.arange(num_end) + num_tokens + num_start])
    return Layout(
        full,
        torch.cat([inner, start.expand(3, -1), end.expand(3, -1)], dim=1)[:, full],
        num_visual=num_visual,
        timestamp_ids=tuple(token for ids in markers for token in ids),
        text_start=int(end[-1]) + 1,
    )


def _chunk_bounds(values: Tensor, size: int) -> list[int]:
    """Return where rising values are cut, as published: once for each multiple of `size`, at most once per value."""
    bounds: list[int] = []
    last = int(values[-1]) if len(values) else 0
    for multiple in range(size, last + 1, size):
        at = max(int(torch.searchsorted(values, multiple)), bounds[-1] + 1 if bounds else 0)
        if at >= len(values):
            break
        bounds.append(at)
    return bounds
