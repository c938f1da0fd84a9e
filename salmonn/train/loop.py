"""The training loop: one plain loop for every stage and engine; a stage brings its batches and its loss."""

import logging
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from salmonn import dist
from salmonn.model.network import Network
from salmonn.train.checkpoint import Checkpoint, Checkpoints, load_trained
from salmonn.train.log import StepLog
from salmonn.train.parallel import StrategyName, TrainingStrategy, check_strategy, make_strategy, trainable_parameters

log = logging.getLogger(__name__)
Precision = Literal["float32", "bfloat16"]
SHOWN = ("loss", "ce", "margin", "accuracy", "kl")  # of the figures, on the terminal
TOLD_TIMES = 10  # that a stage's figures are told in a log that is no terminal


@dataclass(frozen=True)
class FitConfig:
    """Optimisation of one stage.

    Args:
        learning_rate: its peak, after warm-up; then it falls along a cosine.
        min_lr_ratio: share of the peak at the cosine's end.
        steps: optimiser steps; none where `epochs` says how long.
        epochs: how often every example is seen; none where `steps` says how long.
        batch_size: examples a step, over all ranks.
        gradient_accumulation_steps: number of micro-batches that a rank's part of the batch is split into, to save
            memory; the gradient is that of the whole batch.
        warmup_ratio: share of the steps over which the rate rises from 0.
        weight_decay: of matrices; vectors have none.
        betas: of Adam.
        max_grad_norm: gradients are clipped to this norm.
        precision: what the model computes in; bfloat16 is automatic mixed precision (under ZeRO all weights are
            bfloat16 in products). Trained weights, their gradients' sums and Adam's moments are float32 in any case.
        gradient_checkpointing: keep each layer's input alone and compute the rest again for the gradient.
        checkpoint_every: steps between checkpoints, from which a killed stage goes on.
    """

    learning_rate: float = 1e-3
    min_lr_ratio: float = 0.1
    steps: int | None = 1000
    epochs: float | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"a stage lasts so many steps or so many epochs: one of them must be given and the other null, "
                f"got steps {self.steps} and epochs {self.epochs}"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is a share of the steps from 0 to 1, got {self.warmup_ratio}")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps must be at least 1, got {self.gradient_accumulation_steps}")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every counts steps and must be at least 1, got {self.checkpoint_every}")

    def resolve(self, num_examples: int) -> "FitConfig":
        """The same in steps, where it is told in epochs of so many examples."""
        if self.epochs is None:
            return self
        return replace(self, steps=max(1, round(self.epochs * num_examples / self.batch_size)), epochs=None)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of a config that counts them."""
        assert self.steps is not None, "resolve() turns epochs into steps"
        return self.steps

    @property
    def num_warmup_steps(self) -> int:
        """Steps over which the rate rises."""
        return round(self.warmup_ratio * self.num_steps)


class MicroBatch(Protocol):
    """A part of a step's batch, which goes through the model alone.

    Args:
        clips: names of the clips that it is about, for messages.
        num_tokens: of text and clips, that go through the decoder.
    """

    @property
    def clips(self) -> tuple[str, ...]: ...

    @property
    def num_tokens(self) -> int: ...


Batch = TypeVar("Batch", bound=MicroBatch)
Batch_co = TypeVar("Batch_co", bound=MicroBatch, covariant=True)
Batch_contra = TypeVar("Batch_contra", bound=MicroBatch, contravariant=True)


class Batches(Protocol, Generic[Batch_co]):
    """Gives this rank's part of the batch of any step, so that a resumed stage sees what an unbroken one does.

    It comes in pieces, each to go through the model alone.
    """

    def __call__(self, step: int) -> Sequence[Batch_co]: ...


class Loss(Protocol, Generic[Batch_contra]):
    """Computes a piece's loss and figures for the log, by one call of the model.

    Those of a rank's pieces are added up, and the sums averaged over ranks: a mean over the step's examples must
    divide by how many an average rank has, whatever the piece.
    """

    def __call__(self, model: nn.Module, batch: Batch_contra) -> tuple[Tensor, Mapping[str, float]]: ...


@dataclass(frozen=True)
class Callback:
    """Something else to be measured while training goes on.

    Args:
        measure: of the model; all ranks call it, and get the same.
        every: steps between two measurements.
    """

    measure: Callable[[nn.Module], Mapping[str, float]]
    every: int


@dataclass(frozen=True)
class FitContext:
    """What a training is called, and where it keeps its things.

    Args:
        name: for the terminal.
        folder: that steps.jsonl is written to.
        checkpoints: where it goes on from, and where the trained weights are found at its end.
        seed: of dropout.
        engine: that spreads it over processes.
        watch: what is measured now and then.
    """

    name: str
    folder: Path
    checkpoints: Checkpoints
    seed: int = 0
    strategy: StrategyName = "ddp"
    callback: Callback | None = None


def learning_rate_at(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine down to the final share of the peak."""
    warmup = config.num_warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(config.num_steps - warmup, 1)
    falling = (1 - config.min_lr_ratio) / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (config.min_lr_ratio + falling)


def autocast(precision: Precision) -> torch.autocast:
    """Within this context a model computes as it does in training of this precision."""
    return torch.autocast(dist.device().type, torch.bfloat16, enabled=precision == "bfloat16")


def require_processes(strategy: StrategyName, *configs: FitConfig) -> None:
    """Raise ValueError where these processes cannot train so; told before anything is sampled."""
    check_strategy(strategy)
    if small := [config.batch_size for config in configs if config.batch_size < dist.world_size()]:
        raise ValueError(
            f"a batch of {small[0]} examples does not reach for {dist.world_size()} processes: raise batch_size (of "
            "fit and rebirth.fit), or start fewer"
        )


def fit(
    network: nn.Module, batches: Batches[Batch], loss: Loss[Batch], config: FitConfig, *, stage: FitContext
) -> Checkpoint:
    """Train what requires gradients, and write it down.

    The network is used up: engines leave it in pieces. What was learnt is in the checkpoint of the last step, whose
    weights `load_trained` puts into a network like the one that came in.

    Args:
        network: whatever in it requires gradients is trained.
        batches: step -> this rank's batch, in pieces.
        loss: (model, batch) -> loss and figures.
        config: optimisation, in steps.
        stage: names, places and engine.

    Returns:
        The last checkpoint.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the last checkpoint is sound.
        ValueError: the config does not suit the model or the number of processes, or the disk is full.
    """
    require_processes(stage.strategy, config)
    last = stage.checkpoints.latest()
    if last and last.step >= config.num_steps:
        return last
    _to_master_weights(network, config)
    if config.gradient_checkpointing:
        assert isinstance(network, Network)
        network.checkpoint_layers(True)
    stored = load_trained(network, last) if last else None
    strategy = make_strategy(
        stage.strategy,
        network,
        make_optimizer(network, config),
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
    )
    if stored is not None and last:
        strategy.restore(stored)
        log.info("%s goes on from step %d", stage.name, last.step)
    strategy.model.train()
    _run(strategy, batches, loss, config, stage=stage, first=last.step if last else 0)
    strategy.close()
    done = stage.checkpoints.latest()
    assert done is not None, "the last step ends in a checkpoint"
    return done


def _run(
    strategy: TrainingStrategy,
    batches: Batches[Batch],
    loss: Loss[Batch],
    config: FitConfig,
    *,
    stage: FitContext,
    first: int,
) -> None:
    """All steps from the first on, with log and checkpoints."""
    steps = StepLog(stage.folder) if dist.is_main() else None
    if steps:
        steps.resume(first)
    with Bar(stage.name, first=first, num_steps=config.num_steps) as bar:
        for step, micro_batches, waited in _prefetch(batches, first, config.num_steps):
            began = time.monotonic()
            torch.manual_seed(stage.seed * 1_000_003 + step * 131 + dist.rank())
            figures = _step(strategy, loss, micro_batches, config=config, step=step)
            if stage.callback and (step % stage.callback.every == 0 or step + 1 == config.num_steps):
                figures |= stage.callback.measure(strategy.model)
            seconds = waited + time.monotonic() - began
            figures |= _costs(micro_batches, seconds=seconds, waited=waited)
            bar.show(step, figures)
            if steps:
                steps(step, figures)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.num_steps:
                _save(strategy, stage.checkpoints, step=step + 1)
    if steps:
        steps.close()


def _save(strategy: TrainingStrategy, checkpoints: Checkpoints, *, step: int) -> None:
    # Taking a split weight together needs all ranks; rank 0 alone keeps what it gets.
    whole = {key: tensor.cpu().contiguous() for key, tensor in strategy.state() if dist.is_main()}
    if dist.is_main():
        checkpoints.save(whole, step=step)
    dist.barrier()


class Bar:
    """How far a stage is: a bar on a terminal, else a line now and then. Rank 0 alone shows it.

    Args:
        name: of the stage.
        first: steps that were done before.
        num_steps: of the whole stage.
    """

    def __init__(self, name: str, *, first: int, num_steps: int) -> None:
        self.name = name
        self.num_steps = num_steps
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[told]}"),
        )
        self.progress = Progress(
            *columns, console=Console(stderr=True), disable=not dist.is_main(), refresh_per_second=2
        )
        self.task = self.progress.add_task(name, total=num_steps, completed=first, told="")

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell a step's figures."""
        told = " ".join(f"{name} {figures[name]:.3f}" for name in SHOWN if name in figures)
        self.progress.update(self.task, completed=step + 1, told=told)
        # A file shows no bar while it grows.
        if not self.progress.console.is_terminal and (step + 1) % max(1, self.num_steps // TOLD_TIMES) == 0:
            log.info("%s: step %d of %d: %s", self.name, step + 1, self.num_steps, told)


def _to_master_weights(network: nn.Module, config: FitConfig) -> None:
    """Weights to be trained are float32 within: in 16 bits small steps would be rounded away."""
    bf16 = [parameter for _, parameter in trainable_parameters(network) if parameter.dtype != torch.float32]
    if bf16 and config.precision == "float32":
        raise ValueError(
            f"the weights to be trained are in {str(bf16[0].dtype).removeprefix('torch.')}: compute in it too "
            "(fit.precision bfloat16), or load them as placement.dtype float32"
        )
    for parameter in bf16:
        parameter.data = parameter.data.float()


def make_optimizer(network: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW on what requires gradients; matrices decay, vectors do not."""
    parameters = [parameter for _, parameter in trainable_parameters(network)]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def _step(
    strategy: TrainingStrategy, loss: Loss[Batch], micro_batches: Sequence[Batch], *, config: FitConfig, step: int
) -> dict[str, float]:
    """One step of the optimiser; the figures are those of all ranks."""
    total, figures = 0.0, Counter[str]()
    for number, (piece, counts) in enumerate(padded := _padded(strategy, micro_batches), start=1):
        with strategy.micro_batch(last=number == len(padded)):
            with autocast(config.precision):
                value, figures_of_piece = loss(strategy.model, piece)
            strategy.backward(value if counts else 0 * value)
        if counts:
            total += value.item()
            figures.update(figures_of_piece)
    norm = strategy.clip()
    ranks = dist.gather([{"loss": total, **figures}])
    if not math.isfinite(norm) or not all(math.isfinite(one["loss"]) for one in ranks):
        _refuse(micro_batches, total, norm=norm, step=step)
    learning_rate = learning_rate_at(step, config)
    strategy.step(learning_rate)
    summed = Counter[str]()
    for one in ranks:
        summed.update(one)
    means = {name: value / len(ranks) for name, value in summed.items()}
    return means | {"grad_norm": norm, "learning_rate": learning_rate}


def _padded(strategy: TrainingStrategy, micro_batches: Sequence[Batch]) -> list[tuple[Batch, bool]]:
    """The pieces, each with whether it counts: where all ranks must call the model alike, the last is done again."""
    if not strategy.requires_equal_calls:
        return [(piece, True) for piece in micro_batches]
    most = max(dist.gather([len(micro_batches)]))
    return [(piece, True) for piece in micro_batches] + [(micro_batches[-1], False)] * (most - len(micro_batches))


def _refuse(micro_batches: Sequence[Batch], total: float, *, norm: float, step: int) -> None:
    """End before the step; the clips are those of the ranks whose loss is not finite, or all if none's is."""
    ranks = dist.gather([(total, [clip for piece in micro_batches for clip in piece.clips])])
    bad = [one for one in ranks if not math.isfinite(one[0])] or ranks
    clips = sorted({clip for _, names in bad for clip in names})
    raise FloatingPointError(
        f"step {step}: loss {bad[0][0]}, gradient norm {norm}, on {', '.join(clips)}: look at these, or lower the "
        "learning rate. The weights were not moved; the last checkpoint is sound"
    )


def _costs(micro_batches: Sequence[Batch], *, seconds: float, waited: float) -> dict[str, float]:
    """Tokens a second of all ranks, the most memory of this one so far, and where the time went."""
    tokens = dist.all_reduce_sum(sum(piece.num_tokens for piece in micro_batches))
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": tokens / seconds,
        "memory_gib": memory / (1 << 30),
        "wait_seconds": waited,
        "seconds": seconds,
    }


def _prefetch(batches: Batches[Batch], first: int, last: int) -> Iterator[tuple[int, Sequence[Batch], float]]:
    """Make the next batch in a thread while the current one is trained on; tells how many seconds it was waited for."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(batches, first) if first < last else None
        for step in range(first, last):
            assert following is not None
            began = time.monotonic()
            micro_batches = following.result()
            waited = time.monotonic() - began
            following = pool.submit(batches, step + 1) if step + 1 < last else None
            yield step, micro_batches, waited
