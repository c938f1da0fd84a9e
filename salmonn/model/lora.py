"""LoRA on the language model: attach, merge, save. The reference policy is the same weights with the adapter off."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from salmonn.model.network import PUBLISHED_KEYS, Network
from salmonn.records import atomic_folder, read_json, write_json

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapter of the attention's query, key and value projections (arXiv 2506.15220: r 128, alpha 256)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def to_peft(self) -> PeftLoraConfig:
        """The same as PEFT takes it."""
        return PeftLoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
        )


def attach_lora(network: Network, config: LoraConfig, *, seed: int) -> None:
    """Put a fresh adapter on the language model in place; all other weights are frozen."""
    if isinstance(network.lm, PeftModel):
        raise ValueError("the model carries an adapter already: merge it before attaching another")
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.lm = get_peft_model(network.lm, config.to_peft())


def merge_adapter(network: Network) -> None:
    """Add the adapter to the weights in place and take it off (merged = base + alpha / r * B A)."""
    network.lm = network.lm.merge_and_unload(safe_merge=True)
    network.requires_grad_(False)


@contextmanager
def adapter_disabled(network: Network) -> Iterator[None]:
    """Within this context the network is the reference policy."""
    with network.lm.disable_adapter():
        yield


def load_adapter(network: Network, path: Path | str) -> None:
    """Put a saved adapter on the language model: our own, or one of the published models.

    What a published adapter saved beside its low-rank matrices (parts that were trained as a whole) replaces the
    network's own weights.

    Args:
        network: without an adapter.
        path: PEFT folder, or id on the hub.

    Raises:
        ValueError: there is none, or it is of another model; the message names what is missing and unexpected.
    """
    try:
        folder = _adapter_folder(path)
        config = PeftLoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path} holds no adapter that can be read: {error}. Only safetensors are read: a pickled "
            "adapter_model.bin is turned into them by tools/convert.py"
        ) from error
    _refuse_unknown(config, path)
    low_rank = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    attach_lora(
        network,
        LoraConfig(config.r, config.lora_alpha, config.lora_dropout, tuple(sorted(config.target_modules))),
        seed=0,
    )
    set_adapter_weights(network, low_rank)
    _put_whole(network, {key: tensor for key, tensor in tensors.items() if ".lora_" not in key})


def _adapter_folder(path: Path | str) -> Path:
    """The folder of an adapter, fetched from the hub unless it is here; what was fetched once is found offline too."""
    files = [cached_file(str(path), name) for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)]
    return Path(str(files[-1])).parent


def _refuse_unknown(config: PeftLoraConfig, path: Path | str) -> None:
    """An adapter of another kind would be merged at a wrong scale without a word."""
    kinds = {
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "bias": config.bias != "none",
        "target_modules as a pattern": isinstance(config.target_modules, str),
    }
    if told := [kind for kind, on in kinds.items() if on]:
        raise ValueError(
            f"the adapter in {path} has {', '.join(told)}: plain LoRA of named projections is what is read"
        )


def set_adapter_weights(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Fill the attached adapter's matrices, named as PEFT saves them for our network or for a published one.

    Raises:
        ValueError: they are of another adapter; the message names what is missing and unexpected.
    """
    # The published 2+ has its decoder where transformers now keeps decoder and tower.
    published = "base_model.model.model.layers."
    inner = "model.language_model." if network.config.family == "salmonn2-plus" else "model."
    ours = {
        key.replace(published, f"base_model.model.{inner}layers.", 1).replace(".default.", "."): tensor
        for key, tensor in tensors.items()
    }
    wanted = get_peft_model_state_dict(network.lm).keys()
    if wanted != ours.keys():
        raise ValueError(
            f"the adapter is of another model: missing {sorted(wanted - ours.keys())[:8] or 'none'}, "
            f"unexpected {sorted(ours.keys() - wanted)[:8] or 'none'}"
        )
    set_peft_model_state_dict(network.lm, ours)


def _put_whole(network: Network, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    unknown = []
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").replace("modules_to_save.", "").replace(".default.", ".")
        for pattern, ours in PUBLISHED_KEYS[network.config.family].items():
            name = re.sub(pattern, ours, name)
        # A module that was trained as a whole is saved with its buffers, which hold nothing that was learnt.
        if any(re.search(pattern, name) for pattern in network._keys_to_ignore_on_load_unexpected):
            continue
        if name not in parameters or parameters[name].shape != tensor.shape:
            unknown.append(key)
            continue
        if parameters[name].is_meta:
            raise ValueError(f"the adapter replaces {name}, which is offloaded: load the model on devices that hold it")
        with torch.no_grad():
            parameters[name].copy_(tensor)
    if unknown:
        raise ValueError(f"the adapter is of another model: it holds {sorted(unknown)[:8]} beside its matrices")


def save_adapter(network: Network, path: Path | str) -> None:
    """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors), which appears whole."""
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed before its model was merged
    with atomic_folder(path) as folder:
        network.lm.save_pretrained(str(folder))
        # PEFT keeps the names of the projections as a set, and writes them in another order each time.
        config = folder / ADAPTER_CONFIG_NAME
        values = read_json(config)
        write_json(config, values | {"target_modules": sorted(values["target_modules"])})
