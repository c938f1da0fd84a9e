"""How a training is spread over processes: DDP, DeepSpeed's ZeRO-2 and ZeRO-3, or FSDP2, behind one small interface.

    ddp    every process keeps all weights, gradients and moments
    zero2  moments and gradients are split, weights are whole
    zero3  weights are split too, and gathered module by module
    fsdp2  likewise, layer by layer, by torch itself

The engines are taken as they are, not through accelerate: without GPUs accelerate 1.15 takes FSDP for DDP and DeepSpeed
for one process, without a word, so that tests would see other code than a cluster runs; and its ZeRO-3 plugin stays
alive for the whole process, where `from_pretrained` then refuses to place weights.

State goes in and out as whole tensors by parameter name, so that what one engine saved another goes on from.
"""

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from salmonn import dist
from salmonn.model.network import Network

StrategyName = Literal["ddp", "zero2", "zero3", "fsdp2"]
MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingStrategy(Protocol):
    """A network in training.

    Args:
        model: what losses are computed with; a call may be collective.
        requires_equal_calls: every process must call the model equally often, since a call talks to the others.
    """

    model: nn.Module
    requires_equal_calls: bool

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Within this context a piece goes forward and backward; the step's last one brings gradients together."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a piece."""

    def clip(self) -> float:
        """The norm of the whole gradient before it is clipped; not finite where some gradient is not."""

    def step(self, learning_rate: float) -> None:
        """Move the weights, and forget the gradients."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights (`model.NAME`) and Adam's state (`exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`), one by one,
        whole. Every process must take all of them."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up Adam's state; the weights were put into the network before."""

    def close(self) -> None:
        """Let go of what the engine holds; the network is of no use after."""


def check_strategy(name: StrategyName) -> None:
    """Raise ValueError where an engine cannot run; told before anything is sampled."""
    if name == "ddp":
        return
    if dist.world_size() == 1:
        raise ValueError(
            f"strategy {name} splits a training over processes, and this run has one: start it with torchrun "
            "--nproc_per_node, or use strategy ddp"
        )
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"strategy {name} needs DeepSpeed: pip install salmonn[deepspeed]")


def make_strategy(
    name: StrategyName, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float, bf16: bool
) -> TrainingStrategy:
    """Spread a network over the processes.

    Args:
        name: of the engine.
        network: whatever in it requires gradients is trained.
        optimizer: Adam on these.
        max_grad_norm: that gradients are clipped to.
        short: whether the model computes in bfloat16.
    """
    if name == "ddp":
        return DdpStrategy(network, optimizer, max_grad_norm=max_grad_norm)
    if name == "fsdp2":
        return FsdpStrategy(network, optimizer, max_grad_norm=max_grad_norm)
    return ZeroStrategy(network, optimizer, stage=int(name[-1]), max_grad_norm=max_grad_norm, bf16=bf16)


def trainable_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that require gradients, by name."""
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)


class TorchStrategy:
    """What DDP and FSDP2 share: torch's own optimiser and clipping."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        self.network = network
        self.model = network
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a piece."""
        loss.backward()

    def clip(self) -> float:
        """Clip the gradients; see `Engine`."""
        norm = torch.nn.utils.clip_grad_norm_(
            (value for _, value in trainable_parameters(self.network)), self.max_grad_norm
        )
        return float(_whole(norm))

    def step(self, learning_rate: float) -> None:
        """Move the weights, and forget the gradients."""
        _set_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`. A parameter that no batch has touched yet has no moments."""
        for name, parameter in trainable_parameters(self.network):
            yield f"model.{name}", _whole(parameter.detach())
            for key, value in self.optimizer.state[parameter].items():
                yield f"{key}.{name}", _whole(value)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        for name, parameter in trainable_parameters(self.network):
            if f"step.{name}" in tensors:
                moments = {key: _split_like(parameter, tensors[f"{key}.{name}"]) for key in MOMENTS}
                # Adam keeps its count of steps on the CPU, its moments beside the weights.
                self.optimizer.state[parameter] = {"step": tensors[f"step.{name}"], **moments}

    def close(self) -> None:
        """Nothing is held beside the network."""


class DdpStrategy(TorchStrategy):
    """Every process keeps everything; gradients are averaged. One process alone needs no wrapper."""

    requires_equal_calls = False

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        super().__init__(network, optimizer, max_grad_norm=max_grad_norm)
        if dist.world_size() > 1:
            # A batch of picture alone gives the audio tower no gradient.
            self.model = DistributedDataParallel(network, find_unused_parameters=True)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """See `Engine`."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()


class FsdpStrategy(TorchStrategy):
    """FSDP2: each decoder layer's weights, and the rest as one, are split over the processes.

    The towers stand in the rest: a batch may have no picture or no sound, and processes must gather alike.
    """

    requires_equal_calls = True

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        named = dict(trainable_parameters(network))
        for module in _decoder_layers(network):
            fully_shard(module)
        fully_shard(network)
        assert isinstance(network, FSDPModule)
        split = dict(network.named_parameters())
        places = {id(parameter): split[name] for name, parameter in named.items()}
        for group in optimizer.param_groups:
            group["params"] = [places[id(parameter)] for parameter in group["params"]]
        super().__init__(network, optimizer, max_grad_norm=max_grad_norm)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See `Engine`."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield


class ZeroStrategy:
    """DeepSpeed's ZeRO. It gives a weight that no batch touches a gradient of zero, where the others leave it alone.

    Stage 3 gathers weights in each call, stage 2 shares out gradients after each.
    """

    requires_equal_calls = True

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, *, stage: int, max_grad_norm: float, bf16: bool
    ) -> None:
        import deepspeed  # noqa: PLC0415 - an extra, which takes seconds to import

        # Without it DeepSpeed compiles, for more than a minute, what gloo and NCCL do as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 1,  # how a batch is cut is ours; DeepSpeed only asks for a number
            "zero_optimization": {"stage": stage},
            "gradient_clipping": max_grad_norm,
            "bf16": {"enabled": bf16},
            # Left to itself it would add up gradients in 16 bits too.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
        }
        self.stage = stage
        if stage == 3 and isinstance(network, Network):
            network.max_logit_bytes = None  # processes have answers of different lengths, and so would of chunks
        self.model, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._make_moments()

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See `Engine`."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a piece."""
        self.model.backward(loss)

    def clip(self) -> float:
        """The norm; `step` clips."""
        groups = self._zero._get_norm_groups() if self.stage == 3 else [self._zero.scaled_global_norm()]
        # DeepSpeed writes -1 for what is not finite.
        return math.hypot(*(float(group) if group >= 0 else math.nan for group in groups))

    def step(self, learning_rate: float) -> None:
        """Move the weights, and forget the gradients."""
        _set_rate(self._zero, learning_rate)
        self.model.step()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

        count = next(state["step"] for state in self._adam.state.values())
        for name, parameter in trainable_parameters(self.model.module):
            yield f"model.{name}", safe_get_full_fp32_param(parameter)
            for key in MOMENTS:
                yield f"{key}.{name}", safe_get_full_optimizer_state(parameter, key)
            yield f"step.{name}", count.clone()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state  # noqa: PLC0415

        for state in self._adam.state.values():
            state["step"] = next((tensors[key] for key in tensors if key.startswith("step.")), torch.tensor(0.0))
        for name, parameter in trainable_parameters(self.model.module):
            # The weights were rounded to 16 bits when the engine started.
            safe_set_full_fp32_param(parameter, tensors[f"model.{name}"].to(self.model.device))
            for key in MOMENTS:
                if f"{key}.{name}" in tensors:
                    safe_set_full_optimizer_state(parameter, tensors[f"{key}.{name}"].to(self.model.device), key)

    def _make_moments(self) -> None:
        """What Adam would make at its first step. Then DeepSpeed would link the first group's alone to the weights."""
        for flat in self._flat:
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self._adam.state[flat] = {"step": torch.tensor(0.0), **moments}
        if self.stage == 2:
            self._zero._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers down, and empty the network.

        Hooks that DeepSpeed leaves on gradients keep the network alive for the whole process; its weights need not be.
        """
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK  # noqa: PLC0415

        zero, network = self._zero, self.model.module
        self.model.destroy()
        FWD_MODULE_STACK.clear()
        vars(zero).clear()
        for parameter in network.parameters():
            parameter.data = parameter.new_empty(0)
            parameter.ds_tensor = None

    @property
    def _zero(self) -> Any:
        return self.model.optimizer

    @property
    def _adam(self) -> torch.optim.Optimizer:
        adam = self._zero.optimizer
        assert isinstance(adam, torch.optim.Optimizer)
        return adam

    @property
    def _flat(self) -> Iterable[Tensor]:
        """The parts of the weights that this process moves."""
        zero = self._zero
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)


def _decoder_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of the language model, by their place in it."""
    lists = [module for name, module in network.named_modules() if name.startswith("lm.") and name.endswith(".layers")]
    return [layer for layers in lists for layer in layers.children()]


def _set_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _split_like(parameter: Tensor, whole: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
    return whole.to(parameter.device)
