"""LoRA on the language model.

The reference policy is the same network with the adapter disabled: `with network.lm.disable_adapter(): ...`.
PEFT is imported when an adapter is used: its import takes a second, a fifth of the start of `salmonn caption`.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from salmonn.files import atomic_folder, read_json, write_json
from salmonn.model.families.base import Family
from salmonn.model.network import Network

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER = "default"  # PEFT's name of the only adapter


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapter, by default of the query, key and value projections (arXiv 2506.15220: rank 128, alpha 256)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora.rank must be at least 1 and lora.alpha above 0, got {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets:
            raise ValueError("lora.targets names no module; name some, such as q_proj")

    def to_peft(self) -> "PeftLoraConfig":
        """Convert to PEFT's config."""
        from peft import LoraConfig as PeftLoraConfig  # noqa: PLC0415

        return PeftLoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
        )


def attach_lora(network: Network, config: LoraConfig, *, seed: int) -> None:
    """Attach a fresh adapter to the language model in place, and freeze all other weights.

    Raises:
        ValueError: the model already has an adapter, or a target is not a module of it.
    """
    from peft import get_peft_model  # noqa: PLC0415

    if hasattr(network.lm, "peft_config"):
        raise ValueError("the model already has an adapter; merge it before attaching another")
    check_targets(network, config)
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.lm = get_peft_model(network.lm, config.to_peft())


def check_targets(network: Network, config: LoraConfig) -> None:
    """Raise a ValueError if a target is not a projection of the language model; PEFT does only if none is."""
    names = [f".{name}" for name, module in network.lm.named_modules() if isinstance(module, nn.Linear)]
    if unknown := [target for target in config.targets if not any(name.endswith(f".{target}") for name in names)]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ValueError(f"lora.targets: the language model has no projection {', '.join(unknown)}; it has {known}")


def merge_adapter(network: Network) -> None:
    """Add the adapter to the weights in place and remove it (merged = base + alpha / rank * B A)."""
    network.lm = network.lm.merge_and_unload(safe_merge=True)
    network.requires_grad_(False)


@torch.no_grad()
def scale_adapter(network: Network, factor: float) -> None:
    """Multiply the update of the attached adapter by a factor."""
    for name, parameter in network.lm.named_parameters():
        if ".lora_B." in name:
            parameter.mul_(factor)


@dataclass(frozen=True)
class LoraFactors:
    """The update of a projection's weight, scaling * B A.

    Args:
        a: A, (rank, inputs) float32.
        b: B, (outputs, rank) float32.
        scaling: alpha / rank.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def product(self, device: torch.device) -> Tensor:
        """Return the update."""
        return (self.b.to(device) @ self.a.to(device)) * self.scaling


@dataclass(frozen=True)
class MergeRounding:
    """How much of an adapter's update remains when the merged weights are rounded to their type.

    Args:
        kept: length of the applied update along the adapter's, as a fraction: 1 keeps all, 0 nothing.
        error: norm of the difference of both, as a fraction of the adapter's.
    """

    kept: float
    error: float


@torch.no_grad()
def merge_in_float32(network: Network, folders: Sequence[Path]) -> MergeRounding:
    """Add saved adapters to the weights in place: the sum is computed in float32 and rounded once to the weights' type.

    Rounds that are merged one by one into 16-bit weights each lose changes smaller than half a step of their type; the
    sum of all rounds loses them once.

    Args:
        network: network without an adapter.
        folders: PEFT folders that `save_adapter` has written, in the order of training.

    Returns:
        Rounding of the last adapter's update: the applied update is that from the rounded sum of those before.
    """
    merge = AdapterSum(folders)
    for name in merge.names:
        weight = network.lm.get_parameter(name)
        weight.copy_(merge.add_to(name, weight))
    network.requires_grad_(False)
    return merge.rounding()


class AdapterSum:
    """The sum of saved adapters, which is added to weights one by one.

    Args:
        folders: PEFT folders that `save_adapter` has written, in the order of training.

    Attributes:
        names: weights that an adapter changes, by their names in the language model.
        squares: sums over what has been merged, which `rounding` is computed from.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._adapters = [read_factors(folder) for folder in folders]
        self.names = list(dict.fromkeys(f"{key}.weight" for adapter in self._adapters for key in adapter))
        self.squares = [0.0, 0.0, 0.0]

    def add_to(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight with the adapters added in float32, rounded once to its type."""
        key, before, exact = name.removesuffix(".weight"), weight.float(), weight.float()
        for adapter in self._adapters:
            delta = adapter[key].product(weight.device) if key in adapter else torch.zeros_like(exact)
            before, exact = exact, exact + delta
        merged = exact.to(weight.dtype)
        applied = merged.float() - before.to(weight.dtype).float()
        terms = (applied * delta, delta.square(), (applied - delta).square())
        self.squares = [
            total + term.sum(dtype=torch.float64).item() for total, term in zip(self.squares, terms, strict=True)
        ]
        return merged

    def rounding(self) -> MergeRounding:
        """Return the rounding of the last adapter's update in all weights so far."""
        along, length, lost = self.squares
        return MergeRounding(along / length, math.sqrt(lost / length)) if length else MergeRounding(1.0, 0.0)


def read_factors(folder: Path, family: Family | None = None) -> dict[str, LoraFactors]:
    """Return the matrices of each projection of a saved adapter, by its name in the language model.

    Args:
        folder: PEFT folder.
        family: family of the model, for an adapter with published names; none for one that `save_adapter` has written.

    Raises:
        ValueError: it is not a plain LoRA.
    """
    config, tensors = read_json(folder / ADAPTER_CONFIG_NAME), load_file(folder / ADAPTER_WEIGHTS_NAME)
    half = ".lora_A.weight"
    if family:
        _require_plain_lora(config, folder)
        tensors = {adapter_key(family, key): tensor for key, tensor in tensors.items()}
        if unknown := [key for key in tensors if not key.endswith((half, ".lora_B.weight"))]:
            raise ValueError(f"it has other weights than LoRA matrices: {', '.join(sorted(unknown)[:8])}")
    return {
        key.removeprefix("base_model.model.").removesuffix(half): LoraFactors(
            tensors[key].float(),
            tensors[key.replace("lora_A", "lora_B")].float(),
            config["lora_alpha"] / config["r"],
        )
        for key in sorted(tensors)
        if key.endswith(half)
    }


def load_adapter(network: Network, path: Path | str) -> None:
    """Attach a saved adapter to the language model: our own, or that of a published model.

    Published adapters may contain further weights of modules that were trained in full; these replace the network's.

    Args:
        network: network without an adapter.
        path: PEFT folder, or hub id.

    Raises:
        ValueError: the adapter cannot be read or belongs to another model; the message names missing and unexpected
            weights.
    """
    from peft import LoraConfig as PeftLoraConfig  # noqa: PLC0415

    try:
        # From the hub unless it is a folder; a cached download is found offline too.
        files = [cached_file(str(path), name) for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)]
        folder = Path(str(files[-1])).parent
        config = PeftLoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path} has no readable adapter: {error}. Only safetensors are supported; tools/convert.py converts a "
            "pickled adapter_model.bin"
        ) from error
    _require_plain_lora(config.to_dict(), path)
    lora = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    targets = config.target_modules
    if isinstance(targets, str):  # a pattern of the names of a whole model, as ms-swift writes it
        targets = {key.partition(".lora_")[0].rpartition(".")[2] for key in lora}
    attach_lora(network, LoraConfig(config.r, config.lora_alpha, config.lora_dropout, tuple(sorted(targets))), seed=0)
    set_adapter_weights(network, lora)
    _replace_weights(network, {key: tensor for key, tensor in tensors.items() if ".lora_" not in key})


def _require_plain_lora(config: Mapping[str, Any], path: Path | str) -> None:
    """Raise a ValueError for other kinds of adapters, which would be merged with a wrong scale."""
    options = {name: config.get(name) for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")}
    options["bias"] = config.get("bias", "none") != "none"
    if used := [option for option, is_on in options.items() if is_on]:
        raise ValueError(f"the adapter in {path} uses {', '.join(used)}; only plain LoRA is supported")


def set_adapter_weights(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Set the weights of the attached adapter.

    Args:
        network: network with an adapter.
        tensors: matrices by the names that PEFT saves, for our network or a published one.

    Raises:
        ValueError: they belong to another adapter; the message names missing and unexpected ones.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: PLC0415

    renamed = {adapter_key(network.family, key): tensor for key, tensor in tensors.items()}
    expected = get_peft_model_state_dict(network.lm).keys()
    if expected != renamed.keys():
        raise ValueError(
            f"the adapter belongs to another model: missing {sorted(expected - renamed.keys())[:8] or 'none'}, "
            f"unexpected {sorted(renamed.keys() - expected)[:8] or 'none'}"
        )
    set_peft_model_state_dict(network.lm, renamed)


def adapter_key(family: Family, key: str) -> str:
    """Return our name of a matrix of an adapter: for our network, the code of its base, or a whole Omni model."""
    peft, name = "base_model.model.", key.removeprefix("base_model.model.").replace(".default.", ".")
    if not name.startswith(f"{family.decoder_prefix}layers."):
        name = family.own_weight_name(name)
    return peft + name.removeprefix("lm.")


def _replace_weights(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Replace weights of the network by those of an adapter's modules_to_save."""
    parameters = dict(network.named_parameters())
    unknown = []
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").replace("modules_to_save.", "").replace(".default.", ".")
        name = network.family.own_weight_name(name)
        # A module that was trained in full is saved with its buffers, which are constants.
        if any(re.search(pattern, name) for pattern in network._keys_to_ignore_on_load_unexpected):
            continue
        if name not in parameters or parameters[name].shape != tensor.shape:
            unknown.append(key)
            continue
        if parameters[name].is_meta:
            raise ValueError(
                f"the adapter replaces {name}, which is offloaded; load the model on devices with enough memory for it"
            )
        with torch.no_grad():
            parameters[name].copy_(tensor)
    if unknown:
        raise ValueError(f"the adapter belongs to another model: it has unknown weights {sorted(unknown)[:8]}")


def save_adapter(network: Network, path: Path | str) -> None:
    """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors) atomically."""
    shutil.rmtree(path, ignore_errors=True)  # a process may have been killed before merging its adapter
    with atomic_folder(path) as folder:
        network.lm.save_pretrained(str(folder))
        # PEFT keeps target_modules as a set and writes it in a different order each time.
        config = folder / ADAPTER_CONFIG_NAME
        values = read_json(config)
        write_json(config, values | {"target_modules": sorted(values["target_modules"])})
