"""Batches of items of similar length, computed on all ranks and balanced by cost."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from salmonn import dist
from salmonn.caption.loader import length_buckets

T = TypeVar("T")


def make_batches(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Group indices into batches of at most `size` (at least 1) and of similar length, the longest first."""
    return length_buckets([-length for length in lengths], size=max(1, size))


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
