"""Split a model in two: its language model as a Qwen2 for vLLM, and its towers, which run here.

A split model stays in a cache folder, whose name depends on the files of the model and on the type of its weights.
"""

import logging
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import cached_file

from salmonn import system
from salmonn.caption.captioner import Captioner
from salmonn.caption.vllm_prompt import ARCHITECTURE
from salmonn.files import atomic_folder, fingerprint_folder, read_json, write_json
from salmonn.model.loading import CONFIG_NAME, Placement, load_config
from salmonn.model.lora import ADAPTER_CONFIG_NAME
from salmonn.model.network import Network

logger = logging.getLogger(__name__)
CACHE = Path("~/.cache/salmonn/vllm")
FORMAT = 1  # of the cached folders
LM, TOWERS = "lm", "towers"  # in a cached folder


def split_model(model: Path | str, *, dtype: Any, adapter: Path | str | None = None) -> Path:
    """Return the cached folder with language model and towers; it is written first if it does not exist.

    Args:
        model: folder or hub id.
        dtype: type of the weights.
        adapter: folder or hub id of an adapter to merge first.

    Raises:
        ValueError: the model is of another family, or does not fit on the disk.
    """
    require_qwen2(model)
    state = blake2b(repr((FORMAT, dtype)).encode(), digest_size=16)
    for path, name in ((model, CONFIG_NAME), (adapter, ADAPTER_CONFIG_NAME)):
        state.update(b"" if path is None else _fingerprint(path, name).encode())
    folder = CACHE.expanduser() / state.hexdigest()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        system.lock(file.fileno())  # until another process has written it
        if not folder.is_dir():
            logger.warning("preparing %s for vLLM in %s, once", model, folder)
            half = folder.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)  # from a process that was killed
            with atomic_folder(half / folder.name) as written:
                captioner = Captioner.load(model, placement=Placement(device="cpu", dtype=dtype), adapter=adapter)
                _require_space(captioner.network, written)
                write_language_model(captioner, written / LM)
                drop_layers(captioner.network)
                captioner.save(written / TOWERS)
            (half / folder.name).replace(folder)
            half.rmdir()
    return folder


def _fingerprint(path: Path | str, config_name: str) -> str:
    """Return the fingerprint of a folder, or the commit of a model on the hub."""
    if Path(path).is_dir():
        return fingerprint_folder(Path(path))
    file = cached_file(str(path), config_name)
    assert file is not None
    return f"{path}@{Path(file).parent.name}"


def _require_space(network: Network, folder: Path) -> None:
    needed = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(
            f"vLLM needs a copy of the model ({needed / 1e9:.1f} GB), and {CACHE} has {free / 1e9:.1f} GB left; delete "
            "older folders there, or set HOME to another disk"
        )


def require_qwen2(model: Path | str) -> None:
    """Raise a ValueError if the language model is none that `write_language_model` writes."""
    with torch.device("meta"):
        network = Network(load_config(model))
    if not isinstance(network.lm, Qwen2ForCausalLM | Qwen2_5_VLForConditionalGeneration):
        raise ValueError(f"{model} is a {network.family.name} model; only video-SALMONN 2 and 2+ can be exported")


def write_language_model(captioner: Captioner, folder: Path) -> None:
    """Write language model and tokenizer to a folder that vLLM loads."""
    lm = captioner.network.lm
    if isinstance(lm, Qwen2_5_VLForConditionalGeneration):
        lm = to_qwen2(lm)
    lm.save_pretrained(str(folder))
    if "mrope_section" in (lm.config.rope_parameters or {}):
        # Name the plugin's class, so that no server takes the model for a Qwen2 with 1-D positions.
        config = folder / CONFIG_NAME
        write_json(config, read_json(config) | {"architectures": [ARCHITECTURE]})
    captioner.processor.save(folder)


def to_qwen2(lm: Qwen2_5_VLForConditionalGeneration) -> Qwen2ForCausalLM:
    """Return the decoder of Qwen2.5-VL as a Qwen2 with the same weights; its config keeps 3-D positions."""
    text = lm.config.get_text_config().to_dict()
    drop = ("model_type", "architectures", "vision_config", "audio_config")
    qwen2 = Qwen2Config(**{key: value for key, value in text.items() if key not in drop})
    with torch.device("meta"):
        plain = Qwen2ForCausalLM(qwen2)
    weights = {name.replace("model.language_model.", "model."): one for name, one in lm.state_dict().items()}
    if qwen2.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    plain.load_state_dict(weights, assign=True)
    return plain


def drop_layers(network: Network) -> None:
    """Reduce the language model to its embeddings, which clips with timestamps need."""
    config = network.config
    text = config.lm.get("text_config") or config.lm
    text["num_hidden_layers"] = 0
    text.pop("layer_types", None)
    network.lm.get_decoder().layers = nn.ModuleList()
    # The output head is not used: it shares the weights of the embeddings, so that it is not saved.
    config.tie_word_embeddings = config.lm["tie_word_embeddings"] = text["tie_word_embeddings"] = True
    network.lm.get_output_embeddings().weight = network.lm.get_input_embeddings().weight
