"""Training strategies: DDP, DeepSpeed ZeRO-2 and ZeRO-3, or FSDP2, behind one small interface.

    ddp    every process holds all weights, gradients and optimizer states
    zero2  optimizer states and gradients are sharded, weights are replicated
    zero3  weights are sharded too and gathered module by module
    fsdp2  the same with torch's own implementation, layer by layer

The strategies are used directly rather than through accelerate. Without GPUs, accelerate 1.15 silently replaces FSDP by
DDP and DeepSpeed by a single process, so tests would run other code than a cluster; and its ZeRO-3 plugin stays alive
for the whole process, in which `from_pretrained` then refuses to place weights.

State is saved and restored as whole tensors by parameter name, so a run may resume under another strategy.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from salmonn import dist
from salmonn.model.network import Network
from salmonn.model.sharding import shard_network

StrategyName = Literal["ddp", "zero2", "zero3", "fsdp2"]
MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingStrategy(Protocol):
    """A network in training.

    Attributes:
        model: the module that losses are computed with; a call may be collective.
        requires_equal_calls: whether every process must call the model equally often because calls are collective.
    """

    model: nn.Module
    requires_equal_calls: bool

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Enter the context of one forward and backward pass; the last one of a step synchronizes gradients."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch."""

    def clip(self) -> float:
        """Clip the gradients; return their global norm before clipping, not finite if any gradient is not."""

    def step(self, learning_rate: float) -> None:
        """Update the weights and reset the gradients."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield trained weights (`model.NAME`) and Adam's state (`exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`).

        Tensors are whole and come one by one; every process must consume all of them.
        """

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load Adam's state; the weights have been loaded into the network before."""

    def close(self) -> None:
        """Release what the strategy holds; the network must not be used afterwards."""


def check_strategy(name: StrategyName) -> None:
    """Raise ValueError if a strategy cannot run; called before anything is sampled."""
    if name == "ddp":
        return
    if dist.world_size() == 1:
        raise ValueError(
            f"strategy {name} needs several processes, and this run has one; start it with torchrun --nproc_per_node, "
            "or use strategy ddp"
        )
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"strategy {name} needs DeepSpeed: pip install 'salmonn[deepspeed]'")


def make_strategy(
    name: StrategyName, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float, bf16: bool
) -> TrainingStrategy:
    """Distribute a network over the processes.

    Args:
        name: name of the strategy.
        network: network; its parameters that require gradients are trained.
        optimizer: Adam over these parameters.
        max_grad_norm: norm that gradients are clipped to.
        bf16: whether the model computes in bfloat16.
    """
    if name == "ddp":
        return DdpStrategy(network, optimizer, max_grad_norm=max_grad_norm)
    if name == "fsdp2":
        return FsdpStrategy(network, optimizer, max_grad_norm=max_grad_norm)
    return ZeroStrategy(network, optimizer, stage=int(name[-1]), max_grad_norm=max_grad_norm, bf16=bf16)


def trainable_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the named parameters that require gradients."""
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)


class TorchStrategy:
    """Common part of DDP and FSDP2 as `TrainingStrategy`: torch's own optimizer and gradient clipping."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        self.network = network
        self.model = network
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(
            (value for _, value in trainable_parameters(self.network)), self.max_grad_norm
        )
        return float(_full_tensor(norm))

    def step(self, learning_rate: float) -> None:
        _set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trainable_parameters(self.network):
            yield f"model.{name}", _full_tensor(parameter.detach())
            # A parameter that no batch has used yet has no Adam state.
            for key, value in self.optimizer.state[parameter].items():
                yield f"{key}.{name}", _full_tensor(value)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in trainable_parameters(self.network):
            if f"step.{name}" in tensors:
                moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in MOMENTS}
                if isinstance(parameter, DTensor):
                    mesh, placements = parameter.device_mesh, parameter.placements
                    moments = {key: distribute_tensor(value, mesh, placements) for key, value in moments.items()}
                # Adam keeps its step count on the CPU and its moments on the device of the weights.
                self.optimizer.state[parameter] = {"step": tensors[f"step.{name}"], **moments}

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class DdpStrategy(TorchStrategy):
    """Data parallelism with replicated weights; a single process needs no wrapper."""

    requires_equal_calls = False

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        super().__init__(network, optimizer, max_grad_norm=max_grad_norm)
        if dist.world_size() > 1:
            # A video-only batch gives the audio encoder no gradient.
            self.model = DistributedDataParallel(network, find_unused_parameters=True)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()


class FsdpStrategy(TorchStrategy):
    """FSDP2; see `shard_network`."""

    requires_equal_calls = True

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        named = dict(trainable_parameters(network))
        shard_network(network)
        assert isinstance(network, FSDPModule)
        new = dict(network.named_parameters())
        sharded = {id(parameter): new[name] for name, parameter in named.items()}
        for group in optimizer.param_groups:
            group["params"] = [sharded[id(parameter)] for parameter in group["params"]]
        super().__init__(network, optimizer, max_grad_norm=max_grad_norm)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield


class ZeroStrategy:
    """DeepSpeed ZeRO as `TrainingStrategy`. A weight that no batch uses gets a zero gradient; other strategies skip it.

    Stage 3 gathers weights in each call, stage 2 reduces gradients after each.
    """

    requires_equal_calls = True

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, *, stage: int, max_grad_norm: float, bf16: bool
    ) -> None:
        import deepspeed  # noqa: PLC0415 - an extra, which takes seconds to import

        # Otherwise DeepSpeed spends over a minute compiling an op that gloo and NCCL make unnecessary.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed; micro-batching is done by the training loop
            "zero_optimization": {"stage": stage},
            "gradient_clipping": max_grad_norm,
            "bf16": {"enabled": bf16},
            # By default it would accumulate gradients in 16 bits too.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
        }
        self.stage = stage
        if stage == 3 and isinstance(network, Network):
            # Answers differ in length between processes, and so would the number of collective calls.
            network.max_logit_bytes = None
        self.model, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        # Created at step one, Adam's state would be linked to the weights of the first group only.
        zero = self.model.optimizer
        # Flat partitions of the weights that this process updates.
        for flat in zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self._adam.state[flat] = {"step": torch.tensor(0.0), **moments}
        if stage == 2:
            zero._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def clip(self) -> float:
        # DeepSpeed itself clips in `step`.
        groups = (
            self.model.optimizer._get_norm_groups() if self.stage == 3 else [self.model.optimizer.scaled_global_norm()]
        )
        # DeepSpeed reports -1 for a norm that is not finite.
        return math.hypot(*(float(group) if group >= 0 else math.nan for group in groups))

    def step(self, learning_rate: float) -> None:
        _set_learning_rate(self.model.optimizer, learning_rate)
        self.model.step()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

        count = next(state["step"] for state in self._adam.state.values())
        for name, parameter in trainable_parameters(self.model.module):
            yield f"model.{name}", safe_get_full_fp32_param(parameter)
            for key in MOMENTS:
                yield f"{key}.{name}", safe_get_full_optimizer_state(parameter, key)
            yield f"step.{name}", count.clone()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state  # noqa: PLC0415

        for state in self._adam.state.values():
            state["step"] = next((tensors[key] for key in tensors if key.startswith("step.")), torch.tensor(0.0))
        for name, parameter in trainable_parameters(self.model.module):
            # The weights were rounded to 16 bits when the strategy was set up.
            safe_set_full_fp32_param(parameter, tensors[f"model.{name}"].to(self.model.device))
            for key in MOMENTS:
                if f"{key}.{name}" in tensors:
                    safe_set_full_optimizer_state(parameter, tensors[f"{key}.{name}"].to(self.model.device), key)

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers and empty the network.

        Hooks that DeepSpeed leaves on gradients keep the network alive until the process ends, so its weights are freed
        explicitly.
        """
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK  # noqa: PLC0415

        zero, network = self.model.optimizer, self.model.module
        self.model.destroy()
        FWD_MODULE_STACK.clear()
        vars(zero).clear()
        for parameter in network.parameters():
            parameter.data = parameter.new_empty(0)
            parameter.ds_tensor = None

    @property
    def _adam(self) -> torch.optim.Optimizer:
        adam = self.model.optimizer.optimizer
        assert isinstance(adam, torch.optim.Optimizer)
        return adam


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
