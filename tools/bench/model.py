"""Models with random weights, noise clips and random preference pairs, large enough that arithmetic dominates."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from rows import BenchRow, report_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import wrap_tokenizer
from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.clip import Clip
from salmonn.model.config import SalmonnConfig
from salmonn.model.families.base import AUDIO_PAD, CLIP_END, CLIP_START, PAD, TURN_END, TURN_START, VIDEO_PAD
from salmonn.model.families.salmonn2 import tiny_config
from salmonn.model.layout import ClipInputs
from salmonn.model.loading import offline_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import Network
from salmonn.records import Comparison

SPECIAL = [PAD, TURN_START, TURN_END, CLIP_START, CLIP_END, VIDEO_PAD, AUDIO_PAD]
PROMPT = "w1 w2 w3 w4 w5 w6 w7 w8"
LORA = LoraConfig(rank=16, alpha=32, dropout=0.0)
ShapeName = Literal["small", "mid", "7b"]
FamilyName = Literal["salmonn2", "salmonn2-plus"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark model.

    Args:
        width, layers, heads, kv_heads, intermediate: sizes of the decoder.
        tower_width, tower_layers: sizes of the vision encoder; Whisper and the Q-Former are derived from them.
        side: frame size in pixels.
        vocab_size: vocabulary size.
        num_frames: frames of a clip, one per second; at 384 pixels 182 tokens a frame.
        answer_tokens: tokens of each answer of a pair.
        published: id of a published model whose sizes replace those of the decoder and the encoders.
    """

    width: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    intermediate: int = 1536
    tower_width: int = 192
    tower_layers: int = 4
    side: int = 384
    vocab_size: int = 8192
    num_frames: int = 22
    answer_tokens: int = 200
    published: str | None = None


SHAPES: dict[ShapeName, Shape] = {
    # For tests: seconds on one core.
    "small": Shape(
        width=64, layers=2, heads=4, intermediate=128, tower_width=32, tower_layers=1, side=112, vocab_size=512,
        num_frames=8, answer_tokens=10,
    ),
    # 25 million parameters; a clip and its prompt of 4,100 tokens, 20 times as long as an answer.
    "mid": Shape(),
    # 100 s of clip: 18,600 tokens, then an answer of 900.
    "7b": Shape(
        vocab_size=152_064, num_frames=100, answer_tokens=900, published="tsinghua-ee/video-SALMONN-2",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark.

    Args:
        shape: sizes of the model.
        family: model family.
        device: cpu or cuda.
        dtype: dtype of weights and matrix products.
        repeats: timed runs of each side; medians are reported.
    """

    shape: ShapeName = "mid"
    family: FamilyName = "salmonn2"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 3

    @property
    def sizes(self) -> Shape:
        """Sizes of the shape."""
        return SHAPES[self.shape]


def parse(description: str, **isolated: type) -> tuple[BenchConfig, Any]:
    """Parse a benchmark's command line.

    Args:
        description: description for --help.
        isolated: names and types of further flags, with which the script measures one thing in this process and writes
            it as JSON (see `run_isolated`).

    Returns:
        The settings, and all parsed values.
    """
    parser = ArgumentParser(description=description)
    parser.add_class_arguments(BenchConfig, None)
    parser.add_argument("--quick", action="store_true", help="small sizes, for testing")
    parser.add_argument("--out", type=Path | None, default=None, help="file of rows in JSON")
    for name, kind in isolated.items():
        parser.add_argument(
            f"--{name}", type=kind | None, default=None, help="internal: measure one thing in this process"
        )
    values = parser.parse_args()
    config = BenchConfig(*(values[field.name] for field in fields(BenchConfig)))
    return (replace(config, shape="small", repeats=2) if values.quick else config), values


def start(
    description: str, run: Callable[[BenchConfig], list[BenchRow]], report_memory: Callable[[BenchConfig, str], None]
) -> None:
    """Run a benchmark script: parse, run and report; or measure the memory of one side in this process."""
    config, values = parse(description, memory_of=str)
    if values.memory_of:
        report_memory(config, values.memory_of)
    else:
        report_rows(run(config), out=values.out)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer in which each word w0, w1, ... is one token."""
    words = {word: number for number, word in enumerate(SPECIAL)}
    words |= {f"w{number}": number for number in range(len(SPECIAL), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{len(SPECIAL)}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap_tokenizer(tokenizer)


def make_words(count: int, *, shape: Shape, seed: int) -> str:
    """Return random words; no two such texts share a prefix."""
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(len(SPECIAL), shape.vocab_size)}" for _ in range(count))


def make_config(shape: Shape, tokenizer: PreTrainedTokenizerFast, *, family: FamilyName) -> SalmonnConfig:
    """Make the config of a network of either family."""
    if shape.published:
        return offline_config(shape.published)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = tiny_config(vocab_size=shape.vocab_size, **ids)
    tower = dict(hidden_size=shape.tower_width, num_attention_heads=4, intermediate_size=4 * shape.tower_width)
    config.lm |= dict(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768,
        initializer_range=0.02,
        tie_word_embeddings=False,
    )
    config.vision |= tower | dict(image_size=shape.side, patch_size=14, num_hidden_layers=shape.tower_layers)
    config.whisper |= dict(
        d_model=shape.tower_width,
        encoder_ffn_dim=4 * shape.tower_width,
        num_mel_bins=80,
        max_source_positions=1500,
    )
    config.qformer |= tower | dict(encoder_hidden_size=shape.tower_width)
    config.pool, config.tie_word_embeddings, config.initializer_range = 2, False, 0.02
    config.frames = dict(frames_per_second=1.0, max_frames=10_000, side=shape.side)
    convert = {"salmonn2": lambda: config, "salmonn2-plus": lambda: _to_plus(config, shape, tokenizer)}
    return convert[family]()


def _to_plus(config: SalmonnConfig, shape: Shape, tokenizer: PreTrainedTokenizerFast) -> SalmonnConfig:
    """Convert to 2+'s vision encoder and 3-D positions; two frames are one step of 169 tokens at 364 pixels."""
    config.family = "salmonn2-plus"
    video_pad, audio_pad = tokenizer.convert_tokens_to_ids([VIDEO_PAD, AUDIO_PAD])
    config.placeholder_ids = (video_pad, audio_pad)
    pixels = (shape.side // 28 * 28) ** 2
    config.frames = dict(
        interval_seconds=0.5, min_frames=2, max_frames=10_000, min_pixels=pixels, max_pixels=pixels, budget_fraction=0.0
    )
    half = shape.width // shape.heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    vision = dict(
        depth=shape.tower_layers,
        hidden_size=shape.tower_width,
        intermediate_size=2 * shape.tower_width,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[shape.tower_layers - 1],
        out_hidden_size=shape.width,
    )
    rotary = dict(rope_type="default", rope_theta=10_000.0, mrope_section=sections)
    ids = {key: config.lm[key] for key in ("eos_token_id", "pad_token_id")}
    text: dict[str, Any] = config.lm | dict(rope_parameters=rotary)
    config.lm = dict(text_config=text, vision_config=vision, tie_word_embeddings=False, video_token_id=video_pad, **ids)
    config.vision = None
    return config


def make_captioner(
    shape: Shape, *, family: FamilyName = "salmonn2", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Captioner:
    """Make a captioner with random weights.

    Logits are spread wider than those of fresh weights, so that rounding never changes the most likely token. Special
    tokens, some of which end an answer, are unlikely, so that all answers have the same length.
    """
    tokenizer = make_tokenizer(shape.vocab_size)
    config = make_config(shape, tokenizer, family=family)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = Network(config).eval()
    finally:
        torch.set_default_dtype(default)
    processor = Processor(tokenizer, config=config)
    with torch.no_grad():
        head = network.lm.get_output_embeddings().weight
        # The head's input has a mean square of 1, so logits have a standard deviation of 3.
        head.normal_(std=3 * head.shape[1] ** -0.5)
        head[: len(SPECIAL)] = 0
    return Captioner(network, processor)


def attach_adapter(network: Network) -> None:
    """Attach an adapter with non-zero B matrices; otherwise the gradients of all A matrices would be 0."""
    attach_lora(network, LORA, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    network.train()


def make_clip(processor: Processor, *, num_frames: int, side: int, seed: int = 0) -> ClipInputs:
    """Make the model inputs of a noise clip with one second per frame."""
    rng = np.random.default_rng(seed)
    sampler = processor.family.frame_sampler
    taken = len(sampler.sample_times(0.0, num_frames, 10 * num_frames))
    rows, columns = sampler.frame_size(side, side, taken)
    frames = rng.integers(0, 256, (taken, rows, columns, 3), np.uint8)
    wave = rng.normal(size=num_frames * SAMPLE_RATE_HZ).astype(np.float32)
    times = np.arange(taken) * num_frames / taken
    return processor.clip_inputs(Clip("noise", frames, times, wave, 0.0, num_frames, num_frames))


def make_pair(shape: Shape, *, video: str = "noise", seed: int = 0) -> Comparison:
    """Make a preference pair of random answers to one prompt."""
    chosen, rejected, truth = (
        make_words(shape.answer_tokens, shape=shape, seed=3 * seed + place) for place in range(3)
    )
    return Comparison(video, PROMPT, chosen, rejected, truth)
