"""What is trained on: clips with prompts and answers, kept in memory, dealt out in a seeded order."""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from salmonn import dist
from salmonn.caption.processor import Processor, PromptRow
from salmonn.caption.prompt import LIST_EVENTS, answer_ids
from salmonn.conversations import Conversation, Turn
from salmonn.media.container import ClipError
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.layout import ClipFeatures, ClipInputs, ModelInputs
from salmonn.records import Modality, Reference

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
VISUAL_KINDS = ("colour", "order", "where", "direction")  # of questions that the picture alone answers
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One clip, whole or its picture or sound alone, with turns about it that do not see one another.

    Turns on the same clip stand together so that the towers run once for all of them.

    Args:
        video: file with the picture, or the sound where there is no picture.
        turns: what is learnt of it.
        use: picture, sound or both.
        sound: file that the sound is in, where it is not in the video.
        start_seconds, end_seconds: the part of the video that is meant; none for the whole.
        needs_both: a clip without picture or without sound is refused where both are meant.
    """

    video: Path
    turns: tuple[Turn, ...]
    modality: Modality = "both"
    sound: Path | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    needs_both: bool = False

    @property
    def clip(self) -> tuple[Any, ...]:
        """What it is about; examples of one clip share its tokens."""
        return (self.video, self.sound, self.modality, self.start_seconds, self.end_seconds)


def make_examples(
    references: Sequence[Reference],
    tasks: Sequence[SftTask],
    *,
    root: Path,
    prompts: Mapping[Modality, str] = PLAIN_PROMPTS,
    single_modality_every: int = 1,
) -> list[Example]:
    """The examples that references give in one epoch.

    Whatever is learnt of the whole clip stands together, what is learnt of its picture alone, and of its sound alone.

    Args:
        references: of any videos; one that lacks what a task needs gives no example of it.
        tasks: what is learnt.
        root: folder that the references' video paths start from.
        prompts: what asks for a caption of each use.
        single_modality_every: of so many clips one is learnt by its picture alone and by its sound alone too.

    Raises:
        ValueError: `single_modality_every` is less than 1.
    """
    if single_modality_every < 1:
        raise ValueError(f"single_modality_every counts clips and must be at least 1, got {single_modality_every}")
    examples = []
    for index, reference in enumerate(references):
        video = root / reference.video
        uses: tuple[Modality, ...] = ("both",) if index % single_modality_every else ("both", "visual", "audio")
        for modality in uses:
            if turns := _turns(reference, tasks, modality=modality, describe=prompts[modality]):
                examples.append(Example(video, turns, modality=modality))
    return examples


def _turns(reference: Reference, tasks: Sequence[SftTask], *, modality: Modality, describe: str) -> tuple[Turn, ...]:
    """The turns of one use of the clip: its captions, its events (in canonical words, which do not vary), questions."""
    prefix = "" if modality == "both" else f"{modality}_"
    wanted = ("caption", "human_caption") if modality == "both" else (f"{prefix}caption",)
    turns = [Turn(describe, getattr(reference, task)) for task in tasks if task in wanted]
    if f"{prefix}events" in tasks:
        events = [
            event.text for event in reference.events if modality == "both" or event.is_audible == (modality == "audio")
        ]
        turns.append(Turn(LIST_EVENTS, ", ".join(events)))
    if f"{prefix}questions" in tasks:
        asked = [item for item in reference.questions if modality == "both" or item.kind in VISUAL_KINDS]
        turns += [Turn(item.question, item.answer) for item in asked]
    return tuple(turn for turn in turns if turn.answer)


def conversation_examples(conversations: Sequence[Conversation], *, root: Path) -> list[Example]:
    """The examples of published conversations, each a clip of its own; those of preferences have no turns.

    Args:
        conversations: as `salmonn.conversations` reads them.
        root: folder that their paths start from.

    Raises:
        FileNotFoundError: a file that they name is not there.
    """
    examples = []
    for conversation in (one.resolve(root) for one in conversations):
        picture = conversation.video or conversation.image
        sound = Path(conversation.audio) if conversation.audio else None
        examples.append(
            Example(
                video=Path(picture) if picture else sound,  # type: ignore[arg-type]  # a conversation has one of them
                turns=conversation.turns,
                modality=conversation.modality,
                sound=sound if picture else None,
                start_seconds=conversation.start_seconds,
                end_seconds=conversation.end_seconds,
                needs_both=True,
            )
        )
    files = [file for example in examples for file in (example.video, example.sound) if file]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{len(absent)} files of the conversations are not there, {absent[0]} first: "
            f"paths are taken from {root.resolve()}"
        )
    return examples


class ClipCache:
    """Reads clips once and keeps them in memory up to a number of bytes.

    Args:
        processor: that reads them.
        max_bytes: beyond this, clips are read again each time.
    """

    def __init__(self, processor: Processor, *, max_bytes: int = 8 << 30) -> None:
        self.processor = processor
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.clips: dict[tuple[Any, ...], ClipInputs] = {}

    def __call__(self, example: Example) -> ClipInputs:
        """The clip that an example is about, read from its files the first time.

        Raises:
            ClipError: it cannot be read, or lacks the picture or the sound that is learnt from.
        """
        if example.clip in self.clips:
            return self.clips[example.clip]
        media = self.processor.read(
            example.video,
            sound=example.sound,
            modality=example.modality,
            start_seconds=example.start_seconds,
            end_seconds=example.end_seconds,
        )
        if example.needs_both and example.modality == "both" and not (media.num_frames and len(media.mel)):
            raise ClipError(
                f"{example.video} has no {'sound' if media.num_frames else 'picture'}, and what is to be learnt of it "
                "asks for both: say use_audio false, or leave the item out"
            )
        size = media.pixels.nbytes + media.mel.nbytes
        if self.num_bytes + size <= self.max_bytes:
            self.clips[example.clip] = media
            self.num_bytes += size
        return media


@dataclass(frozen=True)
class SftBatch:
    """Inputs of some of this rank's rows; `mean_num_tokens` counts the step's answer tokens of an average rank."""

    inputs: ModelInputs
    mean_num_tokens: float
    clips: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Of text and clips, that go through the decoder."""
        return self.inputs.num_tokens


class SftBatches:
    """Deals out examples in a new seeded order each epoch.

    Args:
        examples: all of them, the same on every rank.
        processor: of the model.
        clip_of: gives an example's clip, as media or as the block that the frozen towers made of it.
        batch_size: examples a step over all ranks.
        seed: of the order.
        gradient_accumulation_steps: pieces that a rank's part is split into, if it has so many examples.
        first_rank: rank that takes the first example of each step.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        clip_of: Callable[[Example], ClipInputs | ClipFeatures],
        *,
        batch_size: int,
        seed: int,
        gradient_accumulation_steps: int = 1,
        first_rank: int = 0,
    ) -> None:
        if not examples:
            raise ValueError("there is nothing to train on: the references give no example of the chosen tasks")
        self.examples = examples
        self.processor = processor
        self.clip_of = clip_of
        self.batch_size = batch_size
        self.seed = seed
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.first_rank = first_rank

    def __call__(self, step: int) -> list[SftBatch]:
        """This rank's batch of a step, in pieces."""
        chosen = batch_at(self.examples, step, batch_size=self.batch_size, seed=self.seed)
        tokenizer = self.processor.tokenizer
        num_tokens = sum(len(answer_ids(tokenizer, turn.answer)) for example in chosen for turn in example.turns)
        mine = dist.shard(chosen, first=self.first_rank)
        return [
            self._piece(part, num_tokens / dist.world_size()) for part in split(mine, self.gradient_accumulation_steps)
        ]

    def _piece(self, examples: Sequence[Example], mean_num_tokens: float) -> SftBatch:
        clips = [self.clip_of(example) for example in examples]
        rows = [
            PromptRow(index, turn.prompt, turn.answer, turn.history)
            for index, example in enumerate(examples)
            for turn in example.turns
        ]
        names = tuple(str(example.video) for example in examples)
        return SftBatch(self.processor.collate(rows, clips), mean_num_tokens, names)


def batch_at(items: Sequence[Item], step: int, *, batch_size: int, seed: int) -> list[Item]:
    """The items of a step's batch over all ranks: every epoch deals all of them in an order of its own."""
    places = (divmod(index, len(items)) for index in range(step * batch_size, (step + 1) * batch_size))
    return [items[_shuffled(len(items), seed, epoch)[place]] for epoch, place in places]


def split(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """Items in order in `count` parts of sizes as even as can be; none of them is empty."""
    cuts = [len(items) * number // count for number in range(count + 1)]
    return [items[start:end] for start, end in pairwise(cuts) if start < end]


@functools.lru_cache(maxsize=4)
def _shuffled(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return tuple(order)


def sft_loss(model: nn.Module, batch: SftBatch) -> tuple[Tensor, Mapping[str, float]]:
    """Cross-entropy, the mean over all answer tokens of the step's batch on all ranks."""
    inputs = batch.inputs.to(dist.device())
    return -model(inputs).sum() / batch.mean_num_tokens, {}
