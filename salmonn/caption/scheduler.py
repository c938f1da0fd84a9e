"""Continuous batching: which sequences are decoded together, and what is done when memory runs out.

    waiting   [a a a a] [b b b b] [c c]     groups of sequences, usually the samples of a clip
    running    x x x y y z _ _ _ _          rows of the batch; a group is admitted when all of it has room

Serving, captioning of folders, and sampling for training use this scheduler. The engine admits requests between any two
decode steps, as they arrive. `run` decodes given groups to their end: what is decoded together then depends on the
groups, their order and the limits alone, so that a repeated run has the same results to the last bit.

On a GPU the memory of the KV cache and the recorded decode steps outlive the sequences. Memory is released if that of
new sequences would exceed the limits otherwise, or if memory runs out.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, takewhile
from typing import Generic, TypeVar

import torch

from salmonn.caption.generator import Sampling
from salmonn.caption.limits import BatchLimits
from salmonn.caption.prompt import Prompt
from salmonn.caption.streaming import Completion, StreamingGenerator, TextDelta
from salmonn.model.layout import ClipFeatures, ClipInputs

logger = logging.getLogger(__name__)
# Share of the rows that must be free before `run` lets others join: a prefill interrupts all other rows, and costs less
# for several groups at once.
JOIN_FRACTION = 1 / 8
OUT_OF_MEMORY = (
    "does not fit into GPU memory with the model: use a smaller batch_size, a part of the clip (start, end), or put "
    "less of the model on this GPU (bits 8 or 4, device_map auto)"
)


@dataclass(eq=False, kw_only=True)
class ScheduledSequence:
    """One sample of a request, in the queue or in the batch.

    Args:
        group: what it has in common with others; successive ones with the same object are admitted together.
        clip, prompt, sampling: see `StreamingGenerator.add`.
        seed: random seed, or the seed and the number of the sample.
        num_tokens: tokens of clip and prompt.
        weights: identifies the weights that complete it; only sequences with the same are decoded together.

    Attributes:
        num_generated: tokens so far.
        must_run_alone: whether it did not fit into memory together with others.
        prefill: identifies the prefill that it was part of.
    """

    group: object
    clip: ClipInputs | ClipFeatures
    prompt: Prompt
    sampling: Sampling
    seed: int | tuple[int, int]
    num_tokens: int
    weights: object = None
    num_generated: int = field(default=0, init=False)
    must_run_alone: bool = field(default=False, init=False)
    prefill: int = field(default=0, init=False)


S = TypeVar("S", bound=ScheduledSequence)


class Scheduler(Generic[S]):
    """Admits sequences to a batch and decodes them; not thread-safe.

    Args:
        start: starts an empty batch.
        limits: what may be decoded together.

    Attributes:
        waiting: the queue.
        running: sequences in the batch, by row number.
        num_prefills, num_steps: numbers of prefills, each of one or more groups, and of decode steps so far.
    """

    def __init__(self, start: Callable[[], StreamingGenerator], *, limits: BatchLimits) -> None:
        self.limits = limits
        self.waiting: list[S] = []
        self.running: dict[int, S] = {}
        self.num_prefills = self.num_steps = 0
        self._start = start
        self._batch = start()
        self._cancelled: set[int] = set()  # rows that end with the next step

    def run(self, groups: Iterable[Sequence[S]]) -> Iterator[tuple[S, Completion | Exception]]:
        """Decode groups to their end and yield each sequence with its completion, or why it has none, as it ends.

        Args:
            groups: groups, taken from the iterable as there is room for them.
        """
        self._batch.restart()
        try:
            for group in groups:
                self.waiting += group
                while not self.has_room:
                    yield from self.advance()
            while self.waiting or self.running:
                yield from self.advance()
        finally:
            if self.waiting or self.running:  # after an error, or if the rest is not wanted
                self.waiting = []
                self.clear()

    @property
    def has_room(self) -> bool:
        """Whether another group could join before the next step."""
        num_free = self.limits.num_rows - len(self.running)
        if self.running and num_free < JOIN_FRACTION * self.limits.num_rows:
            return False
        return len(self.waiting) < num_free and self._fits(self.waiting)

    def advance(self) -> list[tuple[S, Completion | Exception]]:
        """Let sequences join once enough rows are free for some, and make a decode step; returns those that ended."""
        ended: list[tuple[S, Completion | Exception]] = []
        num_free = self.limits.num_rows - len(self.running)
        if not self.running or num_free >= min(JOIN_FRACTION * self.limits.num_rows, len(self.waiting)):
            while admitted := self.admit():
                is_alone = len(admitted) == 1 and not self.running
                if reason := memory_error(partial(self.prefill, admitted), num_rows=len(self.running) + len(admitted)):
                    ended += self._retry(admitted, is_alone=is_alone, reason=reason)
        if not self.running:
            return ended
        deltas: list[tuple[S, TextDelta]] = []
        if reason := memory_error(lambda: deltas.extend(self.step()), num_rows=len(self.running)):
            sequences = self.clear()
            return ended + self._retry(sequences, is_alone=len(sequences) == 1, reason=reason)
        return ended + [(one, delta.completion) for one, delta in deltas if delta.completion is not None]

    def _retry(self, sequences: Sequence[S], *, is_alone: bool, reason: str) -> list[tuple[S, Completion | Exception]]:
        """Let sequences that do not fit into memory together run alone; returns the one for which that is no use."""
        if is_alone:
            return [(one, torch.OutOfMemoryError(f"{OUT_OF_MEMORY} ({reason})")) for one in sequences]
        self.retry_alone(sequences)
        return []

    def admit(self, *, chunk_tokens: int | None = None) -> list[S]:
        """Take sequences from the queue for the next prefill: the oldest, and others with its sampling parameters.

        They must fit into the batch. All sequences of a group are admitted together, since they share their prefix.

        Args:
            chunk_tokens: maximum number of tokens of further groups while others are decoding, which wait meanwhile.
        """
        if not self.waiting:
            return []
        first, admitted, num_tokens = self.waiting[0], list[S](), 0
        if first.must_run_alone or any(one.must_run_alone for one in self.running.values()):
            admitted = [] if self.running else [first]
            self.waiting = self.waiting[len(admitted) :]
            return admitted
        if any(one.weights is not first.weights for one in self.running.values()):
            return []
        num_free = self.limits.num_rows - len(self.running)
        together = takewhile(lambda one: not one.must_run_alone, self.waiting)
        compatible = (one for one in together if one.sampling == first.sampling and one.weights is first.weights)
        for _, members in groupby(compatible, key=lambda one: id(one.group)):
            group = list(members)
            num_tokens += group[0].num_tokens
            is_too_long = chunk_tokens is not None and bool(self.running and admitted) and num_tokens > chunk_tokens
            # A group of more sequences than rows is admitted in parts, when the batch is empty.
            num_needed = min(len(group), self.limits.num_rows)
            fits = num_needed <= num_free - len(admitted) and self._fits([*admitted, *group[:num_needed]])
            if is_too_long or ((self.running or admitted) and not fits):
                break
            admitted += group[: num_free - len(admitted)]
        chosen = set(map(id, admitted))
        self.waiting = [one for one in self.waiting if id(one) not in chosen]
        return admitted

    def _fits(self, sequences: Sequence[S]) -> bool:
        """Return whether the KV cache has room for sequences in addition to those that are running."""
        together = [*self.running.values(), *sequences]
        # Sequences that were admitted at different times do not share the prefix.
        prefixes = {(one.prefill, id(one.group)): one.num_tokens for one in together}
        return self.limits.have_room(prefixes.values(), [one.sampling.max_new_tokens for one in together])

    def prefill(self, admitted: Sequence[S]) -> None:
        """Prefill the prompts of sequences and add them to the batch."""
        self.num_prefills += 1
        self._release_for(admitted)
        rows = list[int]()
        if self.running or not self._batch.num_stored_tokens:
            rows += self._add(admitted)
        elif memory_error(lambda: rows.extend(self._add(admitted)), num_rows=len(admitted)):
            self.clear()  # what earlier sequences needed may be in the way
            rows += self._add(admitted)
        for one in admitted:
            one.prefill = self.num_prefills
        self.running |= dict(zip(rows, admitted, strict=True))

    def _add(self, admitted: Sequence[S]) -> range:
        return self._batch.add(
            [one.clip for one in admitted],
            [one.prompt for one in admitted],
            sampling=admitted[0].sampling,
            seeds=[one.seed for one in admitted],
        )

    def _release_for(self, admitted: Sequence[S]) -> None:
        """Release memory that is not in use if it would exceed the limit together with what a prefill computes."""
        limit, prefixes = self.limits.max_tokens, {id(one.group): one.num_tokens for one in admitted}
        is_full = limit is not None and self._batch.num_stored_tokens + sum(prefixes.values()) > limit
        if self.running and is_full:
            self._batch.release_unused()
        elif is_full:
            self.clear()
        elif not self.running:
            self._batch.clear()

    def step(self) -> list[tuple[S, TextDelta]]:
        """Generate one token for each running sequence; returns new text, and removes the sequences that have ended."""
        cancelled, self._cancelled = self._cancelled, set()
        deltas = self._batch.step(cancelled)
        self.num_steps += 1
        for one in self.running.values():
            one.num_generated += 1
        return [
            (self.running.pop(row) if delta.completion is not None else self.running[row], delta)
            for row, delta in deltas.items()
        ]

    def cancel(self, sequences: Collection[S]) -> None:
        """End running sequences before the next step."""
        rows = {row for row, one in self.running.items() if one in sequences}
        self._cancelled |= rows
        self.running = {row: one for row, one in self.running.items() if row not in rows}

    def clear(self) -> list[S]:
        """Empty the batch, which frees its KV cache, and return the sequences that were in it."""
        sequences, self.running, self._cancelled = list(self.running.values()), {}, set()
        self._batch = self._start()
        return sequences

    def retry_alone(self, sequences: Sequence[S]) -> None:
        """Put sequences that do not fit into memory together back at the front of the queue; each will run alone."""
        for one in sequences:
            one.must_run_alone, one.num_generated, one.prefill = True, 0, 0
        self.waiting = [*sequences, *self.waiting]


def memory_error(work: Callable[[], object], *, num_rows: int) -> str:
    """Run work of the model; returns the first sentence of the error if memory runs out, else "".

    The traceback of the error, which holds tensors, is freed on return.
    """
    try:
        work()
    except torch.OutOfMemoryError as error:
        # As text, since a log handler may keep its arguments.
        logger.warning("out of memory with %d sequences: %s", num_rows, str(error))
        return str(error).split(". ")[0] or "out of memory"
    return ""
