"""Sizes of the published models by their ids on the hub, so that a dry run needs no network.

In the layout of their own config.json, as `from_published` reads it; what is not stated there follows from the family.
"""

from pathlib import Path
from typing import Any

from salmonn.model.config import PLUS_VISION_DEFAULTS, SalmonnConfig, from_published
from salmonn.model.loading import load_config


def _salmonn2() -> dict[str, Any]:
    """The config.json of video-SALMONN 2, whose other parts are named in its code."""
    return dict(
        model_type="video_salmonn_2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
        add_time_token=True,
        mm_spatial_pool_stride=2,
        audio_config=dict(second_per_window=0.5, num_speech_query_token=1),
    )


def _plus(*, vision_intermediate: int = 3420, **decoder: Any) -> dict[str, Any]:
    """A config.json of video-SALMONN 2+: what differs from the 7B model, which the published classes default to."""
    return dict(
        model_type="qwen2_5_vl",
        architectures=["video_SALMONN2_plus"],
        **decoder,
        rope_scaling=dict(type="default", rope_type="default", mrope_section=[16, 24, 24]),
        vision_config=PLUS_VISION_DEFAULTS
        | dict(intermediate_size=vision_intermediate, out_hidden_size=decoder.get("hidden_size", 3584)),
    )


PLUS_SIZES: dict[str, dict[str, Any]] = {
    "3B": _plus(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7B": _plus(),
    "72B": _plus(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vision_intermediate=3456,
    ),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "tsinghua-ee/video-SALMONN-2": _salmonn2(),
    **{f"tsinghua-ee/video-SALMONN2_plus_{size}_full": config for size, config in PLUS_SIZES.items()},
    # What audio-visual SFT starts from, and adapters of 2+ were trained on.
    **{f"tsinghua-ee/video_SALMONN2plus_{size}_audioAlign": config for size, config in PLUS_SIZES.items()},
}


def offline_config(model: str) -> SalmonnConfig:
    """The sizes of a model folder, or of a published model by its id, without any network.

    Raises:
        ValueError: it is neither.
    """
    if model in PUBLISHED:
        return from_published(PUBLISHED[model])
    if not Path(model).is_dir():
        raise ValueError(
            f"the sizes of {model} are not known here: there is no such folder, and the published models are "
            f"{', '.join(PUBLISHED)}"
        )
    return load_config(model)
