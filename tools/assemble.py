"""Assemble a new video-SALMONN 2+ from a Qwen2.5-VL and a Whisper: the model that audio alignment starts from.

    python tools/assemble.py --lm Qwen/Qwen2.5-VL-7B-Instruct --whisper openai/whisper-large-v3 --out FOLDER

Qwen2.5-VL is used completely, with the additional token `<|audio_pad|>`, and Whisper contributes its encoder. The
window Q-Former and its projection are new. FOLDER is a model in this project's format, for `salmonn caption --model
FOLDER` and for the recipes. It is written atomically.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    WhisperConfig,
    WhisperModel,
)

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.config import run_recipe
from salmonn.files import atomic_folder
from salmonn.model.config import STEPS_PER_SECOND, SalmonnConfig
from salmonn.model.families import from_published
from salmonn.model.families.base import (
    AUDIO_PAD,
    BERT_BASE_2_LAYERS,
    CLIP_END,
    CLIP_START,
    VIDEO_PAD,
    WHISPER_LARGE_V3,
)
from salmonn.model.network import Network
from salmonn.model.towers import AudioTower

WINDOW_SECONDS = 0.5
STEPS_PER_WINDOW = round(WINDOW_SECONDS * STEPS_PER_SECOND)
INIT_STD = 0.02  # of BERT, also for the queries and the projection
MODEL_TYPES = {"lm": ("qwen2_5_vl", "a Qwen2.5-VL"), "whisper": ("whisper", "a Whisper")}


@dataclass(frozen=True)
class AssembleConfig:
    """Sources and sizes of the new model.

    Args:
        out: new folder for the model.
        lm: folder or hub id of a Qwen2.5-VL.
        whisper: folder or hub id of a Whisper.
        qformer_hidden: width of the Q-Former; its feed-forward layers are four times as wide.
        qformer_layers: number of Q-Former layers, each with cross-attention to the audio.
        qformer_heads: number of attention heads of the Q-Former.
        dtype: type of all weights.
        seed: random seed of the new weights.
    """

    out: Path
    lm: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    whisper: str = "openai/whisper-large-v3"
    qformer_hidden: int = 3072
    qformer_layers: int = 2
    qformer_heads: int = 12
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.qformer_hidden, self.qformer_layers, self.qformer_heads) < 1:
            raise ValueError("--qformer-hidden, --qformer-layers and --qformer-heads must be at least 1")
        if self.qformer_hidden % self.qformer_heads:
            raise ValueError(
                f"--qformer-hidden {self.qformer_hidden} is not a multiple of --qformer-heads {self.qformer_heads}"
            )


def main(config: AssembleConfig) -> None:
    """Check the sources, assemble their parts and save the model."""
    with atomic_folder(config.out) as folder:
        check_model_type("lm", config.lm)
        check_model_type("whisper", config.whisper)
        lm_config = Qwen2_5_VLConfig.from_pretrained(config.lm)
        tokenizer = load_tokenizer(config.lm, num_embeddings=lm_config.text_config.vocab_size)
        model_config = make_config(config, lm_config, WhisperConfig.from_pretrained(config.whisper), tokenizer)
        processor = Processor(tokenizer, config=model_config)
        network = assemble(config, model_config)
        Captioner(network, processor).save(folder)


def check_model_type(flag: str, name: str) -> None:
    """Check a source's config.json before any weights are loaded.

    Raises:
        ValueError: the source does not exist, or has another model type than the flag needs.
    """
    model_type, description = MODEL_TYPES[flag]
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(f"--{flag} {name} is neither a model folder nor a model on the hub: {error}") from error
    if not values:
        raise ValueError(f"--{flag} {name} has no config.json; use the folder of {description}")
    if values.get("model_type") != model_type:
        raise ValueError(
            f"--{flag} {name} has model type {values.get('model_type')!r}; use {description} ({model_type!r})"
        )
    if "audio_config" in values:
        raise ValueError(f"--{flag} {name} already has an audio tower (video-SALMONN 2+); use {description} instead")


def load_tokenizer(name: str, *, num_embeddings: int) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer and add the audio placeholder.

    Raises:
        ValueError: the tokenizer lacks a clip token or a chat template, or the new token has no row in the embeddings.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--lm {name} has no tokenizer: {error}") from error
    if missing := [token for token in (CLIP_START, CLIP_END, VIDEO_PAD) if token not in tokenizer.get_vocab()]:
        raise ValueError(f"the tokenizer of --lm {name} lacks {', '.join(missing)}; it does not belong to a Qwen2.5-VL")
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of --lm {name} has no chat template; use an instruction-tuned Qwen2.5-VL")
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_PAD]}, replace_extra_special_tokens=False)
    audio_id = tokenizer.get_vocab()[AUDIO_PAD]
    if audio_id >= num_embeddings:
        raise ValueError(
            f"{AUDIO_PAD} would have token id {audio_id}, but --lm {name} has only {num_embeddings} embeddings; resize "
            f"them to at least {audio_id + 1} and save the model first"
        )
    return tokenizer


def make_config(
    config: AssembleConfig, lm: Qwen2_5_VLConfig, whisper: WhisperConfig, tokenizer: PreTrainedTokenizerBase
) -> SalmonnConfig:
    """Make the config of the new model from a config.json in the format of published 2+ checkpoints."""
    if whisper.max_source_positions % STEPS_PER_WINDOW:
        raise ValueError(
            f"--whisper {config.whisper} has {whisper.max_source_positions} steps per chunk, not a multiple of the "
            f"window of {STEPS_PER_WINDOW} steps; use a Whisper with 1500 steps, as all published ones have"
        )
    qformer = BERT_BASE_2_LAYERS | dict(
        hidden_size=config.qformer_hidden,
        intermediate_size=4 * config.qformer_hidden,
        num_hidden_layers=config.qformer_layers,
        num_attention_heads=config.qformer_heads,
        encoder_width=whisper.d_model,
    )
    audio = {key: getattr(whisper, key) for key in WHISPER_LARGE_V3}
    vocab = tokenizer.get_vocab()
    values = json.loads(lm.to_json_string())
    for part in ("text_config", "vision_config"):
        values[part].pop("dtype", None)  # the type of the source; the saved model has its own
    return from_published(
        values
        | dict(
            video_token_id=vocab[VIDEO_PAD],
            audio_token_id=vocab[AUDIO_PAD],
            audio_config=audio | dict(second_per_window=WINDOW_SECONDS, qformer_config=qformer),
        )
    )


def assemble(config: AssembleConfig, model_config: SalmonnConfig) -> Network:
    """Build a network from the sources' parts, without copying them, and new weights between them."""
    with torch.device("meta"):
        network = Network(model_config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    lm = _load(Qwen2_5_VLForConditionalGeneration, config.lm, dtype=config.dtype)
    whisper = _load(WhisperModel, config.whisper, dtype=config.dtype).encoder
    sources = {"lm": _weights(lm), "whisper": _weights(whisper)}
    assert isinstance(network.audio, AudioTower)
    # The vision tower moves out of the language model.
    network.vision.encoder, lm.model.visual = lm.model.visual, None
    network.lm, network.audio.encoder = lm, whisper
    sources["fresh"] = init_weights(network.audio, seed=config.seed, dtype=getattr(torch, config.dtype))
    sys.stderr.write(f"{check_sources(network, shapes=shapes, sources=sources)}\n")
    return network.eval()


@torch.no_grad()
def init_weights(audio: AudioTower, *, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Allocate and initialize Q-Former and projection, and return their weights.

    As in BERT: matrices and queries from a normal distribution, biases 0, norms 1. Equal seeds give equal weights
    whatever the dtype, up to rounding.
    """
    new = nn.ModuleList([audio.qformer, audio.projector]).to_empty(device="cpu").float()
    for parameter in new.parameters():
        parameter.fill_(torch.nan)  # so that `check_sources` notices one that is not initialized below
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        audio.qformer.queries.normal_(std=INIT_STD)
        for module in new.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=INIT_STD)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    return _weights(new.to(dtype))


def check_sources(network: Network, *, shapes: Mapping[str, torch.Size], sources: Mapping[str, list[Tensor]]) -> str:
    """Check that every weight comes from exactly one source, and that every weight of the sources is used.

    Its shape must be that in `shapes`, which the config describes.

    Returns:
        The number of weights from each source, as a sentence.

    Raises:
        ValueError: a weight is missing, unused or of another shape, or has no source or several.
    """
    weights = network.state_dict(keep_vars=True)
    found = {name: tensor.shape for name, tensor in weights.items()}
    if different := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise ValueError(f"the sources' weights do not match their config.json: {', '.join(different[:8])}")
    owners = defaultdict(list)
    for source, tensors in sources.items():
        for identity in {id(tensor) for tensor in tensors}:  # tied weights count once
            owners[identity].append(source)
    names = {id(tensor): name for name, tensor in weights.items()}
    origins = {name: owners.pop(identity, []) for identity, name in names.items()}
    if wrong := sorted(name for name, origin in origins.items() if len(origin) != 1):
        raise ValueError(f"each weight must come from one source; these come from none or several: {wrong[:8]}")
    if owners:
        raise ValueError(f"{len(owners)} weights of the sources were not used; this tool does not support their layout")
    if unset := [name for name, tensor in weights.items() if tensor.is_meta or not tensor.isfinite().all()]:
        raise ValueError(f"weights without a finite value: {', '.join(unset[:8])}")
    counts = Counter(source for (source,) in origins.values())
    return ", ".join(f"{counts[source]} weights from {source}" for source in sources)


def _weights(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())


def _load(model_class: Any, name: str, *, dtype: str) -> Any:
    try:
        model, info = model_class.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of {name} are missing or damaged: {error}") from error
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ValueError(f"the weights of {name} do not match its config.json: {', '.join(wrong[:8])}")
    return model


if __name__ == "__main__":
    run_recipe(main, AssembleConfig, description="Assemble a new video-SALMONN 2+ from a Qwen2.5-VL and a Whisper.")
