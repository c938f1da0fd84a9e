"""The local captioner: load a model, caption one video or many, stream text, generate batches."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypedDict, Unpack

import torch

import salmonn.caption.auto_processor  # noqa: F401 - registers the processor with transformers
from salmonn.caption.encode_ahead import TimedInputs
from salmonn.caption.folder import caption_clips, caption_in_shape
from salmonn.caption.generator import (
    SHIPPED_MODEL,
    CaptionRequest,
    History,
    Sampling,
    SegmentResult,
    Span,
)
from salmonn.caption.limits import GPU_BATCH_SIZE, BatchLimits, check_batch_size, measure_limits
from salmonn.caption.loader import ClipJob, ClipReader
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import Prompt
from salmonn.caption.read_spec import ReadSpec
from salmonn.caption.scheduler import ScheduledSequence, Scheduler
from salmonn.caption.segments import BoundsStore, SegmentRule
from salmonn.caption.shape import Shape
from salmonn.caption.streaming import Completion, StreamingGenerator
from salmonn.files import atomic_folder
from salmonn.media.clip import Clip
from salmonn.media.frame_sampling import FrameOptions
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.loading import CONFIG_NAME, Placement, load_config, load_network, save_network
from salmonn.model.network import Network
from salmonn.records import Caption, Failure, Modality
from salmonn.speech import SpeechEvent


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `Captioner.caption` and `stream`: the fields of a `CaptionRequest` with one sample."""

    prompt: str | None
    sampling: Sampling | None
    span: Span
    modality: Modality
    seed: int
    history: History
    system: str | None
    frames: FrameOptions | None
    clip_turn: int
    speech: tuple[SpeechEvent, ...] | None
    source: Path | None


@dataclass(eq=False, kw_only=True)
class RequestedSequence(ScheduledSequence):
    """One sample of a request; its group is the clip.

    Args:
        index: number of the request.
        request: request.
        sample: number of the sample.
    """

    index: int
    request: CaptionRequest
    sample: int


class Captioner:
    """A network with its processor: the local implementation of `Generator`.

    Args:
        network: network in evaluation mode, on its device.
        processor: processor of the same model.
        name: folder or hub id of the model, written into each `Caption`.

    Example:
        >>> captioner = Captioner.load(SHIPPED_MODEL)
        >>> captioner.caption("holiday.mp4").text
    """

    def __init__(self, network: Network, processor: Processor, *, name: str = "") -> None:
        self.network = network
        self.processor = processor
        self.name = name

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        placement: Placement | None = None,
        adapter: Path | str | None = None,
        published_positions: bool = False,
        frames: Mapping[str, float] | None = None,
        reader: str = "pyav",
    ) -> "Captioner":
        """Load a model from a folder or the hub: one of this project's, or a published video-SALMONN 2 or 2+.

        Args:
            path: folder or hub id.
            placement: device, dtype, quantization (default: the GPU if there is one).
            adapter: folder or hub id of a PEFT adapter to apply.
            published_positions: see `Processor`.
            frames: overrides of the model's frame sampling; a saved model keeps its own values.
            reader: decoder of video frames, see `read_clip`.

        Raises:
            ValueError: the path holds no such model, or an incomplete one, or the reader is not installed.
        """
        config = load_config(path, frames=frames)
        # The processor first: loading the weights may take minutes, and a tokenizer that does not fit fails at once.
        processor = Processor.load(path, config=config, published_positions=published_positions, reader=reader)
        processor.is_shipped_toy = Path(path).resolve() == SHIPPED_MODEL.resolve()
        network = load_network(path, placement=placement, adapter=adapter)
        return cls(network, processor, name=str(path))

    def save(self, path: Path | str) -> None:
        """Write network, config and tokenizer to a folder that `load` reads; config.json is written last."""
        half = Path(path) / ".half"
        shutil.rmtree(half, ignore_errors=True)  # from a process that was killed
        with atomic_folder(half) as folder:
            self.processor.save(folder)
            save_network(self.network, folder)
        publish_half(half)

    def caption(self, path: Path | str, **options: Unpack[RequestOptions]) -> Caption:
        """Describe one video, or answer any prompt about it.

        Args:
            path: video or audio file.
            **options: fields of `CaptionRequest`.

        Raises:
            ClipError: the file cannot be read, or lacks the video or audio that the modality needs.
        """
        ((caption,),) = self.generate([CaptionRequest(Path(path), **options)])
        return caption

    def stream(self, path: Path | str, **options: Unpack[RequestOptions]) -> Iterator[str]:
        """Yield the text of `caption` in parts, as tokens are generated; takes and raises what `caption` does."""
        request = CaptionRequest(Path(path), **options)
        generator = self.streaming_generator()
        generator.add(
            [self._read(request)],
            [self.resolve_prompt(request)],
            sampling=request.sampling or self.default_sampling(),
            seeds=[request.seed],
        )
        while generator:
            yield from (delta.text for delta in generator.step().values())

    def generate(
        self,
        requests: Sequence[CaptionRequest],
        *,
        clips: Sequence[ClipInputs | ClipFeatures] | None = None,
        limits: BatchLimits | None = None,
        on_progress: Callable[[int], object] | None = None,
        scheduler: Scheduler[RequestedSequence] | None = None,
    ) -> list[list[Caption]]:
        """Return `num_samples` captions for each request.

        A file, or a clip object, of successive requests with equal sampling parameters (several questions about one
        video) is read and prefilled once.

        Args:
            requests: requests.
            clips: clip of each request, if it has been read or encoded before; then no file is opened.
            limits: limits of the batch (default: 64 sequences; on a GPU, as many of them as fit into its memory). The
                samples of a request are never split up.
            on_progress: called with the number of requests that have been completed since the last call.
            scheduler: scheduler of an earlier call, whose memory is used again (default: a new one).

        Raises:
            ClipError: a file cannot be read, or lacks the video or audio that the modality needs.
            torch.OutOfMemoryError: a clip does not fit into memory even alone.
        """
        if not requests:
            return []
        scheduler = scheduler or self.scheduler(limits)
        limits = limits or scheduler.limits
        num_rows = max(limits.num_rows, *(request.num_samples for request in requests))
        scheduler.limits = replace(limits, num_rows=num_rows)
        captions: list[dict[int, Caption]] = [{} for _ in requests]
        for sequence, outcome in scheduler.run(self.groups(requests, clips)):
            if isinstance(outcome, Exception):
                raise outcome
            of_request = captions[sequence.index]
            of_request[sequence.sample] = self.to_caption(sequence.request, outcome, sample=sequence.sample)
            if on_progress and len(of_request) == sequence.request.num_samples:
                on_progress(1)
        return [[of_request[sample] for sample in sorted(of_request)] for of_request in captions]

    def groups(
        self, requests: Sequence[CaptionRequest], clips: Sequence[ClipInputs | ClipFeatures] | None
    ) -> Iterator[list[RequestedSequence]]:
        """Yield the sequences of requests, those of successive requests about one clip together."""

        def key(index: int) -> tuple[object, ...]:
            one = requests[index]
            return one.sampling, *((_file_key(one)) if clips is None else (id(clips[index]),))

        clip: ClipInputs | ClipFeatures | None = None
        last = None
        for _, group in groupby(range(len(requests)), key=key):
            indices = list(group)
            first = requests[indices[0]]
            if clips is not None:
                clip = clips[indices[0]]
            elif clip is None or last != _file_key(first):
                clip, last = self._read(first), _file_key(first)
            yield [one for index in indices for one in self.sequences(requests[index], clip, index=index)]

    def sequences(
        self, request: CaptionRequest, clip: ClipInputs | ClipFeatures, *, index: int
    ) -> list[RequestedSequence]:
        """Return the sequences of a request's samples, for a `scheduler`.

        Args:
            request: request.
            clip: its clip.
            index: number of the request.
        """
        prompt = self.resolve_prompt(request)
        num_tokens = self.processor.count_tokens(clip, prompt)
        return [
            RequestedSequence(
                group=clip,
                clip=clip,
                prompt=prompt,
                sampling=request.sampling or self.default_sampling(),
                seed=(request.seed, sample),
                num_tokens=num_tokens,
                index=index,
                request=request,
                sample=sample,
            )
            for sample in range(request.num_samples)
        ]

    def limits(self, batch_size: int | None = None) -> BatchLimits:
        """Return the limits of a batch.

        Args:
            batch_size: maximum number of sequences (default: the model's; on a GPU at least 64). On a GPU there are
                fewer where their KV cache does not fit into the memory that is free now.

        Raises:
            ValueError: the batch size is below 1.
        """
        check_batch_size(batch_size)
        return measure_limits(self.network, batch_size=batch_size, default=self.processor.config.batch_size)

    def scheduler(self, limits: BatchLimits | None = None) -> Scheduler[RequestedSequence]:
        """Return a scheduler with an empty batch, which decodes whole completions.

        Args:
            limits: what is decoded together (default: 64 sequences; on a GPU, as many of them as fit into its memory).
        """
        start = partial(StreamingGenerator, self.network, self.processor, whole=True)
        return Scheduler(start, limits=limits or self.limits(GPU_BATCH_SIZE))

    def caption_many(
        self,
        requests: Iterable[CaptionRequest],
        *,
        batch_size: int | None = None,
        reader: ClipReader | None = None,
        shape: Shape | None = None,
    ) -> Iterator[Caption | Failure]:
        """Caption many videos in batches of similar length, in the order of the requests.

        A file that cannot be read becomes a `Failure` and does not affect the others.

        Args:
            requests: requests with one sample each.
            batch_size: maximum number of clips to decode together (default: the model's).
            reader: reader that decodes files ahead of the model (default: a thread of this process).
            shape: shape of the captions; questions that are asked again do not read the file again.
        """
        results: dict[int, Caption | Failure] = {}
        num_yielded = 0
        for batch in self.caption_batches(requests, batch_size=batch_size, reader=reader, shape=shape):
            results |= {one.index: one.result for one in batch}
            while num_yielded in results:
                yield results.pop(num_yielded)
                num_yielded += 1

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
        """Like `caption_many`, for any number of requests, which are taken as there is room for them.

        Args:
            requests: requests with one sample each, possibly endless.
            segments: rule by which videos are split into segments that are captioned separately.
            store: keeps the bounds of the segments, so that they are found once.
            batch_size, reader, shape: see `caption_many`.

        Yields:
            The results that became ready together, in any order.
        """
        limits = self.limits(batch_size)

        def jobs() -> Iterator[ClipJob]:
            for index, request in enumerate(requests):
                if request.num_samples != 1:
                    raise ValueError(f"num_samples must be 1 here, got {request.num_samples}: use generate for several")
                self.processor.check_prompt(self.resolve_prompt(request))
                yield ClipJob(index, request, self.read_spec(request))

        with ExitStack() as stack:
            reader = reader or stack.enter_context(ClipReader(workers=0))
            read = partial(TimedInputs.of, self.prepare)
            if shape is None:
                clips = reader.clips(jobs(), size=limits.num_rows, finish=read, segments=segments, store=store)
                yield from caption_clips(self, clips, limits=limits)
            else:
                batches = reader.batches(jobs(), size=limits.num_rows, finish=read, segments=segments, store=store)
                scheduler = self.scheduler(limits)
                yield from (caption_in_shape(self, batch, shape, scheduler) for batch in batches)

    @torch.no_grad()
    def encode(
        self, clips: Sequence[ClipInputs], *, batch_size: int = 16, on_progress: Callable[[int], object] | None = None
    ) -> list[ClipFeatures]:
        """Run the vision and audio encoders on each clip and return the features, on the CPU.

        Args:
            clips: clips.
            batch_size: maximum number of clips to encode together.
            on_progress: called with the number of clips that have been encoded since the last call.
        """
        features: list[ClipFeatures] = []
        for start in range(0, len(clips), batch_size):
            batch = [clip.to(self.network.device) for clip in clips[start : start + batch_size]]
            features += [replace(one, tokens=one.tokens.cpu()) for one in self.encode_on_device(batch)]
            if on_progress:
                on_progress(len(batch))
        return features

    @torch.no_grad()
    def encode_on_device(self, clips: Sequence[ClipInputs]) -> list[ClipFeatures]:
        """Run the encoders on clips that lie on the model's device; the features stay there."""
        layouts = [self.processor.make_layout(clip) for clip in clips]
        tokens = self.network.encode(clips, layouts)
        return [ClipFeatures(one, layout, clip.info) for one, layout, clip in zip(tokens, layouts, clips, strict=True)]

    def prepare(self, clip: Clip) -> ClipInputs:
        """Convert a clip to the encoders' inputs, in pinned memory if the model is on a GPU; for threads of readers."""
        return self.processor.clip_inputs(clip).pin_for(self.network.device)

    def default_prompt(self, modality: Modality = "both") -> str:
        """Return the prompt that the model was trained to answer with a caption.

        Raises:
            ValueError: the modality is audio, and the model does not hear.
        """
        self.processor.check_modality(modality)
        return self.processor.config.default_prompt(modality)

    def default_sampling(self) -> Sampling:
        """Return greedy decoding up to the model's own token limit."""
        return Sampling(max_new_tokens=self.processor.config.max_new_tokens)

    def resolve_prompt(self, request: CaptionRequest) -> Prompt:
        """Return the conversation of a request, with the default prompt instead of empty ones."""
        default = self.default_prompt(request.modality)
        history = [(prompt or default, answer) for prompt, answer in request.history]
        return Prompt(request.with_context(request.prompt or default), history, request.system, request.clip_turn)

    def read_spec(self, request: CaptionRequest) -> ReadSpec:
        """Return what this model reads of a request's file; raises a ValueError if it cannot take such frames."""
        span = request.span
        spec = self.processor.read_spec(
            request.modality, start_seconds=span.start_seconds, end_seconds=span.end_seconds
        )
        if request.frames:
            spec = replace(spec, sampler=spec.sampler.with_options(request.frames))
        return self.place_reader(spec)

    def place_reader(self, spec: ReadSpec) -> ReadSpec:
        """Return a specification whose reader, if it decodes on a GPU, does so on this model's."""
        device = self.network.device
        # A worker process would decode on the first GPU instead of the model's.
        is_on_gpu = spec.reader.endswith(":cuda") and device.index is not None
        return replace(spec, reader=f"{spec.reader}:{device.index}") if is_on_gpu else spec

    def streaming_generator(self) -> StreamingGenerator:
        """Start an empty streaming batch; add requests with its `add`."""
        return StreamingGenerator(self.network, self.processor)

    def to_caption(self, request: CaptionRequest, completion: Completion, *, sample: int = 0) -> Caption:
        """Return the record of a completion."""
        return Caption(
            video=str(request.path),
            text=completion.text,
            prompt=self.resolve_prompt(request).text,
            model=self.name,
            sample=sample,
            finished=completion.finished,
            complete=completion.clip.is_complete,
            modality=completion.clip.modality,
            warnings=completion.clip.warnings,
            logprob=sum(token.logprob or 0.0 for token in completion.tokens) if completion.tokens else None,
            num_tokens=len(completion.tokens) or None,
            start_seconds=request.span.start_seconds,
            end_seconds=request.span.end_seconds,
        )

    def _read(self, request: CaptionRequest) -> ClipInputs:
        return self.processor.clip_inputs(self.read_spec(request).read(request.path))


def _file_key(request: CaptionRequest) -> tuple[object, ...]:
    """Return what is read for a request."""
    return request.path, request.span, request.modality, request.frames


def publish_half(half: Path) -> None:
    """Move the files of a complete model to its folder, the parent; config.json, which marks it as complete, last."""
    for file in sorted(half.iterdir(), key=lambda file: file.name == CONFIG_NAME):
        file.replace(half.parent / file.name)
    half.rmdir()
