"""Count what a decode step gives to a GPU: operators, each at least one kernel launch, and the memory they write.

    python tools/bench/decode_ops.py [--layers 28] [--prefix 25110]

Counted on a CPU at the level at which PyTorch chooses kernels, views left out. Layers and heads are those of a 7B. For
whole steps all else is small; attention is also counted alone, at full size. Steps are counted through the layers of
transformers, as a CPU runs them, and with the functions that a GPU runs compiled; each counts once for every
result of a shape of its own. With `--compile true` these functions are also compiled for the CPU and compared.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jsonargparse import CLI
from model import PROMPT, SHAPES, make_captioner, make_clip
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from salmonn.caption.generate import DecodeBatch
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow
from salmonn.model.decode_layers import (
    DecodeLayers,
    LayerSizes,
    Pointwise,
    compile_functions,
    largest_difference,
)
from salmonn.model.kv_cache import KVCache
from salmonn.model.layout import ClipFeatures
from salmonn.model.packing import PackedBatch, PrefixGroup

MIB = 1 << 20
BATCHES = ((1, 1), (8, 8))  # clips, samples of each
HEADS, KV_HEADS, HEAD_WIDTH = 28, 4, 128


class OperatorCounter(TorchDispatchMode):
    """Counts operators that are not views, and the bytes of what they return.

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


def counted_pointwise(counter: OperatorCounter) -> Pointwise:
    """Return plain functions that are counted as compiled ones."""

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                result = function(*arguments)
            counter.counts[name] += len({one.shape for one in tree_leaves(result)})
            return result

        return call

    return Pointwise(*map(counted, Pointwise._fields, Pointwise()))


def count_step(*, layers: int, num_clips: int, num_samples: int, is_fused: bool) -> OperatorCounter:
    """Count the operators of a decode step of several clips with several samples each."""
    shape = replace(SHAPES["small"], layers=layers, heads=HEADS, kv_heads=KV_HEADS, width=8 * HEADS, num_frames=64)
    captioner = make_captioner(shape)
    clip = make_clip(captioner.processor, num_frames=shape.num_frames, side=shape.side)
    layout = captioner.processor.make_layout(clip)
    features = ClipFeatures(torch.randn(len(layout.order), shape.width), layout)
    rows = [PromptRow(number, PROMPT) for number in range(num_clips)]
    inputs = captioner.processor.collate(rows, [features] * num_clips)
    batch, counter = DecodeBatch(captioner.network, stop_ids=[]), OperatorCounter()
    if is_fused:
        batch.decoder.layers = DecodeLayers(captioner.network, counted_pointwise(counter))
    sampling = Sampling(temperature=1.0, max_new_tokens=9)
    batch.add(inputs, sampling=sampling, num_samples=num_samples, seeds=range(num_clips))
    for _ in range(2):  # the first step makes room for tokens
        batch.step()
    counter.counts.clear()
    with counter:
        batch.step()
    return counter


def count_attention(*, prefix: int, num_clips: int, num_samples: int) -> OperatorCounter:
    """Count the operators of a decode step's attention in one layer of a 7B, with prefixes of some length."""
    num_tokens, num_rows = num_clips * (prefix + num_samples), num_clips * num_samples
    rows = torch.arange(num_rows).unflatten(0, (num_clips, num_samples)).tolist()
    groups = tuple(PrefixGroup(number, tuple(of), prefix, (1,) * num_samples) for number, of in enumerate(rows))
    packed = PackedBatch(torch.arange(num_tokens), torch.zeros(0), groups)
    cache = KVCache(packed, torch.arange(num_tokens).expand(3, 1, num_tokens))
    segments = [torch.randn(1, KV_HEADS, length, HEAD_WIDTH) for length in packed.segment_lengths]
    cache.append(0, segments, segments, is_suffix=packed.is_suffix)
    cache.finalize()
    query, key = (torch.randn(num_rows, heads, 1, HEAD_WIDTH) for heads in (HEADS, KV_HEADS))
    for _ in range(2):  # the first step makes room for tokens, and tables of the rows
        cache.advance()
        cache.attend(0, query, key, key, scale=HEAD_WIDTH**-0.5)
    with OperatorCounter() as counter:
        cache.attend(0, query, key, key, scale=HEAD_WIDTH**-0.5)
    return counter


def main(layers: int = 28, prefix: int = 25_110, most: int = 0, compile: bool = False) -> None:
    """Print three tables: a decode step through the layers of transformers, and with fewer kernels; and attention.

    Args:
        layers: layers of the decoder.
        prefix: tokens of each clip and its prompt, for attention; the default is a clip of 51 s of video-SALMONN 2+.
        most: number of the most frequent operators to print.
        compile: also compile the functions of a GPU, and print how much they differ from plain ones.
    """
    if compile:
        sizes, cpu = LayerSizes(3584, 18_944, HEADS, KV_HEADS, HEAD_WIDTH), torch.device("cpu")
        difference = largest_difference(compile_functions(), cpu, torch.float32, sizes)
        Console().print(f"largest difference of compiled functions in float32: {difference:.1e}")
    for title, count in (
        (f"a decode step of {layers} layers of transformers", partial(count_step, layers=layers, is_fused=False)),
        (f"a decode step of {layers} layers with compiled parts", partial(count_step, layers=layers, is_fused=True)),
        (
            f"attention of one layer to {prefix:,} tokens of each clip, in float32",
            partial(count_attention, prefix=prefix),
        ),
    ):
        table = Table(title=title, title_justify="left")
        for column in ("clips x samples", "operators", "largest result, MiB", "all results, MiB"):
            table.add_column(column, justify="right")
        for num_clips, num_samples in BATCHES:
            counter = count(num_clips=num_clips, num_samples=num_samples)
            figures = (f"{size / MIB:.2f}" for size in (counter.largest, counter.bytes_written))
            table.add_row(f"{num_clips} x {num_samples}", str(counter.counts.total()), *figures)
        Console(width=120).print(table)
        for name, number in counter.counts.most_common(most):
            Console().print(f"{number:6} {name}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
