"""Count what a decode step gives to a GPU: operators, each at least one kernel launch, and the memory they write.

    python tools/bench/decode_ops.py                     # launches a token, of a decoder with the 28 layers of a 7B
    python tools/bench/decode_ops.py --layers 1 --frames 138    # attention at full size: 25,000 tokens of each clip

Counted on a CPU at the level at which PyTorch chooses kernels, views left out. The decoder has the heads of a 7B; all
else is small. With one layer, the largest tensor is the largest one that attention writes.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import CLI
from model import PROMPT, SHAPES, make_captioner, make_clip
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salmonn.caption.captioner import Captioner
from salmonn.caption.generate import DecodeBatch
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow

MIB = 1 << 20
BATCHES = ((1, 1), (8, 8))  # clips, samples of each


class OperatorCounter(TorchDispatchMode):
    """Counts operators that are no views, and the bytes of what they return.

    Attributes:
        counts: number of calls by name.
        bytes_written: bytes of all results.
        largest: bytes of the largest result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes_written = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default):
            self.counts[str(func)] += 1
            if not func._schema.is_mutable:  # the result is all of the tensor that it changes in part
                sizes = [one.nbytes for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
                self.bytes_written += sum(sizes)
                self.largest = max([self.largest, *sizes])
        return result


def make_decoder(*, layers: int) -> Captioner:
    """Make a captioner with the heads of a 7B, small in all else."""
    return make_captioner(replace(SHAPES["small"], layers=layers, heads=28, kv_heads=4, width=28 * 8, side=384))


def count_step(captioner: Captioner, *, num_frames: int, num_clips: int, num_samples: int) -> OperatorCounter:
    """Count the operators of one decode step of several clips with several samples each."""
    clip = make_clip(captioner.processor, num_frames=num_frames, side=384)
    (features,) = captioner.encode([clip])
    rows = [PromptRow(number, PROMPT) for number in range(num_clips)]
    inputs = captioner.processor.collate(rows, [features] * num_clips)
    batch = DecodeBatch(captioner.network, stop_ids=[])
    sampling = Sampling(temperature=1.0, max_new_tokens=9)
    batch.add(inputs, sampling=sampling, num_samples=num_samples, seeds=range(num_clips))
    for _ in range(2):  # the first step makes room for tokens
        batch.step()
    with OperatorCounter() as counter:
        batch.step()
    return counter


def main(layers: int = 28, frames: int = 4, most: int = 0) -> None:
    """Print a table.

    Args:
        layers: layers of the decoder.
        frames: frames of each clip, of 182 tokens.
        most: number of the most frequent operators to print.
    """
    captioner = make_decoder(layers=layers)
    table = Table(title=f"one decode step, {layers} layers, {182 * frames:,} tokens of each clip")
    for column in ("clips x samples", "operators", "largest tensor, MiB", "all results, MiB"):
        table.add_column(column, justify="right")
    for num_clips, num_samples in BATCHES:
        counter = count_step(captioner, num_frames=frames, num_clips=num_clips, num_samples=num_samples)
        figures = (counter.largest / MIB, counter.bytes_written / MIB)
        table.add_row(
            f"{num_clips} x {num_samples}", str(counter.counts.total()), *(f"{figure:.2f}" for figure in figures)
        )
    Console(width=120).print(table)
    for name, count in counter.counts.most_common(most):
        Console().print(f"{count:6} {name}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
