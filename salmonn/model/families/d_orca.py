"""D-ORCA: Qwen3-VL with Whisper and a window Q-Former, by the authors of video-SALMONN 2 (arXiv 2602.07960)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from salmonn.media.frame_sampling import IntervalBudgetSampler
from salmonn.model.config import SalmonnConfig
from salmonn.model.families.base import (
    AUDIO_PAD,
    BERT_BASE_2_LAYERS,
    QFORMER_WEIGHT_NAMES,
    VIDEO_PAD,
    WHISPER_LARGE_V3,
    Family,
    convert_qformer_config,
)
from salmonn.model.families.qwen3_vl import PUBLISHED_SIZES, WEIGHT_NAMES, Qwen3VL, interleave_with_text
from salmonn.model.layout import ClipInputs, Layout
from salmonn.records import Modality

# Defaults of the config classes in the published code (github.com/WeChatCV/D-ORCA). The config.json of its model is not
# in that repository.
QFORMER_DEFAULTS: dict[str, Any] = BERT_BASE_2_LAYERS | dict(hidden_size=4104, intermediate_size=12288)
AUDIO_TOKEN_ID = 151669
PUBLISHED_8B: dict[str, Any] = PUBLISHED_SIZES["8B"] | dict(
    audio_token_id=AUDIO_TOKEN_ID,
    audio_config=WHISPER_LARGE_V3
    | dict(second_per_window=0.5, second_stride=0.5, qformer_config=QFORMER_DEFAULTS | dict(encoder_width=1280)),
)


class DOrca(Qwen3VL):
    """D-ORCA. The audio during a pair of frames follows its visual tokens; audio tokens count up like text."""

    name = "d-orca"
    title = "D-ORCA (qwen3_vl with an audio_config)"
    # The published caption prompt, and its parts for one modality.
    prompts: ClassVar[Mapping[Modality, str]] = {
        "both": "Please describe this video comprehensively, focusing primarily on the character dialogue.",
        "visual": "Please describe this video comprehensively.",
        "audio": "Please describe this audio comprehensively, focusing primarily on the character dialogue.",
    }
    published_configs: ClassVar[Mapping[str, dict[str, Any]]] = {"tsinghua-ee/D-ORCA-8B-0210": PUBLISHED_8B}
    weight_names: ClassVar[Mapping[str, str]] = WEIGHT_NAMES | {
        r"^model\.audio\.(conv1|conv2|embed_positions|layers|layer_norm)\.": r"audio.encoder.\1.",
        r"^model\.audio\.q_tokens": "audio.qformer.queries",
        r"^model\.audio\.audio_proj\.": "audio.projector.",
        **{rf"^model\.audio\.qformer\.{pattern}": ours for pattern, ours in QFORMER_WEIGHT_NAMES.items()},
    }
    sampler_class = IntervalBudgetSampler
    placeholder_tokens = (VIDEO_PAD, AUDIO_PAD)
    config_parts = Family.config_parts
    hears = True

    @classmethod
    def can_read(cls, values: Mapping[str, Any]) -> bool:
        return bool(values.get("model_type") == "qwen3_vl" and "audio_config" in values)

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> SalmonnConfig:
        audio = WHISPER_LARGE_V3 | values["audio_config"]
        qformer = QFORMER_DEFAULTS | (audio.get("qformer_config") or {})
        config = super().read_config({key: value for key, value in values.items() if key != "audio_config"})
        config.whisper = {key: audio[key] for key in WHISPER_LARGE_V3}
        config.qformer = convert_qformer_config(qformer, encoder_width=audio["d_model"])
        config.num_queries = qformer["query_length"]
        config.window_seconds = audio.get("second_per_window", 0.5)
        config.stride_seconds = audio.get("second_stride")
        config.tail_tolerance_seconds = 0.0
        config.placeholder_ids = (values["video_token_id"], values.get("audio_token_id", AUDIO_TOKEN_ID))
        config.system_prompt = SalmonnConfig.system_prompt
        config.max_new_tokens = 3072  # of the published evaluation
        return config

    def build_parts(self, *, attn_implementation: str | None) -> tuple[nn.Module, nn.Module | None, Any]:
        vision, _, lm = super().build_parts(attn_implementation=attn_implementation)
        width = lm.get_input_embeddings().embedding_dim
        return vision, self.build_audio_tower(width=width, attn_implementation=attn_implementation), lm

    def layout(
        self, clip: ClipInputs, *, timestamp_ids: Sequence[Sequence[int]] = (), published_positions: bool = False
    ) -> Layout:
        """See `Family`: with u_k = floor(2 k t) for steps of t seconds, step k has u_(k+1) - u_k audio tokens."""
        assert not published_positions
        grid, num_audio = self.token_grid(clip), len(clip.mel) * self.config.tokens_per_chunk
        if grid is None:
            tokens = torch.arange(num_audio)
            return Layout(tokens, tokens.expand(3, -1), num_visual=0)
        step_seconds = 2 * clip.seconds / clip.num_frames
        starts = (torch.arange(grid[0]) * step_seconds * 2).long().clamp(max=num_audio)
        return interleave_with_text(grid, texts=timestamp_ids, audio_cuts=[*starts.tolist(), num_audio])

    def surround_clip(self, before: str, after: str) -> tuple[str, list[str]]:
        """Keep the line break behind the clip."""
        return before, [after]
