"""The one door to a model that describes videos: command line, page, service and recipes all come through here."""

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from salmonn.caption.generate import Sampling, generate
from salmonn.caption.loader import ClipJob, ClipReader, ReadResult, ReadSpec
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import Prompt
from salmonn.caption.streaming import Completion, StreamingGenerator, collate, to_completion
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.loading import CONFIG_NAME, Placement, load_config, load_network, save_network
from salmonn.model.network import Network
from salmonn.records import Caption, Failure, FailureStage, Modality, atomic_folder

SHIPPED_MODEL = Path(__file__).parent.parent / "tiny"
Progress = Callable[[int], object]
NO_ROOM = (
    "does not fit in the GPU's memory beside the model: caption fewer side by side (batch_size), a part of it (start, "
    "end), or with less of the model on this GPU (bits 8 or 4, device_map auto)"
)


@dataclass(frozen=True)
class Span:
    """A part of a video in seconds; None stands for its beginning or its end."""

    start_seconds: float | None = None
    end_seconds: float | None = None

    def __post_init__(self) -> None:
        start = self.start_seconds or 0.0
        if start < 0 or (self.end_seconds is not None and self.end_seconds <= start):
            raise ValueError(f"the span from {start} to {self.end_seconds} s is empty: it must end after it starts")


@dataclass(frozen=True)
class PendingRequest:
    """A video that is to be captioned.

    Args:
        path: of the file.
        span: the part of it to look at.
        seed: of the draws on it.
    """

    path: Path
    span: Span = Span()
    seed: int = 0


@dataclass(frozen=True)
class SegmentResult:
    """What became of a video, or of one of the segments that it was cut into.

    Attributes:
        place: of the video among those that were asked for.
        num_segments: that it was cut into.
        result: the caption, or why there is none.
    """

    place: int
    num_segments: int
    result: Caption | Failure


class Captioner:
    """A network with its processor.

    Args:
        network: in evaluation mode, on its device.
        processor: of the same model.
        name: the model's folder or hub id, as it goes into records.

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
    ) -> "Captioner":
        """Read a model from a folder or from the hub: one of this project's, or a published video-SALMONN 2 or 2+.

        Args:
            path: folder, or id on the hub.
            placement: device, type of the weights and the like (default: the GPU where there is one).
            adapter: PEFT folder or id on the hub, put on top.
            published_positions: see `Processor`.
            frames: values of the model's frame rule to use in place of its own; a saved model keeps its own.

        Raises:
            ValueError: it is no such model, or incomplete.
        """
        config = load_config(path, frames=frames)
        # Before the weights, which may take minutes: a tokenizer that does not fit is told at once.
        processor = Processor.load(path, config=config, published_positions=published_positions)
        network = load_network(path, placement=placement, adapter=adapter)
        return cls(network, processor, name=str(path))

    def reload(self, path: Path | str, *, placement: Placement | None = None) -> None:
        """Read a model of the same kind in place of this one, which is let go first: a GPU holds one.

        Args:
            path: folder, or id on the hub.
            placement: as for `load`.
        """
        del self.network
        gc.collect()  # what wrapped it in training is held in circles
        self.network = load_network(path, placement=placement)
        self.name = str(path)

    def save(self, path: Path | str) -> None:
        """Write network, config and tokenizer as a folder that `load` reads; it has a config.json if it is whole."""
        half = Path(path) / ".half"
        shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
        with atomic_folder(half) as folder:
            self.processor.save(folder)
            save_network(self.network, folder)
        for file in sorted(half.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(half.parent / file.name)
        half.rmdir()

    def caption(
        self,
        path: Path | str,
        *,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        span: Span | None = None,
        modality: Modality = "both",
        seed: int = 0,
    ) -> Caption:
        """Describe one video, or answer any prompt about it.

        Args:
            path: of the video.
            prompt: what is asked (default: a full description, in the words that the model was taught).
            sampling: how the answer is drawn (default: greedy).
            span: the part of the video to look at (default: all of it).
            use: picture, sound or both.
            seed: of the draw.

        Raises:
            ClipError: the file cannot be read, or lacks the picture or sound that `use` asks for.
        """
        return self.sample(
            path, num_samples=1, prompt=prompt, sampling=sampling, span=span, modality=modality, seed=seed
        )[0]

    def sample(
        self,
        path: Path | str,
        *,
        num_samples: int,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        span: Span | None = None,
        modality: Modality = "both",
        seed: int = 0,
    ) -> list[Caption]:
        """Several answers to one prompt, drawn from the model (see `Sampling.temperature`); the video is read once.

        Takes what `caption` takes; the first is that of `caption` with the same seed.
        """
        prompt, span = prompt or self.default_prompt(modality), span or Span()
        media = self._read(Path(path), span=span, modality=modality)
        answers = self.answer(
            [media], [prompt], sampling=sampling or self.default_sampling(), num_samples=num_samples, seeds=[seed]
        )
        signed = (self._sign(answer, path, prompt=prompt, span=span) for answer in answers)
        return [replace(caption, sample=number) for number, caption in enumerate(signed)]

    def ask(
        self,
        path: Path | str,
        questions: Sequence[str],
        *,
        sampling: Sampling | None = None,
        span: Span | None = None,
        modality: Modality = "both",
        seed: int = 0,
    ) -> list[Caption]:
        """Answer several questions on one video, which is read once; the answers' `prompt` is the question.

        Takes what `caption` takes, and raises what it raises.
        """
        if isinstance(questions, str):
            raise ValueError("questions must be a list; put a single one into brackets, or use caption(prompt=...)")
        span = span or Span()
        media = self._read(Path(path), span=span, modality=modality)
        answers = self.answer(
            [media] * len(questions),
            questions,
            sampling=sampling or self.default_sampling(),
            seeds=[seed] * len(questions),
        )
        return [
            self._sign(answer, path, prompt=question, span=span)
            for question, answer in zip(questions, answers, strict=True)
        ]

    def stream(
        self,
        path: Path | str,
        *,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        span: Span | None = None,
        modality: Modality = "both",
        seed: int = 0,
    ) -> Iterator[str]:
        """Like `caption`, word by word: together the pieces are the text of that caption."""
        media = self._read(Path(path), span=span or Span(), modality=modality)
        answers = self.begin()
        answers.join(
            [media],
            [prompt or self.default_prompt(modality)],
            sampling=sampling or self.default_sampling(),
            seeds=[seed],
        )
        while answers:
            yield from (piece.text for piece in answers.step().values())

    def default_prompt(self, modality: Modality = "both") -> str:
        """The prompt that the model was taught to answer with a caption."""
        return self.processor.config.default_prompt(modality)

    def default_sampling(self) -> Sampling:
        """The likeliest words, up to the model's own limit of length."""
        return Sampling(max_new_tokens=self.processor.config.max_new_tokens)

    def _sign(self, answer: Completion, path: Path | str, *, prompt: str, span: Span) -> Caption:
        return Caption(
            video=str(path),
            text=answer.text,
            prompt=prompt,
            model=self.name,
            finished=answer.finished,
            start_seconds=span.start_seconds,
            end_seconds=span.end_seconds,
        )

    def _read(self, path: Path, *, span: Span, modality: Modality) -> ClipInputs:
        return self.processor.clip_inputs(self._wanted(span, modality=modality).read(path))

    def _wanted(self, span: Span, *, modality: Modality) -> ReadSpec:
        return self.processor.read_spec(modality, start_seconds=span.start_seconds, end_seconds=span.end_seconds)

    def caption_many(
        self,
        paths: Sequence[Path],
        *,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        span: Span | None = None,
        modality: Modality = "both",
        seed: int = 0,
        batch_size: int | None = None,
        reader: ClipReader | None = None,
    ) -> Iterator[Caption | Failure]:
        """Describe many videos in batches of like length; one that cannot be read is a `Failure` and harms no other.

        Takes what `caption` takes; the results come in the order of the paths.

        Args:
            seed: a video's draws come from the seed plus its place among the paths.
            batch_size: videos side by side, at most (default: the model's).
            reader: what reads ahead while the model works (default: a thread of this process).
        """
        asked = [PendingRequest(path, span or Span(), seed + place) for place, path in enumerate(paths)]
        given = self.caption_batches(
            asked, prompt=prompt, sampling=sampling, modality=modality, batch_size=batch_size, reader=reader
        )
        results: dict[int, Caption | Failure] = {}
        told = 0
        for batch in given:
            results |= {done.place: done.result for done in batch}
            while told in results:
                yield results.pop(told)
                told += 1

    def caption_batches(
        self,
        asked: Iterable[PendingRequest],
        *,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        modality: Modality = "both",
        segment_seconds: float | None = None,
        batch_size: int | None = None,
        reader: ClipReader | None = None,
    ) -> Iterator[list[SegmentResult]]:
        """Like `caption_each`, for any number of videos: they are taken a few batches at a time, and told as they come.

        Args:
            asked: the videos.
            segment_seconds: caption each segment of this length by itself (infinite: the whole, with its end told).

        Yields:
            What became of each batch, in the order in which they were read.
        """
        batch_size = self.processor.config.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if segment_seconds is not None and not segment_seconds > 0:
            raise ValueError(f"segment_seconds must be above 0, got {segment_seconds}")
        prompt, sampling = prompt or self.default_prompt(modality), sampling or self.default_sampling()
        self.processor.check_prompt(prompt)
        parts = (
            ClipJob(place, one.path, self._wanted(one.span, modality=modality), seed=one.seed)
            for place, one in enumerate(asked)
        )
        with ExitStack() as stack:
            reader = reader or stack.enter_context(ClipReader(workers=0))
            batches = reader.batches(
                parts, size=batch_size, finish=self.processor.clip_inputs, segment_seconds=segment_seconds
            )
            for batch in batches:
                yield self._caption_batch(batch, prompt=prompt, sampling=sampling)

    def _caption_batch(
        self, batch: Sequence[ReadResult[ClipInputs]], *, prompt: str, sampling: Sampling
    ) -> list[SegmentResult]:
        """What becomes of a batch's clips."""
        results: dict[int, Caption | Failure] = {}
        clips: dict[int, ClipInputs] = {}
        for number, (part, read) in enumerate(batch):
            if isinstance(read, ValueError):
                results[number] = _fail(part, str(read), stage="read")
            else:
                clips[number] = read
        seeds = [batch[number][0].seed for number in clips]
        given = self._answer_or_tell(list(clips.values()), seeds, prompt=prompt, sampling=sampling)
        for number, answer in zip(clips, given, strict=True):
            part = batch[number][0]
            span = Span(part.read_spec.start_seconds, part.read_spec.end_seconds)
            results[number] = (
                self._sign(answer, part.path, prompt=prompt, span=span)
                if isinstance(answer, Completion)
                else _fail(part, f"{part.path}: {answer}", stage="caption")
            )
        return [SegmentResult(part.place, part.num_segments, results[number]) for number, (part, _) in enumerate(batch)]

    def _answer_or_tell(
        self, clips: Sequence[ClipInputs], seeds: Sequence[int], *, prompt: str, sampling: Sampling
    ) -> list[Completion | str]:
        """Answers, or why there is none: clips that have no room side by side are asked about one by one."""
        try:
            return list(self.answer(clips, [prompt] * len(clips), sampling=sampling, seeds=seeds))
        except torch.OutOfMemoryError as error:
            told = str(error).split(". ")[0]
        if len(clips) == 1:
            return [f"{NO_ROOM} ({told})"]
        return [
            answer
            for clip, seed in zip(clips, seeds, strict=True)
            for answer in self._answer_or_tell([clip], [seed], prompt=prompt, sampling=sampling)
        ]

    @torch.no_grad()
    def encode(
        self, clips: Sequence[ClipInputs], *, batch_size: int = 16, progress: Progress | None = None
    ) -> list[ClipFeatures]:
        """Run the frozen towers once on each clip; the blocks are kept on the CPU."""
        blocks: list[ClipFeatures] = []
        for start in range(0, len(clips), batch_size):
            part = [clip.to(self.network.device) for clip in clips[start : start + batch_size]]
            layouts = [self.processor.make_layout(clip) for clip in part]
            tokens = self.network.encode(part, layouts)
            blocks += [ClipFeatures(one.cpu(), layout) for one, layout in zip(tokens, layouts, strict=True)]
            if progress:
                progress(len(part))
        return blocks

    def answer(
        self,
        clips: Sequence[ClipInputs | ClipFeatures],
        prompts: Sequence[str | Prompt],
        *,
        sampling: Sampling,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Answer prompts[i] on clips[i], `num_samples` times.

        Args:
            clips: media, or blocks as `encode` gives them. What stands there several times is read once for all of
                its prompts that go side by side.
            prompts: as many as clips.
            seeds: of the draws on each clip, which depend on nothing else (default: 0, 1, 2, ...).
            batch_size: sequences that are generated side by side; a clip's samples are never parted.
            progress: called with the number of clips done.

        Returns:
            len(clips) * num_samples answers, a clip's samples one after the other.
        """
        seeds = range(len(clips)) if seeds is None else seeds
        answers: list[Completion] = []
        step = max(1, batch_size // num_samples)
        for start in range(0, len(clips), step):
            part = slice(start, start + step)
            inputs = collate(self.processor, clips[part], prompts[part]).to(self.network.device)
            answers += [
                to_completion(self.processor, ids)
                for ids in generate(
                    self.network,
                    inputs,
                    sampling=sampling,
                    stop_ids=self.processor.stop_ids,
                    num_samples=num_samples,
                    seeds=seeds[part],
                )
            ]
            if progress:
                progress(len(inputs.clip_index))
        return answers

    def begin(self) -> StreamingGenerator:
        """Nothing yet: what is to be answered joins it, and its answers come word by word."""
        return StreamingGenerator(self.network, self.processor)


def _fail(part: ClipJob, reason: str, *, stage: FailureStage) -> Failure:
    return Failure(str(part.path), reason, stage, part.read_spec.start_seconds, part.read_spec.end_seconds)
