"""Make a fresh video-SALMONN 2+ of a Qwen2.5-VL and a Whisper: the model that audio alignment starts from.

    python tools/assemble.py --lm Qwen/Qwen2.5-VL-7B-Instruct --whisper openai/whisper-large-v3 --out FOLDER

Qwen2.5-VL is taken whole and gains the token `<|audio_pad|>`, Whisper gives its encoder, the window Q-Former and the
projection behind it are new. FOLDER is one of this project's own models: `salmonn caption --model FOLDER` and the
recipes read it. It appears whole or not at all.
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
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.caption.tokenizer import AUDIO_PAD, CLIP_END, CLIP_START, VIDEO_PAD
from salmonn.config import run_recipe
from salmonn.model.audio import AudioTower
from salmonn.model.config import BERT_BASE_OF_TWO_LAYERS, WHISPER_KEYS, SalmonnConfig, from_published
from salmonn.model.network import Network
from salmonn.records import atomic_folder

WINDOW_SECONDS = 0.5
STEPS_PER_WINDOW = round(WINDOW_SECONDS * 50)  # Whisper's encoder gives 50 steps a second
INIT_STD = 0.02  # BERT's, also of its queries and of the projection
MODEL_TYPES = {"lm": ("qwen2_5_vl", "a Qwen2.5-VL"), "whisper": ("whisper", "a Whisper")}


@dataclass(frozen=True)
class AssembleConfig:
    """What is put together.

    Args:
        out: new folder for the model.
        lm: folder or hub id of a Qwen2.5-VL.
        whisper: folder or hub id of a Whisper.
        qformer_hidden: width of the Q-Former; its inner layers are four times as wide.
        qformer_layers: number of its layers, each with cross-attention to the sound.
        qformer_heads: attention heads of each.
        dtype: of all weights.
        seed: of the new weights.
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
            raise ValueError("--qformer_hidden, --qformer_layers and --qformer_heads must be at least 1")
        if self.qformer_hidden % self.qformer_heads:
            raise ValueError(
                f"--qformer_hidden {self.qformer_hidden} does not divide among --qformer_heads {self.qformer_heads}"
            )


def main(config: AssembleConfig) -> None:
    """Check the sources, put their parts together, save."""
    with atomic_folder(config.out) as folder:
        check_kind("lm", config.lm)
        check_kind("whisper", config.whisper)
        lm_config = Qwen2_5_VLConfig.from_pretrained(config.lm)
        tokenizer = load_tokenizer(config.lm, num_embeddings=lm_config.text_config.vocab_size)
        settings = make_settings(config, lm_config, WhisperConfig.from_pretrained(config.whisper), tokenizer)
        processor = Processor(tokenizer, config=settings)
        network = assemble(config, settings)
        Captioner(network, processor).save(folder)


def check_kind(flag: str, name: str) -> None:
    """Look at a source's config.json, before any weights are loaded.

    Raises:
        ValueError: the source is not there, or of another kind than the flag asks for.
    """
    wanted, words = MODEL_TYPES[flag]
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(
            f"--{flag} {name} is neither the folder of a model nor one that the hub gives: {error}"
        ) from error
    if not values:
        raise ValueError(f"--{flag} {name} holds no config.json: give the folder of {words}")
    if values.get("model_type") != wanted:
        raise ValueError(f"--{flag} {name} is of type {values.get('model_type')!r}: give {words} ({wanted!r})")
    if "audio_config" in values:
        raise ValueError(f"--{flag} {name} hears already, it is a video-SALMONN 2+: give {words} as it was published")


def load_tokenizer(name: str, *, num_embeddings: int) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with a token for what is heard.

    Raises:
        ValueError: it lacks a token of clips or a chat template, or the embedding matrix has no row for the new token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--lm {name} has no tokenizer: {error}") from error
    if lacking := [token for token in (CLIP_START, CLIP_END, VIDEO_PAD) if token not in tokenizer.get_vocab()]:
        raise ValueError(f"the tokenizer of --lm {name} lacks {', '.join(lacking)}: it is not that of a Qwen2.5-VL")
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of --lm {name} has no chat template: give an instruction-tuned Qwen2.5-VL")
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_PAD]}, replace_extra_special_tokens=False)
    number = tokenizer.get_vocab()[AUDIO_PAD]
    if number >= num_embeddings:
        raise ValueError(
            f"{AUDIO_PAD} would be token {number}, but --lm {name} embeds only {num_embeddings} tokens: "
            f"resize its embeddings to {number + 1} or more and save it before"
        )
    return tokenizer


def make_settings(
    config: AssembleConfig, lm: Qwen2_5_VLConfig, whisper: WhisperConfig, tokenizer: PreTrainedTokenizerBase
) -> SalmonnConfig:
    """The sizes of all parts, by way of a config as the published 2+ checkpoints have it."""
    if whisper.max_source_positions % STEPS_PER_WINDOW:
        raise ValueError(
            f"--whisper {config.whisper} gives {whisper.max_source_positions} steps a chunk, which are no whole "
            f"windows of {STEPS_PER_WINDOW}: give a Whisper of 1500 steps, as all published ones are"
        )
    qformer = BERT_BASE_OF_TWO_LAYERS | dict(
        hidden_size=config.qformer_hidden,
        intermediate_size=4 * config.qformer_hidden,
        num_hidden_layers=config.qformer_layers,
        num_attention_heads=config.qformer_heads,
        encoder_width=whisper.d_model,
    )
    audio = {key: getattr(whisper, key) for key in WHISPER_KEYS}
    vocab = tokenizer.get_vocab()
    values = json.loads(lm.to_json_string())
    for part in ("text_config", "vision_config"):
        values[part].pop("dtype", None)  # the source's; what is saved states its own
    published = values | dict(
        video_token_id=vocab[VIDEO_PAD],
        audio_token_id=vocab[AUDIO_PAD],
        audio_config=audio | dict(second_per_window=WINDOW_SECONDS, qformer_config=qformer),
    )
    return from_published(published)


def assemble(config: AssembleConfig, settings: SalmonnConfig) -> Network:
    """A network of the sources' parts, none of them copied, and new ones between them."""
    with torch.device("meta"):
        network = Network(settings)
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    lm = _load(Qwen2_5_VLForConditionalGeneration, config.lm, dtype=config.dtype)
    whisper = _load(WhisperModel, config.whisper, dtype=config.dtype).encoder
    sources = {"lm": _weights(lm), "whisper": _weights(whisper)}
    insert_parts(network, lm=lm, whisper=whisper)
    assert isinstance(network.audio, AudioTower)
    sources["fresh"] = draw_fresh(network.audio, seed=config.seed, dtype=getattr(torch, config.dtype))
    _tell(check(network, wanted=wanted, sources=sources))
    return network.eval()


def insert_parts(network: Network, *, lm: Qwen2_5_VLForConditionalGeneration, whisper: WhisperEncoder) -> None:
    """Replace a network's parts by pretrained ones; the vision tower moves out of the language model."""
    network.vision.encoder, lm.model.visual = lm.model.visual, None
    network.lm = lm
    network.audio.encoder = whisper


@torch.no_grad()
def draw_fresh(audio: AudioTower, *, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Give memory and values to Q-Former and projection, and say which weights those are.

    As BERT begins: matrices and queries from a normal distribution, biases 0, norms 1. The same seed draws the same
    whatever the dtype.
    """
    new = nn.ModuleList([audio.qformer, audio.projector]).to_empty(device="cpu").float()
    for parameter in new.parameters():
        parameter.fill_(torch.nan)  # so that one which is forgotten below is noticed by `check`
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


def check(network: Network, *, wanted: Mapping[str, torch.Size], sources: Mapping[str, list[Tensor]]) -> str:
    """Make sure that every weight has come from exactly one source, and that no source has weights left over.

    Args:
        network: as it was put together.
        wanted: shapes of the weights that its config describes.
        sources: weights by where they came from.

    Returns:
        A sentence that says how many came from where.

    Raises:
        ValueError: a weight is missing, left over or of another shape, or has no source or several.
    """
    weights = network.state_dict(keep_vars=True)
    found = {name: tensor.shape for name, tensor in weights.items()}
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ValueError(f"the sources' weights do not fit their config.json: {', '.join(differing[:8])}")
    owners = defaultdict(list)
    for source, tensors in sources.items():
        for number in {id(tensor) for tensor in tensors}:  # tied weights are one
            owners[number].append(source)
    names = {id(tensor): name for name, tensor in weights.items()}
    origins = {name: owners.pop(number, []) for number, name in names.items()}
    if wrong := sorted(name for name, origin in origins.items() if len(origin) != 1):
        raise ValueError(f"weights must come from one source each, these come from none or several: {wrong[:8]}")
    if owners:
        raise ValueError(f"{len(owners)} weights of the sources found no place: this tool does not know their layout")
    if unset := [name for name, tensor in weights.items() if tensor.is_meta or not tensor.isfinite().all()]:
        raise ValueError(f"weights without a value, or not a finite one: {', '.join(unset[:8])}")
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
            ignore_mismatched_sizes=True,  # they are told below, by name
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of {name} are missing or damaged: {error}") from error
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ValueError(f"the weights of {name} do not fit its config.json: {', '.join(wrong[:8])}")
    return model


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    run_recipe(main, AssembleConfig, description="Make a fresh video-SALMONN 2+ of a Qwen2.5-VL and a Whisper.")
