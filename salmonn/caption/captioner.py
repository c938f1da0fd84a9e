"""The one door to a model that describes videos: command line, page, service and recipes all come through here."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from salmonn.caption.generate import Sampling, generate
from salmonn.caption.inputs import Processor, Row
from salmonn.caption.reading import ClipReader, Read
from salmonn.model.load import CONFIG_NAME, Placement, load_config, load_network, save_network
from salmonn.model.network import Block, Inputs, Media, Network
from salmonn.records import Caption, Use, new_folder

SHIPPED_MODEL = Path(__file__).parent.parent / "tiny"
Progress = Callable[[int], object]
NO_ROOM = (
    "does not fit in the GPU's memory beside the model: caption fewer side by side (batch_size), a part of it (start, "
    "end), or with less of the model on this GPU (bits 8 or 4, device_map auto)"
)


@dataclass(frozen=True)
class Answer:
    """What the model said; `finished` is False where it ran into the token limit."""

    text: str
    finished: bool


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
class Failure:
    """A video that could not be captioned, and why."""

    video: str
    error: str


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
        released_positions: bool = False,
        frames: Mapping[str, float] | None = None,
    ) -> "Captioner":
        """Read a model from a folder or from the hub: one of this project's, or a published video-SALMONN 2 or 2+.

        Args:
            path: folder, or id on the hub.
            placement: device, type of the weights and the like (default: the GPU where there is one).
            adapter: PEFT folder or id on the hub, put on top.
            released_positions: see `Processor`.
            frames: values of the model's frame rule to use in place of its own; a saved model keeps its own.

        Raises:
            ValueError: it is no such model, or incomplete.
        """
        config = load_config(path).with_frames(frames)
        # Before the weights, which may take minutes: a tokenizer that does not fit is told at once.
        processor = Processor.load(path, config=config, released_positions=released_positions)
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
        with new_folder(half) as folder:
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
        use: Use = "both",
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
        prompt, span = prompt or self.describe(use), span or Span()
        media = self._read(Path(path), span=span, use=use)
        answer = self.answer([media], [prompt], sampling=sampling or self.greedy(), seeds=[seed])[0]
        return self._sign(answer, path, prompt=prompt, span=span)

    def describe(self, use: Use = "both") -> str:
        """The prompt that the model was taught to answer with a caption."""
        return self.processor.config.describe(use)

    def greedy(self) -> Sampling:
        """The likeliest words, up to the model's own limit of length."""
        return Sampling(max_new_tokens=self.processor.config.max_new_tokens)

    def _sign(self, answer: Answer, path: Path | str, *, prompt: str, span: Span) -> Caption:
        return Caption(
            video=str(path),
            text=answer.text,
            prompt=prompt,
            model=self.name,
            finished=answer.finished,
            start_seconds=span.start_seconds,
            end_seconds=span.end_seconds,
        )

    def _read(self, path: Path, *, span: Span, use: Use) -> Media:
        return self.processor.read(path, use=use, start_seconds=span.start_seconds, end_seconds=span.end_seconds)

    def caption_each(
        self,
        paths: Sequence[Path],
        *,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        span: Span | None = None,
        use: Use = "both",
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
        batch_size = self.processor.config.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        prompt, sampling, span = prompt or self.describe(use), sampling or self.greedy(), span or Span()
        wanted = self.processor.wanted(use, start_seconds=span.start_seconds, end_seconds=span.end_seconds)
        results: dict[int, Caption | Failure] = {}
        with ExitStack() as stack:
            reader = reader or stack.enter_context(ClipReader(workers=0))
            told = 0
            for batch in reader.batches(paths, wanted, size=batch_size, finish=self.processor.media):
                results |= self._caption_batch(batch, paths, prompt=prompt, sampling=sampling, span=span, seed=seed)
                while told in results:
                    yield results.pop(told)
                    told += 1

    def _caption_batch(
        self,
        batch: Sequence[Read[Media]],
        paths: Sequence[Path],
        *,
        prompt: str,
        sampling: Sampling,
        span: Span,
        seed: int,
    ) -> dict[int, Caption | Failure]:
        """What becomes of a batch's clips, by their places among the paths."""
        results: dict[int, Caption | Failure] = {
            place: Failure(str(paths[place]), str(read)) for place, read in batch if isinstance(read, ValueError)
        }
        clips = {place: read for place, read in batch if isinstance(read, Media)}
        seeds = [seed + place for place in clips]
        try:
            answers = self.answer(list(clips.values()), [prompt] * len(clips), sampling=sampling, seeds=seeds)
        except torch.OutOfMemoryError as error:
            told = str(error).split(". ")[0]
            return results | {
                place: Failure(str(paths[place]), f"{paths[place]}: {NO_ROOM} ({told})") for place in clips
            }
        for place, answer in zip(clips, answers, strict=True):
            results[place] = self._sign(answer, paths[place], prompt=prompt, span=span)
        return results

    @torch.no_grad()
    def encode(self, clips: Sequence[Media], *, batch_size: int = 16, progress: Progress | None = None) -> list[Block]:
        """Run the frozen towers once on each clip; the blocks are kept on the CPU."""
        blocks: list[Block] = []
        for start in range(0, len(clips), batch_size):
            part = [clip.to(self.network.device) for clip in clips[start : start + batch_size]]
            layouts = [self.processor.lay_out(clip) for clip in part]
            tokens = self.network.encode(part, layouts)
            blocks += [Block(one.cpu(), layout) for one, layout in zip(tokens, layouts, strict=True)]
            if progress:
                progress(len(part))
        return blocks

    def answer(
        self,
        clips: Sequence[Media | Block],
        prompts: Sequence[str],
        *,
        sampling: Sampling,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> list[Answer]:
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
        answers: list[Answer] = []
        step = max(1, batch_size // num_samples)
        for start in range(0, len(clips), step):
            part = slice(start, start + step)
            different = {id(clip): clip for clip in clips[part]}
            places = {key: place for place, key in enumerate(different)}
            asked = zip(clips[part], prompts[part], strict=True)
            rows = [Row(places[id(clip)], prompt) for clip, prompt in asked]
            inputs = self.processor.inputs(rows, list(different.values())).to(self.network.device)
            answers += self._answer(inputs, sampling=sampling, num_samples=num_samples, seeds=seeds[part])
            if progress:
                progress(len(rows))
        return answers

    def _answer(
        self, inputs: Inputs, *, sampling: Sampling, num_samples: int, seeds: Sequence[int]
    ) -> Iterator[Answer]:
        tokenizer, stops = self.processor.tokenizer, self.processor.stop_ids
        generated = generate(
            self.network, inputs, sampling=sampling, stop_ids=stops, num_samples=num_samples, seeds=seeds
        )
        for ids in generated:
            yield Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), finished=ids[-1] in stops)
