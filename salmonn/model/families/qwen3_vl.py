"""Qwen3-VL: a vision transformer with deep features for the decoder's first layers, and Qwen3. No audio input."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from salmonn.media.frame_sampling import BudgetSampler
from salmonn.model.attention import use_window_attention
from salmonn.model.config import SalmonnConfig
from salmonn.model.families.base import CLIP_END, CLIP_START, VIDEO_PAD, GridFamily, without_dtypes
from salmonn.model.layout import ClipInputs, Layout
from salmonn.model.towers import QwenTower
from salmonn.records import Modality

DESCRIBE = "Describe this video in detail."
# The config.json of the published models (Qwen/Qwen3-VL-8B-Instruct and the smaller ones) have all keys, which are read
# as they are; these are the values of the 8B model.
TEXT: dict[str, Any] = dict(
    model_type="qwen3_vl_text", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_act="silu", max_position_embeddings=262144,
    rms_norm_eps=1e-6, rope_theta=5_000_000, attention_bias=False, attention_dropout=0.0,
    rope_scaling=dict(rope_type="default", mrope_interleaved=True, mrope_section=[24, 20, 20]),
)  # fmt: skip
VISION: dict[str, Any] = dict(
    model_type="qwen3_vl", depth=27, hidden_size=1152, hidden_act="gelu_pytorch_tanh", intermediate_size=4304,
    num_heads=16, in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=4096,
    num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24],
)  # fmt: skip
SMALL_VISION: dict[str, Any] = dict(
    depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]
)
WEIGHT_NAMES = {
    r"^model\.visual\.": "vision.encoder.",
    r"^model\.language_model\.": "lm.model.language_model.",
    r"^lm_head\.": "lm.lm_head.",
}


def _published_config(*, vision: dict[str, Any] | None = None, **text: Any) -> dict[str, Any]:
    """Return the config.json of a size by its differences from the 8B model."""
    tied = text.pop("tie_word_embeddings", False)
    text = TEXT | text
    return dict(
        model_type="qwen3_vl",
        architectures=["Qwen3VLForConditionalGeneration"],
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=tied,
        text_config=text,
        vision_config=VISION | dict(out_hidden_size=text["hidden_size"]) | (vision or {}),
    )


PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "2B": _published_config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, vision=SMALL_VISION,
        tie_word_embeddings=True,
    ),
    "4B": _published_config(
        hidden_size=2560, intermediate_size=9728, vision=SMALL_VISION, tie_word_embeddings=True
    ),
    "8B": _published_config(),
}  # fmt: skip


class Qwen3VL(GridFamily):
    """Qwen3-VL, dense. Each pair of frames follows its time, as text; visual tokens have no position in time.

    The vision tower outputs each token's embedding and K deep features, which are added to its hidden states after the
    decoder's first K layers.
    """

    name = "qwen3-vl"
    title = "Qwen3-VL (qwen3_vl)"
    # Without audio input, everything that it perceives is visible.
    prompts: ClassVar[Mapping[Modality, str]] = {"both": DESCRIBE, "visual": DESCRIBE}
    published_configs: ClassVar[Mapping[str, dict[str, Any]]] = {
        f"Qwen/Qwen3-VL-{size}-Instruct": values for size, values in PUBLISHED_SIZES.items()
    }
    weight_names: ClassVar[Mapping[str, str]] = WEIGHT_NAMES
    decoder_prefix = "model.language_model."
    sampler_class = BudgetSampler
    required_tokens = (*GridFamily.required_tokens, CLIP_START, CLIP_END)
    placeholder_tokens: ClassVar[tuple[str, str]] = (VIDEO_PAD, VIDEO_PAD)
    config_parts: ClassVar[tuple[str, ...]] = ("lm",)
    hears = False
    penalizes_prompt = True

    @classmethod
    def can_read(cls, values: Mapping[str, Any]) -> bool:
        return bool(values.get("model_type") == "qwen3_vl" and "audio_config" not in values)

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> SalmonnConfig:
        return SalmonnConfig(
            family=cls.name,
            lm=without_dtypes(values),
            placeholder_ids=(values["video_token_id"], values["video_token_id"]),
            frames={"factor": values["vision_config"]["patch_size"] * values["vision_config"]["spatial_merge_size"]},
            system_prompt="",
            prompts=dict(cls.prompts),
            max_new_tokens=1024,
            batch_size=1,
            tie_word_embeddings=values.get("tie_word_embeddings", False),
        )

    def build_parts(self, *, attn_implementation: str | None) -> tuple[nn.Module, nn.Module | None, Any]:
        # The vision tower moves out of the language model, which receives embeddings.
        lm = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**self.config.lm, attn_implementation=attn_implementation))
        vision = QwenTower(lm.model.visual, mean=IMAGENET_STANDARD_MEAN, std=IMAGENET_STANDARD_STD)
        lm.model.visual = None
        use_window_attention(vision.encoder.config)
        return vision, None, lm

    def timestamps(self, clip: ClipInputs) -> list[str]:
        """Return the texts around each pair of frames: its time, the mean of both, with a marker, and a marker."""
        times = [*clip.times, *clip.times[len(clip.times) - len(clip.times) % 2 :]]  # the last of an odd number repeats
        means = [(first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]
        return [text for mean in means for text in (f"<{mean:.1f} seconds>{CLIP_START}", CLIP_END)]

    def layout(
        self, clip: ClipInputs, *, timestamp_ids: Sequence[Sequence[int]] = (), published_positions: bool = False
    ) -> Layout:
        assert not published_positions
        grid = self.token_grid(clip)
        assert grid is not None
        return interleave_with_text(grid, texts=timestamp_ids, audio_cuts=[0] * (grid[0] + 1))


def interleave_with_text(
    grid: tuple[int, int, int], *, texts: Sequence[Sequence[int]], audio_cuts: Sequence[int]
) -> Layout:
    """Lay out each grid step between its two texts, with its audio tokens behind the visual ones.

    Text and audio tokens count up in all three positions. The visual tokens of a step share its first position in time,
    and have it plus row and column in the others; what follows is behind the greatest of these.

    Args:
        grid: T steps, rows and columns of visual tokens.
        texts: (2 T,) token ids of the texts before and behind each step.
        audio_cuts: (T + 1,) rising indices of audio tokens, from 0 on: step k is followed by those from audio_cuts[k].
    """
    steps, rows, columns = grid
    area, num_audio = rows * columns, audio_cuts[-1]
    lengths = [len(text) for text in texts]
    text_starts = torch.tensor([0, *lengths]).cumsum(0) + steps * area + num_audio
    cell = torch.arange(area)
    cells = torch.stack([torch.zeros_like(cell), cell // columns, cell % columns])
    order, positions, position = [], [], 0
    for step in range(steps):
        before, behind = (torch.arange(*text_starts[index : index + 2]) for index in (2 * step, 2 * step + 1))
        audio = torch.arange(*audio_cuts[step : step + 2]) + steps * area
        order += [before, cell + step * area, audio, behind]
        start = position + len(before)
        follows = start + max(rows, columns)
        position = follows + len(audio) + len(behind)
        positions += [
            torch.arange(start - len(before), start).expand(3, -1),
            cells + start,
            torch.arange(follows, position).expand(3, -1),
        ]
    ids = tuple(token for text in texts for token in text)
    return Layout(torch.cat(order), torch.cat(positions, dim=1), steps * area, ids)
