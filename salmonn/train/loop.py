"""The training loop: one plain loop on accelerate for every stage; a stage brings its batches and its loss."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from salmonn import dist
from salmonn.model.network import Network
from salmonn.train.checkpoint import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)
Precision = Literal["float32", "bfloat16"]
Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)
Batch_contra = TypeVar("Batch_contra", contravariant=True)


@dataclass(frozen=True)
class FitConfig:
    """Optimisation of one stage.

    Args:
        learning_rate: its peak, after warm-up; then it falls along a cosine.
        final_rate: share of the peak at the cosine's end.
        steps: optimiser steps; none where `epochs` says how long.
        epochs: how often every example is seen; none where `steps` says how long.
        batch_size: examples a step, over all ranks.
        accumulation: a rank's part of the batch goes through the model in at most so many pieces, one after the
            other, to save memory; the gradient is that of the whole.
        warmup: share of the steps over which the rate rises from 0.
        weight_decay: of matrices; vectors have none.
        betas: of Adam.
        max_grad_norm: gradients are clipped to this norm.
        precision: what the model computes in; bfloat16 is automatic mixed precision. Trained weights and Adam's
            moments are float32 in any case.
        gradient_checkpointing: keep each layer's input alone and compute the rest again for the gradient.
        checkpoint_every: steps between checkpoints, from which a killed stage goes on.
    """

    learning_rate: float = 1e-3
    final_rate: float = 0.1
    steps: int | None = 1000
    epochs: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    warmup: float = 0.05
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
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps from 0 to 1, got {self.warmup}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation counts pieces and must be at least 1, got {self.accumulation}")

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
        return round(self.warmup * self.num_steps)


class Batches(Protocol, Generic[Batch_co]):
    """Gives this rank's part of the batch of any step, so that a resumed stage sees what an unbroken one does.

    It comes in pieces, each to go through the model alone.
    """

    def __call__(self, step: int) -> Sequence[Batch_co]: ...


class Loss(Protocol, Generic[Batch_contra]):
    """Computes a piece's loss and figures for the log.

    Those of a rank's pieces are added up, and the sums averaged over ranks: a mean over the step's examples must
    divide by how many an average rank has, whatever the piece.
    """

    def __call__(self, model: nn.Module, batch: Batch_contra) -> tuple[Tensor, Mapping[str, float]]: ...


def learning_rate_at(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine down to the final share of the peak."""
    warmup = config.num_warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(config.num_steps - warmup, 1)
    falling = (1 - config.final_rate) / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (config.final_rate + falling)


def autocast(precision: Precision) -> torch.autocast:
    """Within this context a model computes as it does in training of this precision."""
    return torch.autocast(dist.device().type, torch.bfloat16, enabled=precision == "bfloat16")


def fit(
    model: nn.Module,
    batches: Batches[Batch],
    loss: Loss[Batch],
    config: FitConfig,
    *,
    seed: int,
    name: str,
    checkpoint_path: Path,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
) -> None:
    """Train what requires gradients, in place.

    Args:
        model: whatever in it requires gradients is trained.
        batches: step -> this rank's batch, in pieces.
        loss: (model, batch) -> loss and figures.
        seed: of dropout.
        name: of the stage, for the progress bar.
        checkpoint_path: where the stage's state is kept while it runs; deleted by nobody but the caller.
        on_step: called on rank 0 with the step's number and figures.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the weights are those before the step.
        ValueError: the config does not suit the model or the number of processes.
    """
    if config.batch_size < dist.world_size():
        raise ValueError(f"a batch of {config.batch_size} examples does not reach for {dist.world_size()} processes")
    with _master_weights(model, config), _checkpointing(model, config):
        _fit(model, batches, loss, config, seed=seed, name=name, checkpoint_path=checkpoint_path, on_step=on_step)
    model.eval()


def _fit(
    model: nn.Module,
    batches: Batches[Batch],
    loss: Loss[Batch],
    config: FitConfig,
    *,
    seed: int,
    name: str,
    checkpoint_path: Path,
    on_step: Callable[[int, Mapping[str, float]], object] | None,
) -> None:
    # Left to itself accelerate takes several processes without a GPU for so many runs of one.
    several_on_cpu = dist.world_size() > 1 and dist.device().type == "cpu"
    accelerator = Accelerator(
        cpu=several_on_cpu, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    assert accelerator.num_processes == dist.world_size()
    optimizer = _optimizer(model, config)
    first = load_checkpoint(checkpoint_path, model=model, optimizer=optimizer) if checkpoint_path.is_file() else 0
    if first:
        log.info("%s goes on from step %d", name, first)
    wrapped = accelerator.prepare_model(model)
    wrapped.train()
    bar = tqdm(total=config.num_steps, initial=first, desc=name, disable=not dist.is_main(), unit="step")
    for step, pieces in _prefetch(batches, first, config.num_steps):
        figures = _step(accelerator, wrapped, optimizer, loss, pieces, config=config, step=step, seed=seed)
        bar.update()
        bar.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})
        if dist.is_main() and on_step:
            on_step(step, figures)
        if dist.is_main() and (step + 1) % config.checkpoint_every == 0:
            save_checkpoint(checkpoint_path, model=model, optimizer=optimizer, step=step + 1)
    bar.close()


class StepLog:
    """Appends each step's figures to a JSONL file.

    Args:
        path: of the file; a resumed stage goes on in it, repeating the steps since its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Write one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


@contextmanager
def _master_weights(model: nn.Module, config: FitConfig) -> Iterator[None]:
    """Weights to be trained are float32 within: in 16 bits small steps would be rounded away."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    short = [(parameter, parameter.dtype) for parameter in trained if parameter.dtype != torch.float32]
    if short and config.precision == "float32":
        raise ValueError(
            f"the weights to be trained are in {str(short[0][1]).removeprefix('torch.')}: compute in it too "
            "(fit.precision bfloat16), or load them as placement.dtype float32"
        )
    for parameter, _ in short:
        parameter.data = parameter.data.float()
    yield
    for parameter, dtype in short:
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _checkpointing(model: nn.Module, config: FitConfig) -> Iterator[None]:
    if not config.gradient_checkpointing:
        yield
        return
    assert isinstance(model, Network)
    model.checkpoint_layers(True)
    yield
    model.checkpoint_layers(False)


def _optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss[Batch],
    pieces: Sequence[Batch],
    *,
    config: FitConfig,
    step: int,
    seed: int,
) -> Mapping[str, float]:
    torch.manual_seed(seed * 1_000_003 + step * 131 + dist.rank())
    total, figures = 0.0, Counter[str]()
    for number, piece in enumerate(pieces, start=1):
        # Gradients are averaged over ranks once, with the last piece.
        with nullcontext() if number == len(pieces) else accelerator.no_sync(model):
            with autocast(config.precision):
                value, figures_of_piece = loss(model, piece)
            accelerator.backward(value)
        total += value.item()
        figures.update(figures_of_piece)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if not torch.isfinite(norm) or not math.isfinite(total):
        raise FloatingPointError(
            f"step {step}: loss {total}, gradient norm {norm.item()}; "
            "lower the learning rate or look at the batch; the last checkpoint is sound"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": total, **figures}


def _prefetch(batches: Batches[Batch], first: int, last: int) -> Iterator[tuple[int, Sequence[Batch]]]:
    """Make the next batch in a thread while the current one is trained on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(batches, first) if first < last else None
        for step in range(first, last):
            assert following is not None
            pieces = following.result()
            following = pool.submit(batches, step + 1) if step + 1 < last else None
            yield step, pieces
