"""Inference engine with continuous batching: any number of requests share one model.

The life of a request:
1. `submit` checks it, counts it as active, and hands its file to the worker processes of the reader, unless the
   features of that clip are cached.
2. Once the file is read, one sequence for each sample of the request enters the queue.
3. The model thread admits sequences from the queue and prefills their prompts, which adds them to the batch. On a GPU,
   clips are encoded before that, while others are decoded.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.clip_cache import ClipCache, ClipKey
from salmonn.caption.encode_ahead import make_encoder
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ClipReader
from salmonn.caption.prompt import Prompt
from salmonn.caption.read_spec import LimitedReadSpec, ReadSpec
from salmonn.caption.scheduler import OUT_OF_MEMORY, ScheduledSequence, Scheduler, memory_error
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


@dataclass(eq=False, kw_only=True)
class _Sequence(ScheduledSequence):
    """One sample of a request; its group is the request's handle."""

    handle: GenerationHandle
    sample: int
    was_delivered: bool = False  # whether the client has received text


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
        self.max_seconds = max_seconds
        self._cache = ClipCache(feature_cache_bytes)
        self.num_answered = self.num_failed = self.num_cancelled = 0
        self.failure: str | None = None
        self._changed = threading.Condition()  # guards the two below, and the queue of the scheduler
        self._active: set[GenerationHandle] = set()
        self._is_closing = False
        self._is_aborted = threading.Event()
        # Except for the queue of the scheduler, used by the model thread alone.
        self._weights = MergedAdapter(captioner.network)
        self._scheduler = Scheduler[_Sequence](captioner.streaming_generator, limits=captioner.limits(batch_size))
        self._encoder = make_encoder(captioner)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def num_prefills(self) -> int:
        """Number of prefills so far, each of one or more prompts."""
        return self._scheduler.num_prefills

    @property
    def num_active(self) -> int:
        """Number of samples that are being read for, queued or generated."""
        with self._changed:
            return sum(handle.num_samples for handle in self._active)

    @property
    def num_waiting(self) -> int:
        """Number of samples in the queue, whose files are read."""
        with self._changed:
            return len(self._scheduler.waiting)

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
        read_spec = self._read_spec(request)
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
            # Not under our lock: the reader has its own lock, and calls back when another engine closes it.
            handle.reading = self._read(request.path, read_spec, prompt, cached=self._cache.get(handle.cache_key))
        except RuntimeError as error:  # the reader was closed in the meantime
            with self._changed:
                self._remove(handle)
            raise Overloaded(SHUTTING_DOWN) from error
        handle.reading.add_done_callback(partial(self._enqueue, handle, request, prompt))
        return handle

    def read(self, request: CaptionRequest) -> ClipInputs | ClipFeatures:
        """Wait for the clip of a request to be read, and return it; if its features are cached, these.

        Raises:
            ClipError: the file cannot be read.
            ValueError: the frames cannot be sampled as the request asks.
            RuntimeError: the reader is closed.
        """
        read_spec = self._read_spec(request)
        if (cached := self._cache.get(self._cache.key(request.path, read_spec))) is not None:
            return cached
        return self.reader.submit(request.path, read_spec, self.captioner.prepare).result()

    def _read_spec(self, request: CaptionRequest) -> ReadSpec:
        """Return what is read of a request's file, with the limit of its duration."""
        read_spec = self.captioner.read_spec(request)
        if self.max_seconds is None:
            return read_spec
        return LimitedReadSpec(**vars(read_spec), max_seconds=self.max_seconds)

    def _read(
        self, path: Path, read_spec: ReadSpec, prompt: Prompt, *, cached: ClipFeatures | None
    ) -> Future[tuple[ClipInputs | ClipFeatures, int]]:
        """Start reading a clip and counting the tokens of clip and prompt; a cached clip need not be read."""
        processor = self.captioner.processor

        def prepare(clip: Clip) -> tuple[ClipInputs | ClipFeatures, int]:
            inputs = self.captioner.prepare(clip)
            return inputs, processor.count_tokens(inputs, prompt)

        if cached is None:
            return self.reader.submit(path, read_spec, prepare)
        reading: Future[tuple[ClipInputs | ClipFeatures, int]] = Future()
        reading.set_result((cached, processor.count_tokens(cached, prompt)))
        return reading

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
            self._scheduler.waiting += [
                _Sequence(
                    group=handle,
                    clip=clip,
                    prompt=prompt,
                    sampling=sampling,
                    seed=request.seed + sample,
                    num_tokens=handle.num_prompt_tokens,
                    weights=handle.adapter,
                    handle=handle,
                    sample=sample,
                )
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
        while (admitted := self._admit()) or self._scheduler.running:
            if admitted:
                self._prefill(admitted)
            if self._scheduler.running:
                self._decode_step()
        if self._encoder:
            self._encoder.close()

    def _admit(self) -> list[_Sequence]:
        """Take sequences to prefill from the queue; if the batch is empty, wait for some. Returns none at the end."""
        scheduler = self._scheduler
        with self._changed:
            while not self._is_aborted.is_set():
                scheduler.waiting = [sequence for sequence in scheduler.waiting if not sequence.handle.is_done]
                if scheduler.waiting or scheduler.running:
                    return self._admit_encoded()
                if self._is_closing and not self._active:
                    break
                self._changed.wait()
        return []

    def _admit_encoded(self) -> list[_Sequence]:
        """Admit sequences whose clips are encoded, if an encoder does that ahead; if the batch is empty, any others."""
        scheduler, encoder, waiting = self._scheduler, self._encoder, self._scheduler.waiting
        if encoder:
            encoder.start_first(one.clip for one in waiting if not one.must_run_alone)
            if scheduler.limits.reserved_bytes != encoder.reserved_bytes:
                scheduler.limits = replace(scheduler.limits, reserved_bytes=encoder.reserved_bytes)
            if scheduler.running:
                scheduler.waiting = [one for one in waiting if one.must_run_alone or encoder.is_ready(one.clip)]
        admitted = scheduler.admit(chunk_tokens=self.captioner.network.prefill_chunk_tokens)
        scheduler.waiting = [one for one in waiting if one not in admitted]
        return admitted

    def _prefill(self, admitted: Sequence[_Sequence]) -> None:
        """Prefill the prompts of sequences and add them to the batch."""

        def prefill() -> None:
            self._weights.use(admitted[0].handle.adapter)  # changes them only while nothing else is in the batch
            self._encode(admitted)
            self._scheduler.prefill(admitted)

        is_alone = len(admitted) == 1 and not self._scheduler.running
        if self._attempt(prefill, admitted) == "out of memory":
            self._retry_one_by_one(admitted, is_alone=is_alone)

    def _encode(self, admitted: Sequence[_Sequence]) -> None:
        """Encode the clips of sequences and cache their features; without a cache on a CPU, prefilling encodes them."""
        unread = {id(one.clip): one for one in admitted if isinstance(one.clip, ClipInputs)}
        encoder, clips = self._encoder, [one.clip for one in unread.values() if isinstance(one.clip, ClipInputs)]
        features: list[ClipInputs | ClipFeatures] = []
        if encoder and not admitted[0].must_run_alone:
            for clip in clips:
                encoder.start(clip)
            features += [encoder.take(clip) for clip in clips]
            is_alone = not self._scheduler.running and len({id(one.clip) for one in admitted}) == 1
            if not is_alone and any(isinstance(one, ClipInputs) for one in features):
                raise torch.OutOfMemoryError("a clip could not be encoded while others were decoded")
        elif self._cache.max_bytes:
            features += self.captioner.encode(clips)
        by_clip = dict(zip(unread, features, strict=False))
        for key, encoded in by_clip.items():
            if (cache_key := unread[key].handle.cache_key) and isinstance(encoded, ClipFeatures):
                store = partial(self._cache.put, cache_key)
                if encoder and encoded.tokens.is_cuda:
                    encoder.copy_to_host(encoded, store)
                else:
                    store(encoded)
        for sequence in admitted:
            sequence.clip = by_clip.get(id(sequence.clip), sequence.clip)

    def _decode_step(self) -> None:
        """Evict cancelled sequences, generate one token for each of the others, and deliver the new text."""
        scheduler = self._scheduler
        scheduler.cancel([sequence for sequence in scheduler.running.values() if sequence.handle.is_done])
        sequences = list(scheduler.running.values())
        if self._is_aborted.is_set():
            scheduler.clear()
            self._fail_all(sequences, Overloaded(SHUTTING_DOWN))
            return
        outcome = self._attempt(lambda: self._postprocess(sequences, scheduler.step()), sequences)
        if outcome != "done":
            scheduler.clear()
        if outcome == "out of memory":
            self._retry_one_by_one(sequences, is_alone=len(sequences) == 1)

    def _attempt(
        self, work: Callable[[], object], sequences: Sequence[_Sequence]
    ) -> Literal["done", "failed", "out of memory"]:
        """Run work of the model; an error other than out of memory ends the sequences."""
        try:
            return "out of memory" if memory_error(work, num_rows=len(sequences)) else "done"
        except Exception as error:
            logger.exception("the model failed")
            self.failure = type(error).__name__  # its message may reveal details of this machine
            self._fail_all(sequences, ModelFailedError(f"the model failed ({self.failure}); see the server's log"))
            return "failed"

    def _retry_one_by_one(self, sequences: Sequence[_Sequence], *, is_alone: bool) -> None:
        """Requeue sequences that do not fit into memory together, to run alone; fail one that already did."""
        if is_alone:
            self._fail_all(sequences, ValueError(f"the clip {OUT_OF_MEMORY}"))
            return
        # Text that was delivered cannot be taken back.
        delivered = [sequence for sequence in sequences if sequence.was_delivered]
        self._fail_all(delivered, OutOfMemoryDuringBatch("the GPU ran out of memory; try again later"))
        retried = [sequence for sequence in sequences if not sequence.handle.is_done]
        for sequence in retried:
            sequence.handle.num_completion_tokens -= sequence.num_generated
        with self._changed:
            self._scheduler.retry_alone(retried)

    def _postprocess(self, sequences: Sequence[_Sequence], deltas: Sequence[tuple[_Sequence, TextDelta]]) -> None:
        """Count the tokens of a decode step, and deliver its text."""
        for sequence in sequences:
            sequence.handle.num_completion_tokens += 1
            if sequence.num_generated == 1:  # only a first token shows that a prefill succeeded
                self.failure = None
        for sequence, delta in deltas:
            handle = sequence.handle
            with self._changed:
                if handle.is_done:
                    continue
                handle.num_unfinished -= delta.completion is not None
                if not handle.num_unfinished:
                    self.num_answered += 1
                    self._remove(handle)
            sequence.was_delivered = True
            handle.deliver(sequence.sample, delta)
