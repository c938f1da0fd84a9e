"""A model of random weights, clips of noise and pairs of words by chance, large enough that arithmetic is timed."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from rows import BenchRow, hand_in
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import wrap_tokenizer
from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.clip import Clip
from salmonn.model.config import SalmonnConfig
from salmonn.model.families.base import AUDIO_PAD, CLIP_END, CLIP_START, PAD, TURN_END, TURN_START, VIDEO_PAD
from salmonn.model.families.tiny import tiny_config
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
    """Sizes of a bench.

    Args:
        width, layers, heads, kv_heads, intermediate: of the decoder.
        tower_width, tower_layers: of the vision encoder; Whisper's and the Q-Former's follow.
        side: of a frame in pixels.
        vocab_size: words that the model knows.
        num_frames: of a clip, a second each; at 384 pixels 182 tokens a frame.
        answer_tokens: of each answer of a pair.
        published: take the sizes of this published model in place of those of the decoder and of the towers.
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
    # For the tests: seconds on one core.
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
    """What is run.

    Args:
        shape: sizes.
        family: of the model.
        device: cpu or cuda.
        dtype: of weights and products.
        repeats: of each side; medians are told.
    """

    shape: ShapeName = "mid"
    family: FamilyName = "salmonn2"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 3

    @property
    def sizes(self) -> Shape:
        """Of the shape."""
        return SHAPES[self.shape]


def parse(description: str, **alone: type) -> tuple[BenchConfig, Any]:
    """A bench's command line.

    Args:
        description: of the bench.
        alone: flags of its own and their types, with which it measures one thing in this process and tells it.

    Returns:
        What is run, and all values.
    """
    parser = ArgumentParser(description=description)
    parser.add_class_arguments(BenchConfig, None)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path | None, default=None, help="file of rows in JSON")
    for name, kind in alone.items():
        parser.add_argument(f"--{name}", type=kind | None, default=None, help="measure this alone, and tell it")
    values = parser.parse_args()
    config = BenchConfig(*(values[field.name] for field in fields(BenchConfig)))
    return (replace(config, shape="small", repeats=2) if values.quick else config), values


def start(
    description: str, run: Callable[[BenchConfig], list[BenchRow]], tell_memory: Callable[[BenchConfig, str], None]
) -> None:
    """What a bench of several sides does: parse, run, show; or measure the memory of one side, and tell it."""
    config, values = parse(description, memory_of=str)
    if values.memory_of:
        tell_memory(config, values.memory_of)
    else:
        hand_in(run(config), out=values.out)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words w0, w1 ... are tokens, each for itself, so that texts have as many tokens as words."""
    words = {word: number for number, word in enumerate(SPECIAL)}
    words |= {f"w{number}": number for number in range(len(SPECIAL), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{len(SPECIAL)}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap_tokenizer(tokenizer)


def make_words(count: int, *, shape: Shape, seed: int) -> str:
    """So many words by chance; no two such texts begin alike."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(len(SPECIAL), shape.vocab_size)}" for _ in range(count))


def make_config(shape: Shape, tokenizer: PreTrainedTokenizerFast, *, family: FamilyName) -> SalmonnConfig:
    """The sizes of a network of either family."""
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
    """The same with 2+'s vision tower and 3-D positions; two frames are one step of 169 tokens at 364 pixels."""
    config.family = "salmonn2-plus"
    seen, heard = tokenizer.convert_tokens_to_ids([VIDEO_PAD, AUDIO_PAD])
    config.placeholder_ids = (seen, heard)
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
    config.lm = dict(text_config=text, vision_config=vision, tie_word_embeddings=False, video_token_id=seen, **ids)
    config.vision = None
    return config


def make_captioner(
    shape: Shape, *, family: FamilyName = "salmonn2", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Captioner:
    """A network of random weights with its processor.

    Words differ more in likelihood than fresh weights tell them, so that roundings choose no word; special
    ones, which end an answer or are no words, are never likely, so that all answers are of one length.
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
        # What goes in has a mean square of 1: logits then have a deviation of 3.
        head.normal_(std=3 * head.shape[1] ** -0.5)
        head[: len(SPECIAL)] = 0
    return Captioner(network, processor)


def adapt(network: Network) -> None:
    """Attach an adapter that has learnt something, or all its gradients but one matrix's would be 0."""
    attach_lora(network, LORA, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    network.train()


def make_clip(processor: Processor, *, num_frames: int, side: int, seed: int = 0) -> ClipInputs:
    """A clip of noise, a second for each frame, as the model takes it."""
    draw = np.random.default_rng(seed)
    sampler = processor.family.frame_sampler
    taken = len(sampler.sample_times(0.0, num_frames, 10 * num_frames))
    rows, columns = sampler.frame_size(side, side, taken)
    frames = draw.integers(0, 256, (taken, rows, columns, 3), np.uint8)
    wave = draw.normal(size=num_frames * SAMPLE_RATE_HZ).astype(np.float32)
    times = np.arange(taken) * num_frames / taken
    return processor.clip_inputs(Clip("noise", frames, times, wave, 0.0, num_frames, num_frames))


def make_pair(shape: Shape, *, video: str = "noise", seed: int = 0) -> Comparison:
    """Three answers by chance to one prompt."""
    chosen, rejected, truth = (
        make_words(shape.answer_tokens, shape=shape, seed=3 * seed + place) for place in range(3)
    )
    return Comparison(video, PROMPT, chosen, rejected, truth)
