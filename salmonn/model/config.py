"""Sizes of a network, read from our own config.json or from those of the published checkpoints."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from salmonn.media.frame_sampling import FixedRateSampler, FrameSampler, UniformSampler
from salmonn.records import Modality

Family = Literal["salmonn2", "salmonn2-plus"]
# What a model is asked where nobody asks anything else, by what it is given of the clip.
PLAIN_PROMPTS: dict[Modality, str] = {
    "both": "Describe the video and its sounds in detail.",
    "visual": "Describe what can be seen in detail.",
    "audio": "Describe what can be heard in detail.",
}
# The first of each is what the published code asks for captions, the others are its parts for one modality.
PUBLISHED_PROMPTS: dict[Family, dict[Modality, str]] = {
    "salmonn2": {
        "both": "Give a detailed account of everything in the video, capturing all the specifics. While doing so, also "
        "include as much information from the audio as possible, ensuring that the descriptions of audio and video are "
        "well-synchronized.",
        "visual": "Give a detailed account of everything in the video, capturing all the specifics.",
        "audio": "Give a detailed account of everything in the audio, capturing all the specifics.",
    },
    "salmonn2-plus": {
        "both": "Provide a comprehensive description of all the content in the video, leaving out no details. Be sure "
        "to include as much of the audio information as possible, and ensure that your descriptions of the audio and "
        "video are closely aligned.",
        "visual": "Provide a comprehensive description of all the content in the video, leaving out no details.",
        "audio": "Provide a comprehensive description of all the content in the audio, leaving out no details.",
    },
}
STEPS_PER_SECOND = 50  # of Whisper's encoder
WHISPER_KEYS = [
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "max_source_positions",
    "activation_function",
    "scale_embedding",
]
# What the published configs leave out since their code names the parts' repositories instead of sizes.
WHISPER_LARGE_V3: dict[str, Any] = dict(
    num_mel_bins=128,
    d_model=1280,
    encoder_layers=32,
    encoder_attention_heads=20,
    encoder_ffn_dim=5120,
    max_source_positions=1500,
    activation_function="gelu",
    scale_embedding=False,
)
SIGLIP_SO400M: dict[str, Any] = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    patch_size=14,
    image_size=384,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
BERT_BASE_OF_TWO_LAYERS: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=2,
    num_attention_heads=12,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    cross_attention_freq=1,
    query_length=1,
)

# A published config.json holds only what differs from its own classes' defaults, which are not those of transformers.
PLUS_DEFAULTS: dict[str, Any] = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    hidden_act="silu",
    max_position_embeddings=128000,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    tie_word_embeddings=False,
    video_token_id=151656,
    audio_token_id=151665,
)
PLUS_VISION_DEFAULTS: dict[str, Any] = dict(
    depth=32,
    hidden_size=1280,
    hidden_act="silu",
    intermediate_size=3420,
    num_heads=16,
    in_channels=3,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    tokens_per_second=4,
    window_size=112,
    out_hidden_size=3584,
    fullatt_block_indexes=[7, 15, 23, 31],
)
PLUS_QFORMER_DEFAULTS: dict[str, Any] = dict(
    hidden_size=3072,
    intermediate_size=12288,
    num_hidden_layers=2,
    num_attention_heads=12,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    cross_attention_freq=1,
    query_length=1,
)


class SalmonnConfig(PreTrainedConfig):
    """Everything needed to build a network.

    Args:
        family: salmonn2 (SigLIP, frames as they come) or salmonn2-plus (Qwen2.5-VL, 3-D positions).
        lm: arguments of Qwen2Config, or of Qwen2_5_VLConfig with its vision_config.
        vision: arguments of SiglipVisionConfig; none for 2+.
        whisper, qformer: arguments of WhisperConfig and Blip2QFormerConfig.
        num_queries: Q-Former queries a window.
        window_seconds: length of a Q-Former window.
        stride_seconds: from one window to the next; none is a window's length.
        tail_tolerance_seconds: sound that is longer than whole chunks by no more gets no chunk of its own.
        pool: salmonn2: side of the squares of patches that become one token.
        placeholder_ids: token ids that stand for a clip's tokens: seen, heard.
        frames: frame rate and size: arguments of `FixedRateSampler` (salmonn2) or `UniformSampler` (2+).
        timestamp_tokens: salmonn2: without sound, each frame is followed by its time in words.
        system_prompt: what every conversation begins with; "" for nothing.
        prompts: what is asked by default of a clip, its picture alone and its sound alone; none asks in plain words.
        max_new_tokens: how long an answer may get by default.
        batch_size: clips that are captioned side by side by default.
        repetition_penalty: of generation by default, as the checkpoint's generation_config.json has it.
        initializer_range: deviation of fresh weights between the towers and the language model.
    """

    model_type = "salmonn"

    family: Family = "salmonn2-plus"
    # Dictionaries; None only until they are given, since transformers makes empty configs of every class.
    lm: Any = None
    vision: Any = None
    whisper: Any = None
    qformer: Any = None
    num_queries: int = 1
    window_seconds: float = 0.5
    stride_seconds: float | None = None
    tail_tolerance_seconds: float = 0.004
    pool: int = 2
    placeholder_ids: tuple[int, int] = (-200, -200)
    frames: Any = None
    timestamp_tokens: bool = True
    system_prompt: str = "You are a helpful assistant."
    prompts: Any = None
    max_new_tokens: int = 160
    batch_size: int = 8
    repetition_penalty: float = 1.0
    initializer_range: float = 0.02

    def default_prompt(self, modality: Modality = "both") -> str:
        """The prompt that asks for a caption."""
        prompt: str = (self.prompts or PLAIN_PROMPTS)[modality]
        return prompt

    @property
    def frame_sampler(self) -> FrameSampler:
        """Which frames of a clip are seen."""
        return {"salmonn2": FixedRateSampler, "salmonn2-plus": UniformSampler}[self.family](**(self.frames or {}))

    def with_frames(self, frames: Mapping[str, float] | None) -> "SalmonnConfig":
        """The same with other values in the frame rule, such as more frames for training.

        Raises:
            ValueError: the family's rule has no such value.
        """
        changed = copy.deepcopy(self)
        changed.frames = {**(self.frames or {}), **(frames or {})}
        known = [field.name for field in dataclasses.fields(self.frame_sampler)]  # type: ignore[arg-type]
        if unknown := sorted(changed.frames.keys() - known):
            raise ValueError(f"frames of a {self.family} have no {', '.join(unknown)}, but {', '.join(known)}")
        return changed

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text that the language model was made for."""
        return int((self.lm.get("text_config") or self.lm).get("max_position_embeddings", 32768))

    @property
    def tokens_per_frame(self) -> int:
        """salmonn2: tokens of a frame: a square of pooled patches, each row closed by one more."""
        side = self.vision["image_size"] // self.vision["patch_size"] // self.pool
        return int(side * (side + 1))

    @property
    def chunk_seconds(self) -> int:
        """Length of the chunks of sound that the Whisper encoder takes."""
        return int(self.whisper["max_source_positions"]) // STEPS_PER_SECOND

    @property
    def window_steps(self) -> int:
        """Encoder steps in a window of the Q-Former."""
        return round(1500 * self.window_seconds / 30)  # in the published order, since halves round either way

    @property
    def stride_steps(self) -> int:
        """Encoder steps from one window to the next."""
        return round(1500 * (self.stride_seconds or self.window_seconds) / 30)

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens that a chunk of sound becomes: those of the windows that fit in it."""
        steps = int(self.whisper["max_source_positions"])
        return ((steps - self.window_steps) // self.stride_steps + 1) * self.num_queries


# So that transformers' own loaders of tokenizers know what they see.
AutoConfig.register(SalmonnConfig.model_type, SalmonnConfig)


def tiny(*, vocab_size: int, eos_token_id: int, pad_token_id: int) -> SalmonnConfig:
    """Sizes of the shipped toy model, a salmonn2 of about 2 million parameters: clips of 8 s at 2 frames a second.

    Fresh weights have a deviation of about 1 / sqrt(width). The published 0.02 suits widths of thousands: here
    Whisper's convolutions would give a hundredth of what its fixed positions add, and pitch would be lost among them.
    """
    deviation = 0.09
    return SalmonnConfig(
        family="salmonn2",
        lm=dict(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            initializer_range=deviation,
            tie_word_embeddings=True,
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
            vision_use_head=False,
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
            decoder_start_token_id=pad_token_id,
            pad_token_id=pad_token_id,
            bos_token_id=pad_token_id,
            eos_token_id=eos_token_id,
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
            encoder_hidden_size=96,
        ),
        pool=1,
        frames=dict(frames_per_second=2.0, max_frames=16, side=48),
        timestamp_tokens=False,
        system_prompt="",
        batch_size=32,  # a word takes it little longer for 32 clips than for one
        initializer_range=deviation,
        tie_word_embeddings=True,
    )


def from_published(values: dict[str, Any]) -> SalmonnConfig:
    """The config of a published checkpoint as ours.

    Raises:
        ValueError: it is of no family that is known here.
    """
    flat = values.get("config", values)
    if flat.get("model_type") == "video_salmonn_2":
        return _salmonn2(values, flat)
    is_plus = "audio_config" in values or "audio_token_id" in values or "SALMONN" in str(values.get("architectures"))
    if flat.get("model_type") == "qwen2_5_vl" and is_plus:
        return _plus(PLUS_DEFAULTS | values)
    raise ValueError(
        f"the model is of type {flat.get('model_type')!r}: known are video-SALMONN 2 (video_salmonn_2), 2+ (qwen2_5_vl "
        "with an audio_config), and models saved by this project (salmonn)"
    )


def _salmonn2(values: dict[str, Any], flat: dict[str, Any]) -> SalmonnConfig:
    # The published code keeps its command line's values in the config.
    audio = values.get("audio_config") or flat.get("model_args") or {}
    if audio.get("mm_pooling_position", "after") != "after" or audio.get("mm_spatial_pool_mode", "max") != "max":
        raise ValueError("the checkpoint pools patches otherwise than by their greatest after the projection")
    siglip = SIGLIP_SO400M | {key: values["siglip"][key] for key in SIGLIP_SO400M if "siglip" in values}
    whisper = WHISPER_LARGE_V3 | {key: values["whisper"][key] for key in WHISPER_KEYS if "whisper" in values}
    qformer = BERT_BASE_OF_TWO_LAYERS | values.get("qformer", {})
    keys = [
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "attention_dropout",
        "bos_token_id",
        "pad_token_id",
        "eos_token_id",
    ]
    return SalmonnConfig(
        family="salmonn2",
        lm={key: flat[key] for key in keys if key in flat},
        # The published features are those before the last layer.
        vision=siglip | {"num_hidden_layers": siglip["num_hidden_layers"] - 1, "vision_use_head": False},
        whisper=whisper,
        qformer=_qformer(qformer, encoder_width=whisper["d_model"]),
        num_queries=audio.get("num_speech_query_token", 1),
        window_seconds=audio.get("second_per_window", 0.5),
        stride_seconds=audio.get("second_stride"),
        tail_tolerance_seconds=0.0,
        timestamp_tokens=flat.get("add_time_token", True),
        frames={"side": siglip["image_size"]},
        prompts=PUBLISHED_PROMPTS["salmonn2"],
        max_new_tokens=1024,
        batch_size=1,
        pool=flat.get("mm_spatial_pool_stride") or 2,
        tie_word_embeddings=flat.get("tie_word_embeddings", False),
    )


def _plus(values: dict[str, Any]) -> SalmonnConfig:
    audio = WHISPER_LARGE_V3 | values.get("audio_config", {})
    qformer = PLUS_QFORMER_DEFAULTS | audio.get("qformer_config", {})
    vision = PLUS_VISION_DEFAULTS | values.get("vision_config", {})
    lm = _without_types({key: value for key, value in values.items() if key != "audio_config"})
    return SalmonnConfig(
        family="salmonn2-plus",
        lm=lm | {"vision_config": vision},
        whisper={key: audio[key] for key in WHISPER_KEYS},
        qformer=_qformer(qformer, encoder_width=audio["d_model"]),
        num_queries=qformer["query_length"],
        window_seconds=audio.get("second_per_window", 0.5),
        stride_seconds=audio.get("second_stride"),
        tail_tolerance_seconds=0.0,
        placeholder_ids=(values["video_token_id"], values["audio_token_id"]),
        frames={"factor": vision["patch_size"] * vision["spatial_merge_size"]},
        prompts=PUBLISHED_PROMPTS["salmonn2-plus"],
        max_new_tokens=1024,
        batch_size=1,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
    )


def _without_types(values: dict[str, Any]) -> dict[str, Any]:
    """A config without the types that its checkpoint was saved in: what it is loaded in is chosen elsewhere."""
    kept = {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")}
    return {key: _without_types(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _qformer(bert: dict[str, Any], *, encoder_width: int) -> dict[str, Any]:
    """The published Q-Former's config (BERT's) as transformers' BLIP-2 names it."""
    same = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    ]
    return {key: bert[key] for key in same if key in bert} | {
        "encoder_hidden_size": encoder_width,
        "cross_attention_frequency": bert["cross_attention_freq"],
    }
