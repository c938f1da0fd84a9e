"""Training data: sets of clips, supervised examples, and their batches in a seeded order.

`ClipSet` holds the reference annotations of clips with the features that the frozen encoders computed once. A recipe
reads one from references of its own videos or renders synthetic clips. `SftBatches` turns examples into micro-batches.
"""

import functools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.processor import Processor, PromptRow
from salmonn.caption.prompt import LIST_EVENTS, refuse_special_tokens
from salmonn.conversations import Conversation, Turn
from salmonn.files import iter_numbered_records, read_records
from salmonn.media.container import ClipError
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.layout import ClipFeatures, ClipInputs, ModelInputs
from salmonn.records import Comparison, Modality, Reference
from salmonn.synthetic.render import SynthConfig, make_clips

log = logging.getLogger(__name__)

SftTask = Literal[
    "caption",
    "human_caption",
    "events",
    "questions",
    "visual_caption",
    "audio_caption",
    "visual_events",
    "audio_events",
    "visual_questions",
]
VISUAL_KINDS = ("colour", "order", "where", "direction")  # kinds of questions that the frames alone answer
AUDIBLE_KINDS = ("count", "sound", "when")  # kinds of synthetic clips' questions that need the audio
CLIPS_NAME = "clips.jsonl"
HELDOUT_SEED_OFFSET = 1_000_000  # between the seeds of training and held-out clips
T = TypeVar("T")


@dataclass(frozen=True)
class ClipSource:
    """Files and span that a clip is read from; equal sources have the same features.

    Args:
        video: file with the video, or the audio or image alone.
        modality: what of the clip is used.
        audio: file with the audio track where it is not in the video.
        start_seconds, end_seconds: span of the clip; None for an open end.
        needs_both: refuse a clip without video or without audio if both are used.
    """

    video: Path
    modality: Modality = "both"
    audio: Path | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    needs_both: bool = False

    @classmethod
    def of_conversation(cls, conversation: Conversation, *, root: Path) -> "ClipSource":
        """Return the clip of a published conversation, whose paths start from `root`."""
        video, audio = conversation.video or conversation.image, conversation.audio
        return cls(
            video=root / (video or audio or ""),
            modality=conversation.modality,
            audio=root / audio if video and audio else None,
            start_seconds=conversation.start_seconds,
            end_seconds=conversation.end_seconds,
            needs_both=True,
        )

    @classmethod
    def of_comparison(cls, comparison: Comparison, *, root: Path) -> "ClipSource":
        """Return the clip of a comparison, whose paths start from `root`."""
        return cls(
            video=root / comparison.video,
            modality=comparison.modality,
            audio=root / comparison.audio if comparison.audio else None,
            start_seconds=comparison.start_seconds,
            end_seconds=comparison.end_seconds,
        )


def require_files(sources: Sequence[ClipSource], *, root: Path) -> None:
    """Raise FileNotFoundError if a file of the clips does not exist; `root` is named as the folder of the paths."""
    files = [file for source in sources for file in (source.video, source.audio) if file]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} files do not exist, first {missing[0]}; relative paths start from "
            f"{root.resolve()}, and ~ is not expanded"
        )


@dataclass(frozen=True)
class ClipSet:
    """Clips with their reference annotations.

    Args:
        references: annotations, one for each clip.
        root: folder that the references' video paths start from.
        features: clip -> output of the frozen encoders; empty until `salmonn.train.encoding.cache_features`.
    """

    references: list[Reference]
    root: Path
    features: Mapping[ClipSource, ClipFeatures] = field(default_factory=dict)

    @property
    def by_video(self) -> dict[str, Reference]:
        """Annotations by video."""
        return {reference.video: reference for reference in self.references}

    def source(self, reference: Reference) -> ClipSource:
        """Return the whole clip of a reference."""
        return ClipSource(self.root / reference.video)

    def features_of(self, reference: Reference) -> ClipFeatures:
        """Return the features of a reference's clip."""
        return self.features[self.source(reference)]

    def head(self, count: int) -> "ClipSet":
        """Return the first clips."""
        return replace(self, references=self.references[:count])


def heldout_config(synth: SynthConfig, *, clips: int) -> SynthConfig:
    """Return the config of held-out clips: like the training clips, from a different seed derived from theirs."""
    return replace(synth, clips=clips, seed=synth.seed + HELDOUT_SEED_OFFSET)


def render_clips(clips_dir: Path, synth: SynthConfig) -> ClipSet:
    """Return the synthetic clips of a config; rank 0 renders missing ones.

    Raises:
        ValueError: the folder holds clips of another config.
    """
    folder = clips_dir / f"seed{synth.seed}-{synth.clips}"
    if dist.is_main():
        with tqdm(total=synth.clips, desc=f"rendering {folder}", unit="clip") as bar:
            make_clips(folder, synth, progress=bar.update)
    dist.barrier()
    return ClipSet(read_records(folder / CLIPS_NAME, Reference), folder)


def read_clips(path: Path, *, check: Callable[[Reference], None] | None = None) -> ClipSet:
    """Read references of existing videos, whose paths start from the folder of the file.

    Args:
        path: JSONL of references.
        check: raises a ValueError for a reference that the run cannot use; the message gets file and line.

    Raises:
        FileNotFoundError: the file or one of its videos does not exist.
        ValueError: the file holds no reference, two of one video, or one that does not pass the check.
    """
    references, lines = list[Reference](), dict[Path, int]()
    for number, reference in iter_numbered_records(path, Reference, check=check):
        first = lines.setdefault(path.parent / reference.video, number)
        if first != number:
            raise ValueError(f"{path}, line {number}: {reference.video} has a reference in line {first}; remove one")
        references.append(reference)
    if not references:
        raise ValueError(f"{path} holds no reference; write one JSON line for each video")
    clips = ClipSet(references, path.parent)
    require_files([clips.source(reference) for reference in references], root=clips.root)
    return clips


def drop_sounds(clips: ClipSet) -> ClipSet:
    """Return clips for a model that does not hear: captions of what can be seen, and no questions about sounds.

    The events stay: by them a judge distinguishes true statements about sounds from false ones, and those that the
    caption does not mention do not count (`salmonn.score.judge.is_expected`).
    """
    references = [
        replace(
            one,
            caption=one.visual_caption or one.caption,
            questions=tuple(item for item in one.questions if item.kind not in AUDIBLE_KINDS),
        )
        for one in clips.references
    ]
    if num_without := sum(not one.visual_caption.strip() for one in clips.references):
        log.warning(
            "the model has no audio input, and %d of %d references have no visual_caption: their caption is used, "
            "which may describe sounds; add visual_caption to them",
            num_without,
            len(references),
        )
    return replace(clips, references=references)


def check_texts(record: Reference | Comparison | Conversation, processor: Processor) -> None:
    """Raise a ValueError if a text to learn or to ask contains a special token of the model."""
    if isinstance(record, Reference):
        texts = [*all_texts([record]), *(event.text for event in record.events)]
    elif isinstance(record, Comparison):
        texts = [record.prompt, record.chosen, record.rejected, record.ground_truth, *chain(*record.history)]
    else:
        texts = [text for turn in record.turns for text in (turn.prompt, turn.answer, *chain(*turn.history))]
        if one := record.preference:
            texts += [one.prompt, one.chosen, one.rejected, one.ground_truth, *chain(*one.history)]
    refuse_special_tokens(processor.tokenizer, texts, what="text", placeholders=processor.config.placeholder_ids)


def all_texts(references: Sequence[Reference]) -> list[str]:
    """Return all texts that a tokenizer trained for these references should cover."""
    captions = [
        text
        for reference in references
        for text in (reference.caption, reference.human_caption, reference.visual_caption, reference.audio_caption)
    ]
    return captions + [
        text for reference in references for item in reference.questions for text in (item.question, item.answer)
    ]


@dataclass(frozen=True)
class TrainingExample:
    """A clip with turns to learn, none of which attends to another.

    All turns on a clip are one example, so that its encoders and its prefix are computed once.

    Args:
        clip: file, and the part of it that is read.
        turns: prompts with the answers to learn.
    """

    clip: ClipSource
    turns: tuple[Turn, ...]


def make_examples(
    clips: ClipSet,
    tasks: Sequence[SftTask],
    *,
    prompts: Mapping[Modality, str] = PLAIN_PROMPTS,
    single_modality_every: int = 1,
) -> list[TrainingExample]:
    """Return one epoch of examples: for each clip those with both modalities, the frames alone and the audio alone.

    Args:
        clips: annotated clips; one that lacks what a task needs gives no example of it.
        tasks: tasks to learn.
        prompts: modality -> prompt for a caption; without one for audio if the model does not hear.
        single_modality_every: learn every n-th clip also from its frames alone and its audio alone.

    Raises:
        ValueError: `single_modality_every` is less than 1, or a task is about audio that the model does not hear.
    """
    if single_modality_every < 1:
        raise ValueError(f"single_modality_every must be at least 1, got {single_modality_every}")
    if "audio" not in prompts and (about_audio := [task for task in tasks if task.startswith("audio_")]):
        raise ValueError(
            f"tasks {', '.join(about_audio)} are about sound, but this model has no audio input; remove them"
        )
    examples = []
    for index, reference in enumerate(clips.references):
        both_only = index % single_modality_every
        modalities: tuple[Modality, ...] = ("both",) if both_only else ("both", "visual", "audio")
        for modality in (one for one in modalities if one in prompts):
            if turns := _turns(reference, tasks, modality=modality, caption_prompt=prompts[modality]):
                examples.append(TrainingExample(replace(clips.source(reference), modality=modality), turns))
    return examples


def _turns(
    reference: Reference, tasks: Sequence[SftTask], *, modality: Modality, caption_prompt: str
) -> tuple[Turn, ...]:
    """Return the turns on a clip in one modality: captions, events in canonical wording, questions."""
    prefix = "" if modality == "both" else f"{modality}_"
    captions = ("caption", "human_caption") if modality == "both" else (f"{prefix}caption",)
    turns = [Turn(caption_prompt, getattr(reference, task)) for task in tasks if task in captions]
    if f"{prefix}events" in tasks:
        events = [
            event.text for event in reference.events if modality == "both" or event.is_audible == (modality == "audio")
        ]
        turns.append(Turn(LIST_EVENTS, ", ".join(events)))
    if f"{prefix}questions" in tasks:
        questions = [item for item in reference.questions if modality == "both" or item.kind in VISUAL_KINDS]
        turns += [Turn(item.question, item.answer) for item in questions]
    return tuple(turn for turn in turns if turn.answer.strip())


def conversation_examples(conversations: Sequence[Conversation], *, root: Path) -> list[TrainingExample]:
    """Return the examples of published conversations, whose paths start from `root`.

    Raises:
        FileNotFoundError: a file that they name does not exist.
    """
    examples = [TrainingExample(ClipSource.of_conversation(one, root=root), one.turns) for one in conversations]
    require_files([example.clip for example in examples], root=root)
    return examples


class ClipCache:
    """Reads each clip once and keeps it in memory, up to a number of bytes.

    Args:
        processor: processor of the model.
        max_bytes: size of the cache; clips beyond it are read again each time.
    """

    def __init__(self, processor: Processor, *, max_bytes: int = 8 << 30) -> None:
        self.processor = processor
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.clips: dict[ClipSource, ClipInputs] = {}

    def __call__(self, source: ClipSource) -> ClipInputs:
        """Read a clip, or return it from memory.

        Raises:
            ClipError: the clip cannot be read, or lacks the video or audio that is needed.
        """
        if source in self.clips:
            return self.clips[source]
        inputs = self.processor.read(
            source.video,
            sound=source.audio,
            modality=source.modality,
            start_seconds=source.start_seconds,
            end_seconds=source.end_seconds,
        )
        require_streams(source, inputs, self.processor)
        size = inputs.pixels.nbytes + inputs.mel.nbytes
        if self.num_bytes + size <= self.max_bytes:
            self.clips[source] = inputs
            self.num_bytes += size
        return inputs


def require_streams(source: ClipSource, inputs: ClipInputs, processor: Processor) -> None:
    """Raise a ClipError if a clip lacks the video or audio that is needed."""
    if not source.needs_both or source.modality != "both" or (inputs.num_frames and len(inputs.mel)):
        return
    if not processor.family.hears:
        raise ClipError(
            f"{source.video}: this example needs video and audio, but a {processor.config.family} model has "
            "no audio input; set its modality to visual (use_audio: false in a conversation)"
        )
    missing = "audio" if inputs.num_frames else "video"
    raise ClipError(
        f"{source.video} has no {missing}, but this example needs video and audio; remove it, or change its modality "
        "(use_audio in a conversation)"
    )


@dataclass(frozen=True)
class ModelBatch:
    """Base of micro-batches that are one input of the model; see `MicroBatch` in `salmonn.train.loop`."""

    inputs: ModelInputs

    @property
    def num_tokens(self) -> int:
        """Number of tokens that pass through the decoder."""
        return self.inputs.num_tokens

    def pin_for(self, device: torch.device) -> Self:
        """Return the micro-batch in pinned memory if the device is a GPU."""
        return replace(self, inputs=self.inputs.pin_for(device))


@dataclass(frozen=True)
class SftBatch(ModelBatch):
    """A micro-batch of answers to learn.

    Args:
        inputs: inputs of the model.
        mean_num_tokens: number of answer tokens of the whole step, divided by the number of ranks.
        clips: names of its clips, for error messages.
    """

    mean_num_tokens: float
    clips: tuple[str, ...]


@dataclass(frozen=True)
class SftBatches:
    """Batches of examples, in a new seeded order each epoch.

    Args:
        examples: all examples, the same on every rank.
        processor: processor of the model.
        read_clip: returns a clip's inputs, or its features if the encoders are frozen.
        batch_size: examples per step over all ranks.
        seed: seed of the order.
        gradient_accumulation_steps: number of micro-batches of a rank, at most its number of examples.
        first_rank: rank that gets the first example of each step.
    """

    examples: Sequence[TrainingExample]
    processor: Processor
    read_clip: Callable[[ClipSource], ClipInputs | ClipFeatures]
    _: KW_ONLY
    batch_size: int
    seed: int
    gradient_accumulation_steps: int = 1
    first_rank: int = 0

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError(
                "no training examples: the data has none for the chosen tasks, or only preferences (see recipes/dpo.py)"
            )

    def micro_batches(self, step: int) -> list[SftBatch]:
        """Return this rank's micro-batches of a step."""
        batch = batch_at(self.examples, step, batch_size=self.batch_size, seed=self.seed)
        num_tokens = sum(len(self.processor.answer_ids(turn.answer)) for example in batch for turn in example.turns)
        mean_num_tokens = num_tokens / dist.world_size()
        micro_batches = []
        for part in split_evenly(dist.shard(batch, first=self.first_rank), self.gradient_accumulation_steps):
            rows = [
                PromptRow(index, turn.prompt, turn.answer, turn.history)
                for index, example in enumerate(part)
                for turn in example.turns
            ]
            inputs = self.processor.collate(rows, [self.read_clip(example.clip) for example in part])
            micro_batches.append(SftBatch(inputs, mean_num_tokens, tuple(str(one.clip.video) for one in part)))
        return micro_batches


def sft_loss(model: nn.Module, batch: SftBatch) -> tuple[Tensor, Mapping[str, float]]:
    """Compute the cross-entropy, averaged over all answer tokens of the step's batch on all ranks."""
    inputs = batch.inputs.to(dist.device())
    return -model(inputs).sum() / batch.mean_num_tokens, {}


def batch_at(items: Sequence[T], step: int, *, batch_size: int, seed: int) -> list[T]:
    """Return the batch of a step over all ranks; each epoch has every item once, in its own order."""
    positions = (divmod(index, len(items)) for index in range(step * batch_size, (step + 1) * batch_size))
    return [items[_shuffled(len(items), seed, epoch)[position]] for epoch, position in positions]


@functools.lru_cache(maxsize=4)
def _shuffled(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return tuple(order)


def split_evenly(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Split items, in order, into at most `count` non-empty parts whose sizes differ by at most 1."""
    ends = [len(items) * number // count for number in range(count + 1)]
    return [items[start:end] for start, end in pairwise(ends) if start < end]
