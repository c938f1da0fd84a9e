"""Caption through an OpenAI-compatible server (vLLM, SGLang, a hosted API, `salmonn serve`): one more generator.

1. A worker process reads the file, with its limits; what cannot be read fails here, and costs no request.
2. A thread encodes the clip (`server_messages.py`) and sends it, retrying as the judge's client does.
3. The answer becomes a `Caption`, or the reason why there is none a `Failure`. The number of concurrent requests adapts
   to the server (`adaptive_limit.py`).

The API key never leaves the client: captions and job files have the model's name alone.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from salmonn.caption.adaptive_limit import AdaptiveLimit
from salmonn.caption.generator import (
    CaptionRequest,
    Sampling,
    SegmentResult,
    Span,
    to_failure,
)
from salmonn.caption.in_flight import AnswerError, DeferredInterrupt, InFlight, next_in_thread
from salmonn.caption.loader import ClipJob, ClipReader, ReadResult
from salmonn.caption.read_spec import ReadSpec
from salmonn.caption.segments import BoundsStore, FixedSegments, SegmentRule
from salmonn.caption.server_messages import DEFAULT_PROMPTS, EncodedClip, encode_clip, to_messages
from salmonn.caption.server_options import KEY_FLAG, ServerInput, ServerOptions
from salmonn.caption.shape import Shape, shape_captions
from salmonn.media.clip import Clip
from salmonn.media.frame_sampling import FrameOptions, FrameSampler, UniformSampler
from salmonn.records import Caption, Failure, Modality
from salmonn.score.budget import Budget
from salmonn.score.chat_client import ChatClient, LLMStoppedError, SpendCapError
from salmonn.score.llm_protocol import ChatRequest, ChatResponse, Choice

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_TOKENS = 1024
# One frame per second, in its own size up to a maximum. Of a file that is sent as a whole, audio and damage are read.
_SAMPLER = UniformSampler(interval_seconds=1.0, min_frames=8, max_frames=64, budget_fraction=0.0, factor=1)
_ONE_FRAME = replace(_SAMPLER, min_frames=1, max_frames=1)
_CUT_REASONS = ("length", "content_filter")


class ServerCaptioner:
    """Captioner on an OpenAI-compatible server; `connect_captioner` makes one that has been tested.

    Args:
        options: server and limits.
        reader: decoder of video frames, see `read_clip`.
        budget: what all servers of a run may spend together; None for the caps of `options`, for this one alone.

    Attributes:
        input: what the server is sent.
        is_own: whether the server is `salmonn serve`, which takes spans and modalities and returns warnings.
        sampler: rule that chooses the frames to send; none for one frame a second.
        accepts_empty: whether an empty answer is a caption, as it is where a model is sampled for training.

    Raises:
        ValueError: the server's API key is not set.
    """

    def __init__(self, options: ServerOptions, *, reader: str = "pyav", budget: Budget | None = None) -> None:
        self.options, self._reader = options, reader
        self.client = ChatClient(
            options.llm_config(),
            saved="Finished captions are saved",
            budget=budget or options.budget(),
            key_flag=KEY_FLAG,
        )
        self.name = self.client.name
        self.input: ServerInput = "frames" if options.server_input == "auto" else options.server_input
        self.is_own = False
        self.sampler: FrameSampler | None = None
        self.accepts_empty = False
        self._limit = AdaptiveLimit(options.concurrency)
        self.client.on_retry = lambda error: self._limit.back_off()

    def default_sampling(self) -> Sampling:
        """Return greedy decoding of up to 1,024 tokens."""
        return Sampling(max_new_tokens=DEFAULT_TOKENS)

    def generate(self, requests: Sequence[CaptionRequest]) -> list[list[Caption]]:
        """Return `num_samples` captions for each request; a file that occurs several times is read once.

        Raises:
            ClipError: a file cannot be read.
            LLMRejectedError: the server rejects a request.
            AnswerError: an answer has no caption.
            LLMStoppedError: no further request is possible.
        """
        keys = [(request.path, self.read_spec(request)) for request in requests]
        last_uses = {key: number for number, key in enumerate(keys)}
        encoded: dict[tuple[Path, ReadSpec], EncodedClip] = {}
        futures: list[Future[list[Caption]]] = []
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            for number, (request, key) in enumerate(zip(requests, keys, strict=True)):
                if key not in encoded:
                    encoded[key] = self._encode(key[1].read(request.path))
                if number >= self.options.concurrency:  # few clips are held at a time
                    futures[number - self.options.concurrency].result()
                futures.append(pool.submit(self._caption, request, encoded[key]))
                if last_uses[key] == number:
                    del encoded[key]
            return [future.result() for future in futures]

    def caption_batches(
        self,
        requests: Iterable[CaptionRequest],
        *,
        segments: SegmentRule | None = None,
        store: BoundsStore | None = None,
        batch_size: int | None = None,
        reader: ClipReader | None = None,
        shape: Shape | None = None,
    ) -> Iterator[list[SegmentResult]]:
        """See `Captioner.caption_batches`; results come as the server answers, and `batch_size` has no effect.

        Replies to requests in flight are still returned after Ctrl-C, a spend cap, or another error that ends the run.
        Ctrl-C between two results takes effect when the next one is requested, a second Ctrl-C at once; see
        `DeferredInterrupt`.

        Raises:
            LLMStoppedError: no further request is possible.
            KeyboardInterrupt: Ctrl-C was pressed, and all replies in flight have been returned.
        """
        if segments is not None and segments != FixedSegments(math.inf):
            self._require_frames("segments")
        caption = partial(self._caption_one, shape=shape)
        jobs = (ClipJob(index, request, self.read_spec(request, shape)) for index, request in enumerate(requests))
        for job, result in self._answer_each(jobs, caption, segments=segments, store=store, reader=reader):
            yield [SegmentResult(job.index, job.num_segments, result)]

    def generate_each(
        self, requests: Iterable[CaptionRequest], *, reader: ClipReader | None = None
    ) -> Iterator[tuple[int, list[Caption] | Failure]]:
        """Yield the index of each request and its `num_samples` captions, as the server answers; see `caption_batches`.

        Raises:
            LLMStoppedError: no further request is possible.
        """
        jobs = (ClipJob(index, request, self.read_spec(request)) for index, request in enumerate(requests))
        for job, result in self._answer_each(jobs, lambda job, clip: self._caption(job.request, clip), reader=reader):
            yield job.index, result

    def _answer_each(
        self,
        jobs: Iterable[ClipJob],
        answer: Callable[[ClipJob, EncodedClip], T],
        *,
        segments: SegmentRule | None = None,
        store: BoundsStore | None = None,
        reader: ClipReader | None = None,
    ) -> Iterator[tuple[ClipJob, T | Failure]]:
        """Read clips, send them, and yield the answers; see `caption_batches`."""
        with ExitStack() as stack:
            interrupt = stack.enter_context(DeferredInterrupt())
            reader = reader or stack.enter_context(ClipReader(workers=0))
            pool = ThreadPoolExecutor(self.options.concurrency)
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            in_flight = InFlight(pool, answer, interrupt=interrupt)
            batches = reader.batches(iter(jobs), size=1, finish=self._encode, segments=segments, store=store)
            try:
                yield from self._send_all(batches, in_flight)
            except LLMStoppedError as error:
                yield from self._stop(in_flight)
                # A request in flight may show that a spend cap is not the real problem.
                causes = [one for one in in_flight.errors if not isinstance(one, SpendCapError) and one.__cause__]
                raise (causes[0] if causes and isinstance(error, SpendCapError) else error) from None
            yield from self._stop(in_flight)  # after Ctrl-C; otherwise all have been answered

    def _send_all(
        self, batches: Iterator[list[ReadResult[EncodedClip]]], in_flight: InFlight[T]
    ) -> Iterator[tuple[ClipJob, T | Failure]]:
        """Send clips as they are read, as many at once as the limit allows, until Ctrl-C; raises an LLMStoppedError.

        Clips are taken in a thread, since the next one may be long in coming: results do not wait for it.
        """
        reading: Future[list[ReadResult[EncodedClip]] | None] | None = next_in_thread(batches)
        while not in_flight.interrupt.is_set and (reading is not None or in_flight.jobs):
            may_send = reading is not None and len(in_flight.jobs) < self._limit.limit
            in_flight.wait(reading if may_send else None)
            if in_flight.has_completed:
                yield from in_flight.take()
                in_flight.raise_error()
                continue
            if reading is None or not may_send or not reading.done() or in_flight.interrupt.is_set:
                continue
            if (batch := reading.result()) is None:
                reading = None
                continue
            ((job, clip),) = batch
            reading = next_in_thread(batches)
            if isinstance(clip, ValueError):
                yield job, to_failure(job.request, str(clip), stage="read")
            else:
                in_flight.submit(job, clip)

    def _stop(self, in_flight: InFlight[T]) -> Iterator[tuple[ClipJob, T | Failure]]:
        """Yield the answers to the requests in flight, and send no further one meanwhile."""
        if in_flight.jobs:
            self.client.stop()
        is_announced = False
        while in_flight.jobs:
            if in_flight.interrupt.is_set and not is_announced:
                logger.warning("waiting for replies in flight, which will be saved (Ctrl-C again drops them)")
                is_announced = True
            yield from in_flight.take()

    def _caption_one(self, job: ClipJob, clip: EncodedClip, *, shape: Shape | None = None) -> Caption:
        # A segment is cut as it was read: the last one is open.
        span = (job.read_spec.start_seconds, job.read_spec.end_seconds)
        if shape is None:
            (caption,) = self._caption(job.request, clip, span=span)
            return caption

        def answer(asked: Sequence[tuple[int, CaptionRequest]]) -> list[Caption | str]:
            return [self._caption(request, clip, span=span)[0] for _, request in asked]

        default = "" if self.is_own else DEFAULT_PROMPTS[clip.modality]
        request = replace(job.request, prompt=job.request.prompt or default)
        (shaped,) = shape_captions(shape, [(request, clip.seconds)], answer=answer)
        if isinstance(shaped, str):
            raise AnswerError(shaped)
        return shaped

    def read_spec(self, request: CaptionRequest, shape: Shape | None = None) -> ReadSpec:
        """Return what is read of a request's file; raises a ValueError if the server cannot be asked about it."""
        if self.is_own and not request.prompt and _adds_to_prompt(request, shape):
            raise ValueError(
                "`salmonn serve` does not list its model's own prompt, to which a transcript or the requested length, "
                "words or language would be added; pass the whole prompt with --prompt"
            )
        if request.span != Span() or request.frames or request.modality != "both":
            self._require_frames("spans, modalities and numbers of frames")
        span = request.span
        return ReadSpec(
            self._frame_sampler(request.frames) if self.input == "frames" else _ONE_FRAME,
            span.start_seconds,
            span.end_seconds,
            video=request.modality != "audio",
            audio=request.modality != "visual",
            reader=self._reader,
        )

    def _frame_sampler(self, options: FrameOptions | None) -> FrameSampler:
        """Return the rule that chooses the frames to send; raises a ValueError if it cannot follow the options."""
        if self.sampler:
            return self.sampler.with_options(options) if options else self.sampler
        sampler = replace(_SAMPLER, max_pixels=self.options.server_max_pixels)
        if options is None:
            return sampler
        return replace(sampler, max_frames=max(options.num_frames or 0, sampler.max_frames)).with_options(options)

    def _require_frames(self, what: str) -> None:
        """Raise a ValueError if the server is sent whole files, since it cannot read a part of one."""
        if self.input != "frames" and not self.is_own:
            raise ValueError(f"--server-input {self.input} sends whole files, without {what}; use frames")

    def _encode(self, clip: Clip) -> EncodedClip:
        return encode_clip(
            clip,
            server_input=self.input,
            frame_format=self.options.server_frame_format,
            is_file_only=self.is_own,
        )

    def _caption(
        self,
        request: CaptionRequest,
        clip: EncodedClip,
        *,
        span: tuple[float | None, float | None] | None = None,
    ) -> list[Caption]:
        """Return the captions of a request; a server that sends fewer than asked for is asked again."""
        span = (request.span.start_seconds, request.span.end_seconds) if span is None else span
        if request.speech is not None:
            prompt = request.with_context(request.prompt or DEFAULT_PROMPTS[clip.modality])
            request = replace(request, prompt=prompt, speech=None)
        whole = self._to_chat_request(request, clip, span=span)
        captions: list[Caption] = []
        while len(captions) < request.num_samples:
            number = len(captions)
            chat = whole
            if number:
                seed = None if whole.seed is None else whole.seed + number
                chat = replace(whole, seed=seed, num_choices=1)
            response = self._send(chat)
            captions += [
                self._to_caption(request, clip, response, choice, sample=number + index)
                for index, choice in enumerate(response.choices[: request.num_samples - number])
            ]
        return captions

    def _send(self, chat: ChatRequest) -> ChatResponse:
        ticket = self._limit.start()
        try:
            response = self.client.send(chat)
        except BaseException:
            self._limit.abandon(ticket)
            raise
        self._limit.finish(ticket, work=response.num_tokens or 1.0)
        return response

    def _to_chat_request(
        self, request: CaptionRequest, clip: EncodedClip, *, span: tuple[float | None, float | None]
    ) -> ChatRequest:
        sampling = request.sampling or self.default_sampling()
        parameters = dict(self.options.server_parameters or {})
        if sampling.temperature:
            parameters["top_p"] = sampling.top_p
        if sampling.stop:
            parameters["stop"] = list(sampling.stop)
        if sampling.repetition_penalty is not None:
            parameters["repetition_penalty"] = sampling.repetition_penalty
        if self.is_own and self.input == "video":
            parameters |= _own_parameters(request, span)
        default = "" if self.is_own else DEFAULT_PROMPTS[clip.modality]
        return ChatRequest(
            to_messages(request, clip, default_prompt=default),
            schema=None if sampling.json_schema is None else json.loads(sampling.json_schema),
            seed=request.seed if sampling.temperature else None,
            seed_limit=None if self.is_own else ChatRequest.seed_limit,  # it samples as the local model does
            temperature=sampling.temperature,
            token_limit=sampling.max_new_tokens,
            num_choices=request.num_samples,
            logprobs=sampling.logprobs,
            parameters=parameters,
        )

    def _to_caption(
        self, request: CaptionRequest, clip: EncodedClip, response: ChatResponse, choice: Choice, *, sample: int
    ) -> Caption:
        if not choice.text.strip() and (choice.instead or not self.accepts_empty):
            what = f"a {choice.instead_kind} ({choice.instead[:200]!r})" if choice.instead else "an empty answer"
            raise AnswerError(f"the server sent {what} instead of a caption (finish_reason {choice.finish_reason})")
        seen = response.clip
        modality: Modality = seen.get("modality") or clip.modality
        default = "" if self.is_own else DEFAULT_PROMPTS[clip.modality]
        return Caption(
            video=str(request.path),
            text=choice.text.strip(),
            prompt=request.prompt or default,
            model=response.model or self.options.server_model or "",
            sample=sample,
            finished=choice.finish_reason not in _CUT_REASONS,
            start_seconds=request.span.start_seconds,
            end_seconds=request.span.end_seconds,
            complete=bool(seen.get("complete", clip.is_complete)),
            modality=modality,
            warnings=tuple(seen.get("warnings", clip.warnings)),
            logprob=None if choice.logprobs is None else sum(choice.logprobs),
            num_tokens=None if choice.logprobs is None else len(choice.logprobs),
        )


def _adds_to_prompt(request: CaptionRequest, shape: Shape | None) -> bool:
    """Return whether something is added to a request's prompt, or to that of a shape without its own prompt."""
    if shape is None:
        return request.speech is not None
    return any(
        request.speech is not None or one.language or (one.refine is None and (one.words or one.include or one.avoid))
        for one in shape.captions.values()
        if not one.prompt
    )


def _own_parameters(request: CaptionRequest, span: tuple[float | None, float | None]) -> dict[str, Any]:
    """Return the parameters that `salmonn serve` has beyond OpenAI's."""
    start, end = span
    parameters: dict[str, Any] = {"start": start or None, "end": end, "modality": request.modality}
    frames = request.frames or FrameOptions()
    names = {"fps": frames.frames_per_second, "num_frames": frames.num_frames, "max_pixels": frames.max_pixels}
    if options := {name: value for name, value in names.items() if value is not None}:
        parameters["mm_processor_kwargs"] = options
    return {name: value for name, value in parameters.items() if value is not None}
