"""Adapters for servers: one adapter that equals the sum of several, and a model that has one of several at a time."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from salmonn.model.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, LoraFactors, read_factors
from salmonn.model.network import Network
from salmonn.records import atomic_folder, read_json, write_json


def stack_adapters(folders: Sequence[Path], folder: Path) -> int:
    """Write one adapter that equals the sum of several.

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2], with s = alpha / rank of each: the rank is the sum of theirs, and
    alpha equals it. No other rounding is involved than that of s B, which is exact where s is a power of 2.

    Args:
        folders: PEFT folders that `save_adapter` has written, with the same target modules.
        folder: PEFT folder to write.

    Returns:
        The rank.
    """
    adapters = [read_factors(one) for one in folders]
    assert len({tuple(adapter) for adapter in adapters}) == 1, "all rounds adapt the same modules"
    tensors = dict[str, Tensor]()
    for name in adapters[0]:
        factors = [adapter[name] for adapter in adapters]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([one.a for one in factors])
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat([one.b * one.scaling for one in factors], dim=1)
    rank = sum(len(one.a) for one in factors)
    config = read_json(folders[0] / ADAPTER_CONFIG_NAME) | {"r": rank, "lora_alpha": rank}
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as unfinished:
        save_file(tensors, str(unfinished / ADAPTER_WEIGHTS_NAME), metadata={"format": "pt"})
        write_json(unfinished / ADAPTER_CONFIG_NAME, config)
    return rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """The matrices of an adapter by the names of the language model's projections."""

    factors: Mapping[str, LoraFactors]


def read_adapter(folder: Path, network: Network) -> Adapter:
    """Read a PEFT folder, with our names or those of the published code.

    Raises:
        ValueError: it cannot be read, or belongs to another model; or weights of the model cannot be changed.
    """
    try:
        factors = read_factors(folder, network.family)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter cannot be read: {error}") from error
    weights = dict(network.lm.named_parameters())
    for name, one in factors.items():
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.shape != (len(one.b), one.a.shape[1]):
            raise ValueError(f"the adapter belongs to another model: {name} is no projection of this size in this one")
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(f"{name} is quantized or offloaded; load the model without bits, on enough memory")
    if not factors:
        raise ValueError("the adapter has no LoRA matrices")
    return Adapter(factors)


class MergedAdapter:
    """A network that has one of several adapters merged into its weights, or none.

    Args:
        network: network without an adapter; its weights are changed in place.

    Attributes:
        current: the adapter that is merged.
    """

    def __init__(self, network: Network) -> None:
        self.current: Adapter | None = None
        self._network = network
        self._base: dict[str, Tensor] = {}  # in the memory of the CPU

    @torch.no_grad()
    def use(self, adapter: Adapter | None) -> None:
        """Merge an adapter in place of the current one; each sum is computed in float32 and rounded once."""
        if adapter is self.current:
            return
        for name, weight in self._base.items():
            self._network.lm.get_parameter(name).copy_(weight)
        self._base, self.current = {}, None
        for name, factors in adapter.factors.items() if adapter else ():
            weight = self._network.lm.get_parameter(f"{name}.weight")
            self._base[f"{name}.weight"] = weight.detach().to("cpu", copy=True)
            weight.copy_(weight.float() + factors.product(weight.device))
        self.current = adapter
