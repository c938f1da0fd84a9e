"""The training loop: one plain loop on accelerate for every stage; a stage brings its batches and its loss."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from salmonn import dist
from salmonn.train.checkpoint import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)
Batch_contra = TypeVar("Batch_contra", contravariant=True)


@dataclass(frozen=True)
class FitConfig:
    """Optimisation of one stage.

    Args:
        learning_rate: its peak, after warm-up; then it falls along a cosine to a tenth.
        steps: optimiser steps.
        batch_size: examples a step, over all ranks.
        warmup_steps: steps over which the rate rises from 0.
        weight_decay: of matrices; vectors have none.
        max_grad_norm: gradients are clipped to this norm.
        checkpoint_every: steps between checkpoints, from which a killed stage goes on.
    """

    learning_rate: float = 1e-3
    steps: int = 1000
    batch_size: int = 32
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    checkpoint_every: int = 100


class Batches(Protocol, Generic[Batch_co]):
    """Gives this rank's part of the batch of any step, so that a resumed stage sees what an unbroken one does."""

    def __call__(self, step: int) -> Batch_co: ...


class Loss(Protocol, Generic[Batch_contra]):
    """Computes a batch's loss, to be averaged over ranks, and figures for the log."""

    def __call__(self, model: nn.Module, batch: Batch_contra) -> tuple[Tensor, Mapping[str, float]]: ...


def learning_rate_at(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


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
        batches: step -> this rank's batch.
        loss: (model, batch) -> loss and figures.
        seed: of dropout.
        name: of the stage, for the progress bar.
        checkpoint_path: where the stage's state is kept while it runs; deleted by nobody but the caller.
        on_step: called on rank 0 with the step's number and figures.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the weights are those before the step.
    """
    # Left to itself accelerate takes several processes without a GPU for so many runs of one.
    on_cpu = dist.device().type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert accelerator.num_processes == dist.world_size()
    optimizer = _optimizer(model, config)
    first = load_checkpoint(checkpoint_path, model=model, optimizer=optimizer) if checkpoint_path.is_file() else 0
    if first:
        log.info("%s goes on from step %d", name, first)
    wrapped = accelerator.prepare_model(model)
    wrapped.train()
    bar = tqdm(total=config.steps, initial=first, desc=name, disable=not dist.is_main(), unit="step")
    for step, batch in _prefetch(batches, first, config.steps):
        figures = _step(accelerator, wrapped, optimizer, loss, batch, config=config, step=step, seed=seed)
        bar.update()
        bar.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})
        if dist.is_main() and on_step:
            on_step(step, figures)
        if dist.is_main() and (step + 1) % config.checkpoint_every == 0:
            save_checkpoint(checkpoint_path, model=model, optimizer=optimizer, step=step + 1)
    bar.close()
    model.eval()


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


def _optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss[Batch],
    batch: Batch,
    *,
    config: FitConfig,
    step: int,
    seed: int,
) -> Mapping[str, float]:
    torch.manual_seed(seed * 1_000_003 + step * 131 + dist.rank())
    value, figures = loss(model, batch)
    accelerator.backward(value)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if not torch.isfinite(norm) or not torch.isfinite(value):
        raise FloatingPointError(
            f"step {step}: loss {value.item()}, gradient norm {norm.item()}; "
            "lower the learning rate or look at the batch; the last checkpoint is sound"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": value.item(), **figures}


def _prefetch(batches: Batches[Batch], first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """Make the next batch in a thread while the current one is trained on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(batches, first) if first < last else None
        for step in range(first, last):
            assert following is not None
            batch = following.result()
            following = pool.submit(batches, step + 1) if step + 1 < last else None
            yield step, batch
