"""Inference engine with continuous batching: any number of requests share one model.

The life of a request:
1. `submit` checks it, counts it as active, and hands its file to the worker processes of the reader, unless the
   features of that clip are cached.
2. Once the file is read, one sequence for each sample of the request enters the queue.
3. The model thread admits sequences from the queue and prefills their prompts, which adds them to the batch.
4. Each decode step generates one token for every sequence of the batch. New text goes to the request's callback;
   sequences that have ended or were cancelled leave the batch, and others can be admitted before the next step.
5. When its last sequence has ended, the request is no longer active.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from salmonn.caption.captioner import OUT_OF_MEMORY, Captioner
from salmonn.caption.clip_cache import ClipCache, ClipKey
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.loader import ClipReader, LimitedReadSpec, ReadSpec
from salmonn.caption.prompt import Prompt
from salmonn.caption.streaming import TextDelta
from salmonn.media.clip import Clip
from salmonn.model.adapters import Adapter, MergedAdapter
from salmonn.model.layout import ClipFeatures, ClipInputs

logger = logging.getLogger(__name__)
SHUTTING_DOWN = "the server is shutting down; try again later"
_ABORT_SECONDS = 10.0  # for the model to finish its current step when the engine is closed

OnEvent = Callable[[int, TextDelta | Exception], object]


class Overloaded(Exception):
    """The queue is full, or the engine is shutting down; the message is for the client."""


class OutOfMemoryDuringBatch(Overloaded):
    """The batch ran out of memory after a part of the answer had been sent to the client."""


class ModelFailedError(RuntimeError):
    """The model failed on a valid request."""


class GenerationHandle:
    """An active request, as `Engine.submit` returns it.

    Attributes:
        num_samples: number of samples requested.
        num_unfinished: number of samples that have not ended.
        num_prompt_tokens: tokens of the clip and the prompt; 0 until the file is read.
        num_completion_tokens: tokens of all samples so far, end tokens included.
        reading_seconds: time from submission to the end of reading; 0 until then.
        adapter: adapter that the request is answered with.
    """

    def __init__(
        self, engine: "Engine", *, num_samples: int, on_event: OnEvent, adapter: Adapter | None = None
    ) -> None:
        self.num_samples = self.num_unfinished = num_samples
        self.num_prompt_tokens = self.num_completion_tokens = 0
        self.reading_seconds = 0.0
        self.is_cancelled = False
        self.reading: Future[tuple[ClipInputs | ClipFeatures, int]] | None = None
        self.cache_key: ClipKey | None = None
        self.submitted_at = time.monotonic()
        self.adapter = adapter
        self._engine = engine
        self._on_event = on_event

    @property
    def is_done(self) -> bool:
        """Whether no further event will be delivered."""
        return self.is_cancelled or not self.num_unfinished

    def cancel(self) -> None:
        """Stop reading and generating for this request; does nothing if it has ended."""
        self._engine.cancel(self)

    def deliver(self, sample: int, event: TextDelta | Exception) -> None:
        """Pass a text delta, or the error that ends all samples, to the callback."""
        if not self.is_cancelled:
            self._on_event(sample, event)


@dataclass(eq=False)
class _Sequence:
    """One sample of a request, in the queue or in the batch; `num_tokens` counts those of clip and prompt."""

    handle: GenerationHandle
    sample: int
    clip: ClipInputs | ClipFeatures
    prompt: Prompt
    sampling: Sampling
    seed: int
    num_tokens: int
    num_generated: int = 0
    was_delivered: bool = False  # whether the client has received text
    must_run_alone: bool = False  # after it did not fit into memory beside others


class Engine:
    """Answers requests from any number of threads.

    Args:
        captioner: model.
        reader: reader, with at least one worker process, since the files are untrusted.
        max_waiting: maximum number of active samples; further requests raise `Overloaded`.
        batch_size: maximum number of sequences in the batch, at least 1 (default: the model's).
        max_seconds: maximum length of a clip (default: unlimited).
        feature_cache_bytes: maximum size of the features of earlier clips that are kept for further requests.

    Attributes:
        num_answered, num_failed, num_cancelled: numbers of requests so far.
        num_prefills: number of prefills so far, each of one or more prompts.
        failure: type of the error of the last prefill or decode step; None if it succeeded.
    """

    def __init__(
        self,
        captioner: Captioner,
        reader: ClipReader,
        *,
        max_waiting: int = 64,
        batch_size: int | None = None,
        max_seconds: float | None = None,
        feature_cache_bytes: int = 0,
    ) -> None:
        self.captioner = captioner
        self.reader = reader
        self.max_waiting = max_waiting
        self.batch_size = captioner.processor.config.batch_size if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.max_seconds = max_seconds
        self._cache = ClipCache(feature_cache_bytes)
        self.num_answered = self.num_failed = self.num_cancelled = self.num_prefills = 0
        self.failure: str | None = None
        self._changed = threading.Condition()  # guards the three below
        self._active: set[GenerationHandle] = set()
        self._queue: list[_Sequence] = []
        self._is_closing = False
        self._is_aborted = threading.Event()
        # Used by the model thread alone.
        self._weights = MergedAdapter(captioner.network)
        self._batch = captioner.streaming_generator()
        self._running: dict[int, _Sequence] = {}  # by row number of the batch
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def num_active(self) -> int:
        """Number of samples that are being read for, queued or generated."""
        with self._changed:
            return sum(handle.num_samples for handle in self._active)

    @property
    def num_waiting(self) -> int:
        """Number of samples in the queue, whose files are read."""
        with self._changed:
            return len(self._queue)

    def stream(self, request: CaptionRequest) -> Iterator[TextDelta]:
        """Yield the text deltas of a request for one sample; closing the iterator cancels the request.

        The last delta holds the completion.

        Raises:
            Overloaded: too many requests are active.
            ClipError: the file cannot be read.
            ValueError: the prompt contains a special token, or is too long.
            ModelFailedError: the model failed.
        """
        events: queue.SimpleQueue[TextDelta | Exception] = queue.SimpleQueue()
        handle = self.submit(request, on_event=lambda _, event: events.put(event))
        try:
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.completion is not None:
                    return
        finally:
            handle.cancel()

    def submit(self, request: CaptionRequest, *, on_event: OnEvent, adapter: Adapter | None = None) -> GenerationHandle:
        """Start a request without waiting for it.

        Args:
            request: request; its file is read and prefilled once for all its samples.
            on_event: called in other threads with (number of the sample, text delta). The last delta of each sample
                holds the completion; an error ends all unfinished samples, and is the last event.
            adapter: adapter to answer with; requests with another one wait until the batch is empty.

        Raises:
            Overloaded: too many requests are active.
            ValueError: the prompt contains a special token, or is too long; or the JSON schema cannot be used.
        """
        prompt = self.captioner.resolve_prompt(request)
        self.captioner.processor.check_prompt(prompt)
        if request.sampling and request.sampling.json_schema is not None:
            self.captioner.processor.json_grammars.check(request.sampling.json_schema)
        read_spec = self._limit_duration(self.captioner.read_spec(request))
        handle = GenerationHandle(self, num_samples=request.num_samples, on_event=on_event, adapter=adapter)
        with self._changed:
            if self._is_closing:
                raise Overloaded(SHUTTING_DOWN)
            if (num_active := self.num_active) + request.num_samples > self.max_waiting:
                raise Overloaded(
                    f"too many requests ({num_active} answers are queued or being generated); try again later"
                )
            self._active.add(handle)

        handle.cache_key = self._cache.key(request.path, read_spec)
        try:
            # Not under our lock: the reader has a lock of its own, and calls back when another engine closes it.
            handle.reading = self._read(request.path, read_spec, prompt, cached=self._cache.get(handle.cache_key))
        except RuntimeError as error:  # the reader was closed in the meantime
            with self._changed:
                self._remove(handle)
            raise Overloaded(SHUTTING_DOWN) from error
        handle.reading.add_done_callback(partial(self._enqueue, handle, request, prompt))
        return handle

    def _read(
        self, path: Path, read_spec: ReadSpec, prompt: Prompt, *, cached: ClipFeatures | None
    ) -> Future[tuple[ClipInputs | ClipFeatures, int]]:
        """Start reading a clip and counting the tokens of clip and prompt; a cached clip need not be read."""
        processor = self.captioner.processor

        def prepare(clip: Clip) -> tuple[ClipInputs | ClipFeatures, int]:
            inputs = processor.clip_inputs(clip)
            return inputs, processor.count_tokens(inputs, prompt)

        if cached is None:
            return self.reader.submit(path, read_spec, prepare)
        reading: Future[tuple[ClipInputs | ClipFeatures, int]] = Future()
        reading.set_result((cached, processor.count_tokens(cached, prompt)))
        return reading

    def _limit_duration(self, read_spec: ReadSpec) -> ReadSpec:
        return (
            read_spec if self.max_seconds is None else LimitedReadSpec(**vars(read_spec), max_seconds=self.max_seconds)
        )

    def cancel(self, handle: GenerationHandle) -> None:
        """See `GenerationHandle.cancel`."""
        with self._changed:
            if handle.is_done:
                return
            handle.is_cancelled = True
            self.num_cancelled += 1
            if handle.reading is not None and (handle.reading.cancel() or handle.reading.done()):
                self._remove(handle)
        if handle.reading is not None:  # not under our lock: the reader has its own
            self.reader.cancel(handle.reading)

    def stop(self) -> None:
        """Accept no further requests."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def close(self, *, grace_seconds: float = 30.0) -> None:
        """Shut down: accept no further requests, finish the active ones within the grace period, abort the rest."""
        self.stop()
        self._thread.join(grace_seconds)
        self._is_aborted.set()
        self.stop()
        self.reader.close()
        self._thread.join(_ABORT_SECONDS)
        with self._changed:
            remaining = list(self._active)
        for handle in remaining:
            self._fail(handle, Overloaded(SHUTTING_DOWN))

    def _enqueue(
        self,
        handle: GenerationHandle,
        request: CaptionRequest,
        prompt: Prompt,
        reading: "Future[tuple[ClipInputs | ClipFeatures, int]]",
    ) -> None:
        """Put the sequences of a request whose file is read into the queue."""
        handle.reading_seconds = time.monotonic() - handle.submitted_at
        if handle.is_cancelled:
            with self._changed:
                self._remove(handle)
            return
        if reading.cancelled() or self._is_aborted.is_set():  # closing killed the worker; the file is not to blame
            self._fail(handle, Overloaded(SHUTTING_DOWN))
            return
        error = reading.exception()
        if isinstance(error, ValueError):
            self._fail(handle, error)
            return
        if error is not None:
            logger.error("a file could not be prepared", exc_info=error)
            self._fail(
                handle,
                ModelFailedError(f"the file could not be prepared ({type(error).__name__}); see the server's log"),
            )
            return
        clip, handle.num_prompt_tokens = reading.result()
        sampling = request.sampling or self.captioner.default_sampling()
        with self._changed:
            self._queue += [
                _Sequence(handle, sample, clip, prompt, sampling, request.seed + sample, handle.num_prompt_tokens)
                for sample in range(request.num_samples)
            ]
            self._changed.notify_all()

    def _remove(self, handle: GenerationHandle) -> None:
        self._active.discard(handle)
        self._changed.notify_all()

    def _fail(self, handle: GenerationHandle, error: Exception) -> None:
        """End the unfinished samples of a request with an error."""
        with self._changed:
            if not handle.num_unfinished:
                return
            self.num_failed += not handle.is_cancelled
            handle.num_unfinished = 0
            self._remove(handle)
        handle.deliver(0, error)

    def _fail_all(self, sequences: Sequence[_Sequence], error: Exception) -> None:
        for sequence in sequences:
            if not sequence.handle.is_done:
                self._fail(sequence.handle, error)

    # The methods below run in the model thread.

    def _run(self) -> None:
        while (admitted := self._admit()) or self._running:
            if admitted:
                self._prefill(admitted)
            if self._running:
                self._decode_step()

    def _admit(self) -> list[_Sequence]:
        """Take sequences to prefill from the queue; if the batch is empty, wait for some. Returns none at the end."""
        with self._changed:
            while not self._is_aborted.is_set():
                self._queue = [sequence for sequence in self._queue if not sequence.handle.is_done]
                if self._queue or self._running:
                    admitted = self._schedule() if self._queue else []
                    self._queue = [sequence for sequence in self._queue if sequence not in admitted]
                    return admitted
                if self._is_closing and not self._active:
                    break
                self._changed.wait()
        return []

    def _schedule(self) -> list[_Sequence]:
        """Choose sequences of the queue for the next prefill: the oldest, and others with its sampling parameters.

        They must fit into the batch. While others are decoding, which a prefill interrupts, no more are chosen than one
        prefill chunk takes. All samples of a request are admitted together, since they share their prefix.
        """
        first, admitted, num_tokens = self._queue[0], list[_Sequence](), 0
        if first.must_run_alone or any(sequence.must_run_alone for sequence in self._running.values()):
            return [] if self._running else [first]
        adapter = first.handle.adapter
        if self._running and adapter is not self._weights.current:
            return []
        num_free = self.batch_size - len(self._running)
        compatible = (one for one in self._queue if one.sampling == first.sampling and one.handle.adapter is adapter)
        for _, group in groupby(compatible, key=lambda sequence: id(sequence.handle)):
            samples = list(group)
            num_tokens += samples[0].num_tokens
            is_too_long = bool(self._running and admitted) and num_tokens > self.captioner.network.prefill_chunk_tokens
            # A request with more samples than the batch size is admitted in parts, when the batch is empty.
            num_needed = min(len(samples), self.batch_size)
            is_too_wide = bool(self._running or admitted) and num_needed > num_free - len(admitted)
            if is_too_long or is_too_wide:
                break
            admitted += samples[: num_free - len(admitted)]
        return admitted

    def _prefill(self, admitted: Sequence[_Sequence]) -> None:
        """Prefill the prompts of sequences and add them to the batch."""

        def prefill() -> None:
            self._weights.use(admitted[0].handle.adapter)  # changes them only while nothing else is in the batch
            self._encode(admitted)
            rows = self._batch.add(
                [sequence.clip for sequence in admitted],
                [sequence.prompt for sequence in admitted],
                sampling=admitted[0].sampling,
                seeds=[sequence.seed for sequence in admitted],
            )
            self._running |= dict(zip(rows, admitted, strict=True))

        self.num_prefills += 1
        if not self._running:  # a new batch, so that nothing of the previous sequences stays in memory
            self._batch = self.captioner.streaming_generator()
        is_alone = len(admitted) == 1 and not self._running
        if self._attempt(prefill, admitted) == "out of memory":
            self._retry_one_by_one(admitted, is_alone=is_alone)

    def _encode(self, admitted: Sequence[_Sequence]) -> None:
        """Encode the clips of sequences and cache their features; without a cache, prefilling encodes them."""
        unread = {id(one.clip): one.clip for one in admitted if isinstance(one.clip, ClipInputs)}
        if not self._cache.max_bytes or not unread:
            return
        features = dict(zip(unread, self.captioner.encode(list(unread.values())), strict=True))
        for sequence in admitted:
            sequence.clip = features.get(id(sequence.clip), sequence.clip)
            if sequence.handle.cache_key and isinstance(sequence.clip, ClipFeatures):
                self._cache.put(sequence.handle.cache_key, sequence.clip)

    def _decode_step(self) -> None:
        """Evict cancelled sequences, generate one token for each of the others, and deliver the new text."""
        cancelled = {row for row, sequence in self._running.items() if sequence.handle.is_done}
        self._running = {row: sequence for row, sequence in self._running.items() if row not in cancelled}
        sequences = list(self._running.values())
        if self._is_aborted.is_set():
            self._running = {}
            self._fail_all(sequences, Overloaded(SHUTTING_DOWN))
            return
        outcome = self._attempt(lambda: self._postprocess(self._batch.step(cancelled)), sequences)
        if outcome != "done":
            self._running, self._batch = {}, self.captioner.streaming_generator()  # frees the KV cache
        if outcome == "out of memory":
            self._retry_one_by_one(sequences, is_alone=len(sequences) == 1)

    def _attempt(
        self, work: Callable[[], object], sequences: Sequence[_Sequence]
    ) -> Literal["done", "failed", "out of memory"]:
        """Run work of the model; an error other than out of memory ends the sequences.

        The traceback, which holds tensors, is freed on return.
        """
        try:
            work()
        except torch.OutOfMemoryError as error:
            # As text, since a log handler may keep its arguments.
            logger.warning("out of memory with %d sequences: %s", len(sequences), str(error))
            return "out of memory"
        except Exception as error:
            logger.exception("the model failed")
            self.failure = type(error).__name__  # its message may reveal details of this machine
            self._fail_all(sequences, ModelFailedError(f"the model failed ({self.failure}); see the server's log"))
            return "failed"
        return "done"

    def _retry_one_by_one(self, sequences: Sequence[_Sequence], *, is_alone: bool) -> None:
        """Requeue sequences that do not fit into memory together, to run alone; fail those for which that is no use."""
        if is_alone:
            self._fail_all(sequences, ValueError(f"the clip {OUT_OF_MEMORY}"))
            return
        # Text that was delivered cannot be taken back.
        delivered = [sequence for sequence in sequences if sequence.was_delivered]
        self._fail_all(delivered, OutOfMemoryDuringBatch("the GPU ran out of memory; try again later"))
        retried = [sequence for sequence in sequences if not sequence.handle.is_done]
        for sequence in retried:
            sequence.must_run_alone = True
            sequence.handle.num_completion_tokens -= sequence.num_generated
            sequence.num_generated = 0
        with self._changed:
            self._queue = [*retried, *self._queue]

    def _postprocess(self, deltas: dict[int, TextDelta]) -> None:
        """Count the tokens of a decode step, deliver its text, and remove sequences that have ended."""
        for sequence in self._running.values():
            sequence.num_generated += 1
            sequence.handle.num_completion_tokens += 1
            if sequence.num_generated == 1:  # only a first token shows that a prefill succeeded
                self.failure = None
        for row, delta in deltas.items():
            sequence = self._running[row]
            handle, has_ended = sequence.handle, delta.completion is not None
            if has_ended:
                del self._running[row]
            with self._changed:
                if handle.is_done:
                    continue
                handle.num_unfinished -= has_ended
                if not handle.num_unfinished:
                    self.num_answered += 1
                    self._remove(handle)
            sequence.was_delivered = True
            handle.deliver(sequence.sample, delta)
