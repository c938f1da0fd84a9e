"""Batches of items of similar length, and parts of several batches, computed on all ranks and balanced by cost."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from salmonn import dist
from salmonn.caption.loader import length_buckets

T = TypeVar("T")

# Batches in a part. At its end rows idle, in parts of 8 batches a sixth of them all, and a kill loses minutes.
MIN_PART_BATCHES, MAX_PART_BATCHES = 4, 8
PARTS_MULTIPLE = 8  # GPUs of a machine, among which the parts divide evenly


def make_batches(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Group indices into batches of at most `size` (at least 1) and of similar length, the longest first."""
    return length_buckets([-length for length in lengths], size=max(1, size))


def make_parts(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Distribute indices into parts of several batches, with as many long and short items in each, longest first.

    Large parts leave few rows of a batch without work at their end; small ones divide more evenly among processes.
    Their number is a multiple of 8; if they had less than 4 batches each, the parts are single batches.

    Args:
        lengths: lengths of the items.
        size: items in a batch, at least 1.
    """
    batches = make_batches(lengths, size=size)
    if len(batches) < PARTS_MULTIPLE * MIN_PART_BATCHES:
        return batches
    count = PARTS_MULTIPLE * -(-len(batches) // (PARTS_MULTIPLE * MAX_PART_BATCHES))
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[number::count] for number in range(count)]


def map_batches(
    compute: Callable[[int], list[T]], batches: Sequence[Sequence[int]], costs: Sequence[float], *, name: str, unit: str
) -> list[T]:
    """Compute all batches, balanced over the ranks, and return their items on every rank.

    Args:
        compute: number of a batch -> one item for each of its indices.
        batches: indices of the items.
        costs: estimated cost of each batch.
        name: title of the progress bar.
        unit: unit of the progress bar.

    Returns:
        Items in the order of their indices.
    """
    shares = dist.balance(costs)
    mine, computed = shares[dist.rank()], []
    total = sum(len(batches[number]) for number in mine)
    with tqdm(total=total, desc=name, unit=unit, disable=not dist.is_main()) as bar:
        for number in mine:
            computed.append(compute(number))
            bar.update(len(batches[number]))
    return dist.ungroup(dist.gather_balanced(computed, shares), batches)
