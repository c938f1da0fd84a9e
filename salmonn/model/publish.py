"""Model folders as others load them: the published layout of a family, and transformers' Auto classes.

Published checkpoints have other names of weights than `Network`. They are not inverted from `Family.weight_names`, but
looked up: each weight of the base checkpoint, under its published name, gets the value that the trained model has for
it. So a trained model in the published layout has exactly the files that code for the base model reads.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

from salmonn.files import read_json, write_json
from salmonn.model.families import get_family
from salmonn.model.loading import CONFIG_NAME, load_config
from salmonn.model.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from salmonn.model.weight_files import INDEX_NAME, WEIGHTS_NAME

SHARD_SIZE = "5GB"
# Small files of a checkpoint that code for it reads besides the weights.
COPIED_NAMES = (
    CONFIG_NAME, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
MODELING_NAME = "modeling_salmonn.py"
PROCESSOR_CONFIG_NAME = "processor_config.json"
MODELING_CODE = '''"""Loads this model with transformers; needs the package salmonn."""

from salmonn.caption.auto_processor import SalmonnProcessor
from salmonn.model.config import SalmonnConfig
from salmonn.model.network import Network

__all__ = ["Network", "SalmonnConfig", "SalmonnProcessor"]
'''


def write_own_layout(model: Path, folder: Path) -> None:
    """Copy a saved model, and let `AutoModel` and `AutoProcessor` load it with `trust_remote_code=True`.

    Args:
        model: folder of a saved model.
        folder: empty folder.
    """
    for file in sorted(model.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    (folder / MODELING_NAME).write_text(MODELING_CODE, encoding="utf-8")
    classes = {
        "AutoConfig": "modeling_salmonn.SalmonnConfig",
        "AutoModel": "modeling_salmonn.Network",
        "AutoProcessor": "modeling_salmonn.SalmonnProcessor",
    }
    write_json(folder / CONFIG_NAME, read_json(folder / CONFIG_NAME) | {"auto_map": classes})
    # AutoProcessor looks here first.
    write_json(folder / PROCESSOR_CONFIG_NAME, {"auto_map": {"AutoProcessor": classes["AutoProcessor"]}})


def write_published_layout(model: Path, folder: Path, *, base: str) -> None:
    """Write a saved model with the names of weights and the small files of its base checkpoint.

    Args:
        model: folder of a saved model.
        folder: empty folder.
        base: folder or hub id of the published checkpoint that it was trained from.

    Raises:
        ValueError: the base has another family or other sizes, or its files cannot be read.
    """
    ours, theirs = load_config(model), load_config(base)
    if get_family(ours).name != get_family(theirs).name:
        raise ValueError(
            f"{model} was not trained from {base}: it is a {ours.family} model and not a {theirs.family} one; pass the "
            "checkpoint that training started from as --base"
        )
    family = get_family(ours)
    tensors = {
        part: value
        for path in sorted(model.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
        for part, value in family.split_weight(name, tensor).items()
    }
    published, used = dict[str, Tensor](), set[str]()
    for name, tensor in _read_base(base):
        own = family.own_weight_name(name)
        if own in tensors and tensors[own].shape != tensor.shape:
            raise ValueError(
                f"{model} was not trained from {base}: {name} has shape {tuple(tensor.shape)} there and "
                f"{tuple(tensors[own].shape)} here; pass the checkpoint that training started from as --base"
            )
        # A weight that the network lacks has no influence on captions, such as that of a part which is not used.
        published[name] = tensors.get(own, tensor)
        used.add(own)
    if missing := sorted(tensors.keys() - used):
        raise ValueError(f"{base} has no weights {', '.join(missing[:8])}, which {model} has; pass its own base")
    _save_shards(published, folder)
    for name in COPIED_NAMES:
        if file := cached_file(base, name, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(file, folder / name)


def write_adapter(adapter: Path, folder: Path, *, base: str) -> None:
    """Write a saved adapter with the names that adapters for the code of a base checkpoint have.

    Args:
        adapter: PEFT folder of a round.
        folder: empty folder.
        base: folder or hub id of the model that it belongs to.
    """
    family = get_family(load_config(base))
    # Adapters have the module names of the code for the base, which its checkpoint has, too.
    first = "layers.0.self_attn.q_proj.weight"
    own = f"lm.{family.decoder_prefix}{first}"
    theirs = next(name for name in _base_files(base) if family.own_weight_name(name) == own)
    ours, theirs = f"base_model.model.{family.decoder_prefix}", f"base_model.model.{theirs.removesuffix(first)}"
    tensors = load_file(adapter / ADAPTER_WEIGHTS_NAME)
    renamed = {name.replace(ours, theirs, 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, str(folder / ADAPTER_WEIGHTS_NAME), metadata={"format": "pt"})
    config = read_json(adapter / ADAPTER_CONFIG_NAME)
    write_json(folder / ADAPTER_CONFIG_NAME, config | {"base_model_name_or_path": base})


def _base_files(base: str) -> dict[str, str]:
    """Return name of each weight of a folder or of a checkpoint on the hub -> name of its file."""
    try:
        index = cached_file(base, INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index:
            return dict(read_json(Path(index))["weight_map"])
        with safe_open(str(cached_file(base, WEIGHTS_NAME)), framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), WEIGHTS_NAME)
    except OSError as error:
        raise ValueError(f"the weights of {base} cannot be read: {error}") from error


def _read_base(base: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder, or of a checkpoint on the hub, by their names."""
    for file in sorted(set(_base_files(base).values())):
        with safe_open(str(cached_file(base, file)), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                yield name, tensors.get_tensor(name)


def _save_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, str(folder / file), metadata={"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
