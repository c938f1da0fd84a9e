"""video-SALMONN 2+: Qwen2.5-VL with 3-D rotary positions, and Whisper with a window Q-Former."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from salmonn.media.frame_sampling import UniformSampler
from salmonn.model.attention import use_window_attention
from salmonn.model.config import SalmonnConfig
from salmonn.model.families.base import (
    BERT_BASE_2_LAYERS,
    CLIP_END,
    CLIP_START,
    QFORMER_WEIGHT_NAMES,
    WHISPER_LARGE_V3,
    GridFamily,
    convert_qformer_config,
    without_dtypes,
)
from salmonn.model.layout import ClipInputs, Layout
from salmonn.model.towers import AudioTower, QwenTower
from salmonn.records import Modality

# A published config.json holds only what differs from its own classes' defaults, which are not those of transformers.
DEFAULTS: dict[str, Any] = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, hidden_act="silu", max_position_embeddings=128000, rms_norm_eps=1e-6, rope_theta=1000000.0,
    tie_word_embeddings=False, video_token_id=151656, audio_token_id=151665,
)  # fmt: skip
VISION_DEFAULTS: dict[str, Any] = dict(
    depth=32, hidden_size=1280, hidden_act="silu", intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
    spatial_merge_size=2, temporal_patch_size=2, tokens_per_second=4, window_size=112, out_hidden_size=3584,
    fullatt_block_indexes=[7, 15, 23, 31],
)  # fmt: skip
QFORMER_DEFAULTS: dict[str, Any] = BERT_BASE_2_LAYERS | dict(hidden_size=3072, intermediate_size=12288)


def _published_config(*, vision_intermediate: int = 3420, **decoder: Any) -> dict[str, Any]:
    """Return the config.json of a size by its differences from the 7B model."""
    return dict(
        model_type="qwen2_5_vl",
        architectures=["video_SALMONN2_plus"],
        **decoder,
        rope_scaling=dict(type="default", rope_type="default", mrope_section=[16, 24, 24]),
        vision_config=VISION_DEFAULTS
        | dict(intermediate_size=vision_intermediate, out_hidden_size=decoder.get("hidden_size", 3584)),
    )


PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "3B": _published_config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7B": _published_config(),
    "72B": _published_config(
        vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vision_intermediate=3456,
    ),
}  # fmt: skip


class Salmonn2Plus(GridFamily):
    """video-SALMONN 2+. Audio and video tokens are interleaved by time; positions are time, row and column."""

    name = "salmonn2-plus"
    title = "video-SALMONN 2+ (qwen2_5_vl with an audio_config)"
    # The published caption prompt, and its parts for one modality.
    prompts: ClassVar[Mapping[Modality, str]] = {
        "both": "Provide a comprehensive description of all the content in the video, leaving out no details. Be sure "
        "to include as much of the audio information as possible, and ensure that your descriptions of the audio and "
        "video are closely aligned.",
        "visual": "Provide a comprehensive description of all the content in the video, leaving out no details.",
        "audio": "Provide a comprehensive description of all the content in the audio, leaving out no details.",
    }
    published_configs: ClassVar[Mapping[str, dict[str, Any]]] = {
        **{f"tsinghua-ee/video-SALMONN2_plus_{size}_full": values for size, values in PUBLISHED_SIZES.items()},
        # The start of audio-visual SFT, and the base of the published adapters.
        **{f"tsinghua-ee/video_SALMONN2plus_{size}_audioAlign": values for size, values in PUBLISHED_SIZES.items()},
    }
    weight_names: ClassVar[Mapping[str, str]] = {
        r"^visual\.": "vision.encoder.",
        r"^model\.": "lm.model.language_model.",
        r"^lm_head\.": "lm.lm_head.",
        r"^audio\.(conv1|conv2|embed_positions|layers|layer_norm)\.": r"audio.encoder.\1.",
        r"^audio\.q_tokens": "audio.qformer.queries",
        r"^audio\.audio_proj\.": "audio.projector.",
        **{rf"^audio\.qformer\.{pattern}": ours for pattern, ours in QFORMER_WEIGHT_NAMES.items()},
    }
    decoder_prefix = "model.language_model."
    sampler_class = UniformSampler
    required_tokens = (*GridFamily.required_tokens, CLIP_START, CLIP_END)
    penalizes_prompt = True  # published generation starts from ids; that of video-SALMONN 2 from embeddings
    has_published_positions = True

    @classmethod
    def can_read(cls, values: Mapping[str, Any]) -> bool:
        has_audio = "audio_config" in values or "audio_token_id" in values
        is_qwen = values.get("config", values).get("model_type") == "qwen2_5_vl"
        return is_qwen and (has_audio or "SALMONN" in str(values.get("architectures")))

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> SalmonnConfig:
        values = DEFAULTS | values
        audio = WHISPER_LARGE_V3 | values.get("audio_config", {})
        qformer = QFORMER_DEFAULTS | audio.get("qformer_config", {})
        vision = VISION_DEFAULTS | values.get("vision_config", {})
        lm = without_dtypes({key: value for key, value in values.items() if key != "audio_config"})
        return SalmonnConfig(
            family=cls.name,
            lm=lm | {"vision_config": vision},
            whisper={key: audio[key] for key in WHISPER_LARGE_V3},
            qformer=convert_qformer_config(qformer, encoder_width=audio["d_model"]),
            num_queries=qformer["query_length"],
            window_seconds=audio.get("second_per_window", 0.5),
            stride_seconds=audio.get("second_stride"),
            tail_tolerance_seconds=0.0,
            placeholder_ids=(values["video_token_id"], values["audio_token_id"]),
            frames={"factor": vision["patch_size"] * vision["spatial_merge_size"]},
            prompts=dict(cls.prompts),
            max_new_tokens=1024,
            batch_size=1,
            tie_word_embeddings=values.get("tie_word_embeddings", False),
        )

    def build_parts(self, *, attn_implementation: str | None) -> tuple[nn.Module, AudioTower, Any]:
        # The vision tower moves out of the language model, which receives embeddings.
        lm = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(**self.config.lm, attn_implementation=attn_implementation)
        )
        vision, lm.model.visual = QwenTower(lm.model.visual), None
        use_window_attention(vision.encoder.config)
        width = lm.get_input_embeddings().embedding_dim
        return vision, self.build_audio_tower(width=width, attn_implementation=attn_implementation), lm

    def layout(
        self, clip: ClipInputs, *, timestamp_ids: Sequence[Sequence[int]] = (), published_positions: bool = False
    ) -> Layout:
        return interleave_by_time(
            self.token_grid(clip),
            num_audio=len(clip.mel) * self.config.tokens_per_chunk,
            second_per_grid=2 * clip.seconds / max(clip.num_frames, 1),
            published_positions=published_positions,
        )

    def surround_clip(self, before: str, after: str) -> tuple[str, list[str]]:
        """Add the tokens for start and end of a clip."""
        return before + CLIP_START, [CLIP_END + after]


def interleave_by_time(
    grid: tuple[int, int, int] | None, *, num_audio: int, second_per_grid: float, published_positions: bool = False
) -> Layout:
    """Lay out each grid step, then the audio tokens until the next one; positions are time, row and column.

    With u_k = floor(second_per_grid * 2 k), grid step k is followed by u_(k+1) - u_k audio tokens (two for a second),
    the last step by all that remain. A visual token has position (u_k, row, column), the j-th audio token (j, 0, j), or
    (j, j, 0) without video.

    Args:
        grid: steps, rows and columns of visual tokens; None without video.
        num_audio: A audio tokens.
        second_per_grid: duration of a grid step in seconds.
        published_positions: positions of the published inference code instead; see `_published_positions`.
    """
    time = torch.arange(num_audio)
    zeros = torch.zeros_like(time)
    if grid is None:
        return Layout(time, torch.stack([time, time, time if published_positions else zeros]), num_visual=0)
    steps, rows, columns = grid
    starts = (torch.arange(steps) * second_per_grid * 2).long()
    visual = torch.arange(steps * rows * columns).reshape(steps, -1)
    audio = time + visual.numel()
    # Audio that is shorter than the video leaves the last steps without any.
    cuts = [0, *starts[1:].clamp(max=num_audio).tolist(), num_audio]
    order = torch.cat([part for step in range(steps) for part in (visual[step], audio[cuts[step] : cuts[step + 1]])])
    if published_positions:
        return Layout(order, _published_positions(grid, num_audio=num_audio), visual.numel())
    cells = torch.arange(rows * columns).repeat(steps)
    of_visual = torch.stack([starts.repeat_interleave(rows * columns), cells // columns, cells % columns])
    of_audio = torch.stack([time, zeros, time])
    return Layout(order, torch.cat([of_visual, of_audio], dim=1)[:, order], visual.numel())


def _published_positions(grid: tuple[int, int, int], *, num_audio: int) -> Tensor:
    """Return the positions that the published generate() computes for video and audio, (3, N).

    It is given neither the audio nor the durations: it takes the first tokens of the clip for the whole video, a grid
    step for a second, and all further tokens for text.
    """
    steps, rows, columns = grid
    cells = torch.arange(rows * columns).repeat(steps)
    starts = (torch.arange(steps) * 2).repeat_interleave(rows * columns)
    visual = torch.stack([starts, cells // columns, cells % columns])
    return torch.cat([visual, (torch.arange(num_audio) + visual.max() + 1).expand(3, -1)], dim=1)
