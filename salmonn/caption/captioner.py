"""The local captioner: load a model, caption one video or many, stream text, generate batches."""

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TypedDict, Unpack

import torch

import salmonn.caption.auto_processor  # noqa: F401 - registers the processor with transformers
from salmonn.caption.generate import generate
from salmonn.caption.generator import (
    SHIPPED_MODEL,
    CaptionRequest,
    History,
    Sampling,
    SegmentResult,
    Span,
    to_failure,
)
from salmonn.caption.loader import ClipJob, ClipReader, ReadResult, ReadSpec
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import Prompt, StopStrings
from salmonn.caption.segments import BoundsStore, SegmentRule
from salmonn.caption.shape import Shape, shape_captions
from salmonn.caption.streaming import Completion, StreamingGenerator, collate, to_completion
from salmonn.media.clip import Clip
from salmonn.media.frame_sampling import FrameOptions
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.loading import CONFIG_NAME, Placement, load_config, load_network, save_network
from salmonn.model.network import Network
from salmonn.records import Caption, Failure, Modality, atomic_folder
from salmonn.speech import SpeechEvent

OUT_OF_MEMORY = (
    "does not fit into GPU memory with the model: use a smaller batch_size, a part of the clip (start, end), or put "
    "less of the model on this GPU (bits 8 or 4, device_map auto)"
)


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


@dataclass(frozen=True)
class _TimedInputs:
    """The inputs of a clip, and its length in seconds."""

    inputs: ClipInputs
    seconds: float


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

    def reload(self, path: Path | str, *, placement: Placement | None = None) -> None:
        """Load other weights of the same kind of model, after freeing these: a GPU has memory for one model.

        Args:
            path: folder or hub id.
            placement: see `load`.
        """
        del self.network
        gc.collect()  # training wrappers hold the network in reference cycles
        self.network = load_network(path, placement=placement)
        self.name = str(path)

    def save(self, path: Path | str) -> None:
        """Write network, config and tokenizer to a folder that `load` reads; config.json is written last."""
        half = Path(path) / ".half"
        shutil.rmtree(half, ignore_errors=True)  # from a process that was killed
        with atomic_folder(half) as folder:
            self.processor.save(folder)
            save_network(self.network, folder)
        for file in sorted(half.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(half.parent / file.name)
        half.rmdir()

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
        batch_size: int = 64,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[list[Caption]]:
        """Return `num_samples` captions for each request.

        Consecutive requests with equal sampling parameters are decoded together. A file, or a clip object, that occurs
        in several of them (several questions about one video) is read and prefilled once.

        Args:
            requests: requests.
            clips: clip of each request, if it has been read or encoded before; then no file is opened.
            batch_size: maximum number of sequences to decode together; the samples of a request are never split up.
            on_progress: called with the number of requests that have been completed since the last call.

        Raises:
            ClipError: a file cannot be read, or lacks the video or audio that the modality needs.
        """
        captions: list[list[Caption]] = []
        read: dict[tuple[Path, Span, Modality, FrameOptions | None], ClipInputs] = {}
        for start, end in _batch_bounds(requests, batch_size):
            batch = requests[start:end]
            if clips is None:
                keys = [(request.path, request.span, request.modality, request.frames) for request in batch]
                # A file whose requests continue into the next batch is kept; the others are freed.
                read = {
                    key: read[key] if key in read else self._read(request)
                    for key, request in dict(zip(keys, batch, strict=True)).items()
                }
                captions += self._generate_batch(batch, [read[key] for key in keys])
            else:
                captions += self._generate_batch(batch, clips[start:end])
            if on_progress:
                on_progress(len(batch))
        return captions

    def _generate_batch(
        self, requests: Sequence[CaptionRequest], clips: Sequence[ClipInputs | ClipFeatures]
    ) -> list[list[Caption]]:
        """Answer requests with equal sampling parameters in one batch."""
        num_samples = requests[0].num_samples
        prompts = [self.resolve_prompt(request) for request in requests]
        sampling = requests[0].sampling or self.default_sampling()
        stops = StopStrings(self.processor.tokenizer, sampling.stop) if sampling.stop else None
        generated = generate(
            self.network,
            collate(self.processor, clips, prompts).to(self.network.device),
            sampling=sampling,
            stop_ids=self.processor.stop_ids,
            num_samples=num_samples,
            seeds=[request.seed for request in requests],
            has_ended=stops.has_ended if stops else None,
            grammars=self.processor.json_grammars if sampling.json_schema is not None else None,
        )
        rows = iter(generated)
        return [
            [
                self.to_caption(
                    request, to_completion(self.processor, next(rows), clip.info, sampling=sampling), sample=sample
                )
                for sample in range(num_samples)
            ]
            for request, clip in zip(requests, clips, strict=True)
        ]

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
        """Like `caption_many`, for any number of requests, which are taken a few batches ahead.

        Args:
            requests: requests with one sample each, possibly endless.
            segments: rule by which videos are split into segments that are captioned separately.
            store: keeps the bounds of the segments, so that they are found once.
            batch_size, reader, shape: see `caption_many`.

        Yields:
            The results of each batch, in the order of reading.
        """
        batch_size = self.processor.config.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")

        def jobs() -> Iterator[ClipJob]:
            for index, request in enumerate(requests):
                if request.num_samples != 1:
                    raise ValueError(f"num_samples must be 1 here, got {request.num_samples}: use generate for several")
                self.processor.check_prompt(self.resolve_prompt(request))
                yield ClipJob(index, request, self.read_spec(request))

        with ExitStack() as stack:
            reader = reader or stack.enter_context(ClipReader(workers=0))
            batches = reader.batches(jobs(), size=batch_size, finish=self._timed_inputs, segments=segments, store=store)
            for batch in batches:
                yield self._caption_jobs(batch, shape=shape)

    def _timed_inputs(self, clip: Clip) -> _TimedInputs:
        return _TimedInputs(self.processor.clip_inputs(clip), clip.duration_seconds)

    def _caption_jobs(
        self, batch: Sequence[ReadResult[_TimedInputs]], *, shape: Shape | None = None
    ) -> list[SegmentResult]:
        """Caption the clips of a batch that could be read."""
        readable = [(job.request, clip) for job, clip in batch if not isinstance(clip, ValueError)]
        requests, inputs = [request for request, _ in readable], [clip.inputs for _, clip in readable]
        if shape is None:
            captions = iter(self._generate_or_error(requests, inputs))
        else:
            captions = iter(self._shape_clips(requests, [clip for _, clip in readable], shape))
        results: list[Caption | Failure] = []
        for job, clip in batch:
            if isinstance(clip, ValueError):
                results.append(to_failure(job.request, str(clip), stage="read"))
                continue
            caption = next(captions)
            if isinstance(caption, str):
                results.append(to_failure(job.request, f"{job.request.path}: {caption}", stage="caption"))
            else:
                results.append(caption)
        return [
            SegmentResult(job.index, job.num_segments, result) for (job, _), result in zip(batch, results, strict=True)
        ]

    def _shape_clips(
        self, requests: Sequence[CaptionRequest], clips: Sequence[_TimedInputs], shape: Shape
    ) -> list[Caption | str]:
        """Return captions in a shape, or error messages; the encoders run once for all questions about a clip."""
        held: Sequence[ClipInputs | ClipFeatures] = [clip.inputs for clip in clips]
        if shape.may_ask_again:
            # Clips that do not fit into memory together are encoded with each question, one by one.
            with suppress(torch.OutOfMemoryError):
                held = self.encode([clip.inputs for clip in clips])

        def answer(asked: Sequence[tuple[int, CaptionRequest]]) -> list[Caption | str]:
            errors = [self._prompt_error(request) for _, request in asked]
            usable = [one for one, error in zip(asked, errors, strict=True) if error is None]
            answers = iter(self._generate_or_error([one for _, one in usable], [held[index] for index, _ in usable]))
            return [next(answers) if error is None else error for error in errors]

        asked = [replace(one, prompt=one.prompt or self.default_prompt(one.modality)) for one in requests]
        return shape_captions(
            shape, [(one, clip.seconds) for one, clip in zip(asked, clips, strict=True)], answer=answer
        )

    def _prompt_error(self, request: CaptionRequest) -> str | None:
        """Return what is wrong with a prompt, whose fields may hold any text."""
        try:
            self.processor.check_prompt(self.resolve_prompt(request))
        except ValueError as error:
            return str(error)
        return None

    def _generate_or_error(
        self, requests: Sequence[CaptionRequest], clips: Sequence[ClipInputs | ClipFeatures]
    ) -> list[Caption | str]:
        """Return captions or error messages; clips that do not fit into memory together are retried one by one."""
        try:
            batches = self.generate(requests, clips=clips, batch_size=max(len(requests), 1))
            return [caption for (caption,) in batches]
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        # Not in the handler, where the traceback still holds the tensors.
        if len(requests) == 1:
            return [f"{OUT_OF_MEMORY} ({reason})"]
        return [
            caption
            for request, clip in zip(requests, clips, strict=True)
            for caption in self._generate_or_error([request], [clip])
        ]

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
            layouts = [self.processor.make_layout(clip) for clip in batch]
            tokens = self.network.encode(batch, layouts)
            features += [
                ClipFeatures(one.cpu(), layout, clip.info)
                for one, layout, clip in zip(tokens, layouts, batch, strict=True)
            ]
            if on_progress:
                on_progress(len(batch))
        return features

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
        """Return the conversation of a request, with the default prompt in place of empty ones; raises as that."""
        default = self.default_prompt(request.modality)
        history = [(prompt or default, answer) for prompt, answer in request.history]
        return Prompt(request.with_context(request.prompt or default), history, request.system, request.clip_turn)

    def read_spec(self, request: CaptionRequest) -> ReadSpec:
        """Return what this model reads of a request's file; raises a ValueError if it cannot take such frames."""
        span, device = request.span, self.network.device
        spec = self.processor.read_spec(
            request.modality, start_seconds=span.start_seconds, end_seconds=span.end_seconds
        )
        if request.frames:
            spec = replace(spec, sampler=spec.sampler.with_options(request.frames))
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


def _batch_bounds(requests: Sequence[CaptionRequest], batch_size: int) -> Iterator[tuple[int, int]]:
    """Cut requests into batches of equal sampling parameters and at most `batch_size` sequences."""
    start = 0
    for (_, num_samples), group in groupby(requests, key=lambda request: (request.sampling, request.num_samples)):
        end = start + len(list(group))
        step = max(1, batch_size // num_samples)
        yield from ((first, min(first + step, end)) for first in range(start, end, step))
        start = end
