"""Adapters for servers: one adapter that equals the sum of several, and a model that has one of several at a time."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from salmonn.files import atomic_folder, read_json, write_json
from salmonn.model.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, LoraConfig, LoraFactors, read_factors
from salmonn.model.network import Network


@dataclass(frozen=True)
class StackedAdapter:
    """What `stack_adapters` has written.

    Args:
        rank: its rank.
        error: norm of its difference from the sum, as a fraction of the sum's norm; 0 if they are equal.
    """

    rank: int
    error: float = 0.0


def stack_adapters(folders: Sequence[Path], folder: Path, *, max_rank: int | None = None) -> StackedAdapter:
    """Write one adapter that equals the sum of several.

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2], with s = alpha / rank of each: the rank is the sum of theirs, and
    alpha equals it. No other rounding is involved than that of s B, which is exact where s is a power of 2.

    Args:
        folders: PEFT folders that `save_adapter` has written, with the same target modules.
        folder: PEFT folder to write.
        max_rank: largest rank; a sum of larger rank is replaced by its best approximation of this rank.
    """
    adapters = [read_factors(one) for one in folders]
    assert len({tuple(adapter) for adapter in adapters}) == 1, "all rounds adapt the same modules"
    rank = sum(len(next(iter(adapter.values())).a) for adapter in adapters)
    tensors, lost, total = dict[str, Tensor](), 0.0, 0.0
    for name in adapters[0]:
        factors = [adapter[name] for adapter in adapters]
        a, b = torch.cat([one.a for one in factors]), torch.cat([one.b * one.scaling for one in factors], dim=1)
        if max_rank is not None and rank > max_rank:
            a, b, singular_values = _truncate(a, b, rank=max_rank)
            lost += singular_values[max_rank:].square().sum().item()
            total += singular_values.square().sum().item()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    rank = min(rank, max_rank or rank)
    config = read_json(folders[0] / ADAPTER_CONFIG_NAME) | {"r": rank, "lora_alpha": rank}
    _write(folder, tensors, config)
    return StackedAdapter(rank, (lost / total) ** 0.5 if total else 0.0)


def _truncate(a: Tensor, b: Tensor, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the best approximation of B A of a rank, and all singular values of B A."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, singular_values, v = torch.linalg.svd(r_b @ r_a.T)
    root = singular_values[:rank].sqrt()
    return ((q_a @ v[:rank].T) * root).T.contiguous(), ((q_b @ u[:, :rank]) * root).contiguous(), singular_values


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Write a PEFT folder, replacing an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as unfinished:
        save_file(dict(tensors), str(unfinished / ADAPTER_WEIGHTS_NAME), metadata={"format": "pt"})
        write_json(unfinished / ADAPTER_CONFIG_NAME, config)


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
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"the adapter cannot be read: {ADAPTER_CONFIG_NAME} must be an object with numbers lora_alpha and r > 0, "
            f"as PEFT writes it ({error})"
        ) from error
    weights = dict(network.lm.named_parameters())
    for name, one in factors.items():
        weight = weights.get(f"{name}.weight")
        if not one.a.ndim == one.b.ndim == 2 or len(one.a) != one.b.shape[1]:
            raise ValueError(
                f"the adapter cannot be read: lora_A and lora_B of {name} must be matrices of the same rank, got "
                f"shapes {tuple(one.a.shape)} and {tuple(one.b.shape)}"
            )
        if weight is None or weight.shape != (len(one.b), one.a.shape[1]):
            raise ValueError(f"the adapter belongs to another model: {name} is not a projection of this size here")
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
        """Merge an adapter, replacing the current one; each sum is computed in float32 and rounded once.

        After an error, such as too little memory, the network has no adapter.
        """
        if adapter is self.current and (adapter is not None or not self._base):
            return
        self._restore()
        try:
            for name, factors in adapter.factors.items() if adapter else ():
                weight = self._network.lm.get_parameter(f"{name}.weight")
                self._base[f"{name}.weight"] = weight.detach().to("cpu", copy=True)
                weight.copy_(weight.float() + factors.product(weight.device))
        except BaseException:
            self._restore()
            raise
        self.current = adapter

    def _restore(self) -> None:
        """Remove the adapter; if this fails, the next `use` does it."""
        self.current = None
        for name, weight in self._base.items():
            self._network.lm.get_parameter(name).copy_(weight)
        self._base = {}


def write_random_adapter(network: Network, lora: LoraConfig, folder: Path, *, rank: int) -> None:
    """Write an adapter with random matrices, whose updates are as large as the outputs of a projection.

    Args:
        network: network without an adapter; only the sizes of its weights matter.
        lora: target modules.
        folder: PEFT folder to write.
        rank: rank of the adapter.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = dict[str, Tensor]()
    for name, module in network.lm.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.targets:
            for half, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                values = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = values
    config = replace(lora, rank=rank, alpha=rank).to_peft().to_dict()
    _write(folder, tensors, config | {"target_modules": sorted(lora.targets)})
