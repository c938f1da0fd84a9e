"""The training loop of every stage and strategy; a stage supplies its batches and its loss."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from salmonn import dist, system
from salmonn.config import MAY_CHANGE
from salmonn.model.network import Network
from salmonn.train.checkpoint import CHECKPOINTS_DIR, Checkpoint, Checkpoints, load_trained
from salmonn.train.parallel import (
    StrategyName,
    TrainingStrategy,
    check_strategy,
    make_strategy,
    trainable_parameters,
)
from salmonn.train.run_log import StepLog

log = logging.getLogger(__name__)
Precision = Literal["float32", "bfloat16"]
SHOWN_METRICS = ("loss", "ce", "margin", "accuracy", "kl")  # in the terminal
NUM_LOG_LINES = 10  # per stage, if the output is not a terminal


@dataclass(frozen=True)
class FitConfig:
    """Optimization of one stage.

    Args:
        learning_rate: peak learning rate, after warm-up; a cosine decays it from there.
        min_lr_ratio: fraction of the peak at the end of the cosine.
        steps: number of optimizer steps; none if `epochs` is given.
        epochs: number of passes over the examples; none if `steps` is given.
        batch_size: examples per step, over all ranks.
        gradient_accumulation_steps: number of micro-batches that a rank's part of the batch is split into, to save
            memory; the gradient is that of the whole batch.
        warmup_ratio: fraction of the steps over which the learning rate rises from 0.
        weight_decay: weight decay of matrices; vectors have none.
        betas: betas of Adam.
        max_grad_norm: norm that gradients are clipped to.
        precision: data type of the computation; bfloat16 is automatic mixed precision (under ZeRO all weights are
            bfloat16 in products). Trained weights, their accumulated gradients and Adam's moments are float32 in any
            case.
        gradient_checkpointing: keep only each layer's input, and recompute the rest for the gradient; a number does so
            for as many layers of the language model, which is faster where memory is left.
        checkpoint_every: steps between checkpoints, from which a killed stage resumes.
    """

    learning_rate: float = 1e-3
    min_lr_ratio: float = 0.1
    steps: int | None = 1000
    epochs: float | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = field(default=1, metadata=MAY_CHANGE)
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    gradient_checkpointing: bool | int = field(default=False, metadata=MAY_CHANGE)
    checkpoint_every: int = field(default=100, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"set either steps or epochs, and the other to null, got steps {self.steps} and epochs {self.epochs}"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is a fraction of the steps from 0 to 1, got {self.warmup_ratio}")
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "checkpoint_every"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not isinstance(self.gradient_checkpointing, bool) and self.gradient_checkpointing < 1:
            raise ValueError(
                "gradient_checkpointing must be true, false, or a number of layers from 1 on, got "
                f"{self.gradient_checkpointing}"
            )
        for name in ("learning_rate", "max_grad_norm", "epochs"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.min_lr_ratio <= 1 or self.weight_decay < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                "min_lr_ratio must be from 0 to 1, weight_decay at least 0 and both betas from 0 to below 1, got "
                f"{self.min_lr_ratio}, {self.weight_decay} and {self.betas}"
            )

    def resolve(self, num_examples: int) -> "FitConfig":
        """Return the config with epochs converted to steps."""
        if self.epochs is None:
            return self
        return replace(self, steps=max(1, round(self.epochs * num_examples / self.batch_size)), epochs=None)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of a resolved config."""
        assert self.steps is not None, "resolve() converts epochs to steps"
        return self.steps

    @property
    def micro_batch_size(self) -> int:
        """Examples that pass through the model at once on each rank, rounded down."""
        return max(1, self.batch_size // (self.gradient_accumulation_steps * dist.world_size()))


class MicroBatch(Protocol):
    """Part of a step's batch that passes through the model at once.

    Args:
        clips: names of its clips, for error messages.
        num_tokens: number of tokens of text and clips that pass through the decoder.
    """

    @property
    def clips(self) -> tuple[str, ...]: ...

    @property
    def num_tokens(self) -> int: ...

    def pin_for(self, device: torch.device) -> Self:
        """Return the micro-batch in pinned memory if the device is a GPU."""
        ...


Batch = TypeVar("Batch", bound=MicroBatch)
Batch_co = TypeVar("Batch_co", bound=MicroBatch, covariant=True)
Batch_contra = TypeVar("Batch_contra", bound=MicroBatch, contravariant=True)


class Batches(Protocol, Generic[Batch_co]):
    """Source of batches. A batch depends only on its step, so a resumed stage sees the same batches."""

    def micro_batches(self, step: int) -> Sequence[Batch_co]:
        """Return this rank's micro-batches of a step."""
        ...


class BatchLoss(Protocol, Generic[Batch_contra]):
    """Computes a micro-batch's loss and its parts for the log, with one call of the model.

    The values of a rank's micro-batches are summed, and the sums averaged over ranks. To get a mean over the step's
    examples, each micro-batch must divide by the number of examples of an average rank.
    """

    def __call__(self, model: nn.Module, batch: Batch_contra) -> tuple[Tensor, Mapping[str, float]]: ...


@dataclass(frozen=True)
class Callback:
    """Additional metrics during training.

    Args:
        measure: model -> metrics; called by all ranks, with the same result.
        every: steps between two measurements.
    """

    measure: Callable[[nn.Module], Mapping[str, float]]
    every: int


@dataclass(frozen=True)
class FitContext:
    """Name, folder and environment of a training stage.

    Args:
        name: name in the terminal.
        folder: folder of steps.jsonl and of `checkpoints/`, from which a killed stage resumes.
        seed: seed of dropout.
        strategy: distribution over processes.
        callback: additional metrics.
    """

    name: str
    folder: Path
    seed: int = 0
    strategy: StrategyName = "ddp"
    callback: Callback | None = None


def learning_rate_at(step: int, config: FitConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to `min_lr_ratio` of the peak."""
    warmup = round(config.warmup_ratio * config.num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(config.num_steps - warmup, 1)
    decaying = (1 - config.min_lr_ratio) / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (config.min_lr_ratio + decaying)


def autocast(precision: Precision) -> torch.autocast:
    """Return the context in which a model computes as in training of this precision."""
    return torch.autocast(dist.device().type, torch.bfloat16, enabled=precision == "bfloat16")


def check_processes(strategy: StrategyName, *configs: FitConfig) -> None:
    """Raise ValueError if the strategy or a batch size does not suit the number of processes."""
    check_strategy(strategy)
    for config in configs:
        if config.batch_size < dist.world_size():
            raise ValueError(
                f"batch_size {config.batch_size} is smaller than the number of processes ({dist.world_size()}); "
                "increase it (fit.batch_size, rebirth.fit.batch_size) or use fewer processes"
            )


def fit(
    network: nn.Module, batches: Batches[Batch], loss: BatchLoss[Batch], config: FitConfig, *, context: FitContext
) -> Checkpoint:
    """Train the parameters that require gradients; resume from the latest checkpoint if there is one.

    Strategies take the network apart, so it must not be used afterwards. The trained weights are in the checkpoint of
    the last step: `load_trained` loads them into a network like the one that was passed.

    Args:
        network: model; its parameters that require gradients are trained.
        batches: source of this rank's micro-batches.
        loss: (model, micro-batch) -> loss and its parts.
        config: optimization, with the number of steps resolved.
        context: name, folder, seed, strategy and callback.

    Returns:
        The last checkpoint.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the last checkpoint is valid.
        ValueError: the config does not suit the model or the number of processes, or the disk is full.
    """
    check_processes(context.strategy, config)
    checkpoints = Checkpoints(context.folder / CHECKPOINTS_DIR)
    last = checkpoints.latest()
    if last and last.step >= config.num_steps:
        return last
    strategy = _start_strategy(network, last, config, context=context)
    first = last.step if last else 0
    strategy.model.train()
    steps = StepLog(context.folder, first_step=first) if dist.is_main() else None
    # None: only in a terminal.
    disable = None if dist.is_main() else True
    with tqdm(total=config.num_steps, initial=first, desc=context.name, unit="step", disable=disable) as bar:
        for step, micro_batches, waited in _prefetch(batches, first, config.num_steps):
            started = time.monotonic()
            is_last = step + 1 == config.num_steps
            torch.manual_seed(context.seed * 1_000_003 + step * 131 + dist.rank())
            metrics = _train_step(strategy, loss, micro_batches, config=config, step=step)
            if context.callback and (is_last or step % context.callback.every == 0):
                metrics |= context.callback.measure(strategy.model)
            metrics |= _speed_metrics(micro_batches, seconds=waited + time.monotonic() - started, waited=waited)
            _show_step(bar, step, config.num_steps, metrics, name=context.name)
            if steps:
                steps(step, metrics)
            if is_last or (step + 1) % config.checkpoint_every == 0:
                _save(strategy, checkpoints, step=step + 1)
    if steps:
        steps.close()
    strategy.close()
    done = checkpoints.latest()
    assert done is not None, "the last step writes a checkpoint"
    return done


def _start_strategy(
    network: nn.Module, last: Checkpoint | None, config: FitConfig, *, context: FitContext
) -> TrainingStrategy:
    """Distribute the network, and restore weights and optimizer from the last checkpoint if there is one."""
    _to_master_weights(network, config)
    if config.gradient_checkpointing:
        assert isinstance(network, Network)
        network.checkpoint_layers(config.gradient_checkpointing)
    stored = load_trained(network, last) if last else None
    strategy = make_strategy(
        context.strategy,
        network,
        make_optimizer(network, config),
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
    )
    if stored is not None and last:
        strategy.restore(stored)
        log.info("%s: resuming from step %d", context.name, last.step)
    return strategy


def _save(strategy: TrainingStrategy, checkpoints: Checkpoints, *, step: int) -> None:
    # Gathering a sharded weight needs all ranks; only rank 0 keeps the result.
    tensors = {key: tensor.cpu().contiguous() for key, tensor in strategy.state() if dist.is_main()}
    if dist.is_main():
        checkpoints.save(tensors, step=step)
    dist.barrier()


def make_optimizer(network: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Create AdamW for the parameters that require gradients; matrices have weight decay, vectors do not."""
    parameters = [parameter for _, parameter in trainable_parameters(network)]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def _to_master_weights(network: nn.Module, config: FitConfig) -> None:
    """Convert weights in training to float32: in 16 bits small updates would be rounded away."""
    low_precision = [parameter for _, parameter in trainable_parameters(network) if parameter.dtype != torch.float32]
    if low_precision and config.precision == "float32":
        dtype = str(low_precision[0].dtype).removeprefix("torch.")
        raise ValueError(
            f"the weights to train are {dtype}, but fit.precision is float32; set fit.precision bfloat16, or load them "
            "with placement.dtype float32"
        )
    for parameter in low_precision:
        parameter.data = parameter.data.float()


def _train_step(
    strategy: TrainingStrategy, loss: BatchLoss[Batch], micro_batches: Sequence[Batch], *, config: FitConfig, step: int
) -> dict[str, float]:
    """Take one optimizer step; returns the metrics of all ranks."""
    total, metrics = 0.0, Counter[str]()
    padded = _pad_micro_batches(strategy, micro_batches)
    for number, (batch, counts) in enumerate(padded, start=1):
        with strategy.micro_batch(last=number == len(padded)):
            with autocast(config.precision):
                value, parts = loss(strategy.model, batch)
            strategy.backward(value if counts else 0 * value)
        if counts:
            total += value.item()
            metrics.update(parts)
    norm = strategy.clip()
    ranks = dist.gather([{"loss": total, **metrics}])
    if not math.isfinite(norm) or not all(math.isfinite(one["loss"]) for one in ranks):
        _raise_not_finite(micro_batches, total, norm=norm, step=step)
    learning_rate = learning_rate_at(step, config)
    strategy.step(learning_rate)
    summed = Counter[str]()
    for one in ranks:
        summed.update(one)
    means = {name: value / len(ranks) for name, value in summed.items()}
    return means | {"grad_norm": norm, "learning_rate": learning_rate}


def _pad_micro_batches(strategy: TrainingStrategy, micro_batches: Sequence[Batch]) -> list[tuple[Batch, bool]]:
    """Return micro-batches, and whether each counts.

    Where all ranks must call the model equally often, the last micro-batch is repeated without counting.
    """
    counted = [(batch, True) for batch in micro_batches]
    if not strategy.requires_equal_calls:
        return counted
    most = max(dist.gather([len(micro_batches)]))
    return counted + [(micro_batches[-1], False)] * (most - len(micro_batches))


def _raise_not_finite(micro_batches: Sequence[Batch], total: float, *, norm: float, step: int) -> None:
    """Raise before the weights are updated, with the clips of the ranks whose loss is not finite, or of all ranks."""
    ranks = dist.gather([(total, [clip for batch in micro_batches for clip in batch.clips])])
    bad = [one for one in ranks if not math.isfinite(one[0])] or ranks
    clips = sorted({clip for _, names in bad for clip in names})
    raise FloatingPointError(
        f"step {step}: loss {bad[0][0]}, gradient norm {norm}, on {', '.join(clips)}: check these clips, or lower the "
        "learning rate. The step was skipped; the last checkpoint is valid"
    )


def _speed_metrics(micro_batches: Sequence[Batch], *, seconds: float, waited: float) -> dict[str, float]:
    """Return tokens per second of all ranks, the peak memory of this rank, and the time of the step in seconds."""
    tokens = dist.all_reduce_sum(sum(batch.num_tokens for batch in micro_batches))
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else system.peak_memory_bytes()
    return {
        "tokens_per_second": tokens / seconds,
        "memory_gib": memory / (1 << 30),
        "wait_seconds": waited,
        "seconds": seconds,
    }


def _prefetch(batches: Batches[Batch], first: int, last: int) -> Iterator[tuple[int, Sequence[Batch], float]]:
    """Yield (step, micro-batches, seconds waited for them); a thread prepares the next step during the current one.

    For a GPU, the thread also reads features from disk to pinned memory, from where they are copied without waiting.
    """
    device = dist.device()

    def prepare(step: int) -> list[Batch]:
        return [batch.pin_for(device) for batch in batches.micro_batches(step)]

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(prepare, first) if first < last else None
        for step in range(first, last):
            assert following is not None
            started = time.monotonic()
            micro_batches = following.result()
            waited = time.monotonic() - started
            following = pool.submit(prepare, step + 1) if step + 1 < last else None
            yield step, micro_batches, waited


def _show_step(bar: tqdm, step: int, num_steps: int, metrics: Mapping[str, float], *, name: str) -> None:
    """Show a step's metrics in the bar of a terminal, else in the log now and then: a file would not show the bar."""
    text = " ".join(f"{metric} {metrics[metric]:.3f}" for metric in SHOWN_METRICS if metric in metrics)
    bar.set_postfix_str(text, refresh=False)
    bar.update()
    if bar.disable and (step + 1) % max(1, num_steps // NUM_LOG_LINES) == 0:
        log.info("%s: step %d of %d: %s", name, step + 1, num_steps, text)
