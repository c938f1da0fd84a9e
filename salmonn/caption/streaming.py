"""Answers in words: whole, or as they come, side by side with others that may join at any time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from salmonn.caption.generate import DecodeBatch, Sampling
from salmonn.caption.processor import Processor, PromptRow
from salmonn.caption.prompt import IncrementalDetokenizer, Prompt
from salmonn.model.layout import ClipFeatures, ClipInputs, ModelInputs
from salmonn.model.network import Network


@dataclass(frozen=True)
class Completion:
    """What the model said; `finished` is False where it ran into the token limit."""

    text: str
    finished: bool


@dataclass(frozen=True)
class TextDelta:
    """What has come of an answer since the last piece; `answer` is the whole, once it has ended."""

    text: str
    answer: Completion | None = None


class StreamingGenerator:
    """Answers under way side by side, word by word; more may join between two words. False when all have ended.

    Args:
        network: in evaluation mode.
        processor: of the same model.
    """

    def __init__(self, network: Network, processor: Processor) -> None:
        self._processor = processor
        self._device = network.device
        self._generation = DecodeBatch(network, stop_ids=processor.stop_ids)
        self._said: dict[int, _Said] = {}

    def __bool__(self) -> bool:
        return bool(self._generation)

    def join(
        self,
        clips: Sequence[ClipInputs | ClipFeatures],
        prompts: Sequence[str | Prompt],
        *,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> range:
        """Begin to answer prompts[i] on clips[i]; where that fails, those under way are as they were.

        Args:
            clips: media, or blocks. What stands there several times is read once for all of its prompts.
            prompts: as many as clips.
            sampling: how the answers are drawn.
            seeds: of the draws on each clip.

        Returns:
            Numbers by which `step` knows the answers.
        """
        inputs = collate(self._processor, clips, prompts).to(self._device)
        numbers = self._generation.join(inputs, sampling=sampling, seeds=seeds)
        self._said |= {number: _Said(IncrementalDetokenizer(self._processor.tokenizer), sampling) for number in numbers}
        return numbers

    def step(self, dropped: Collection[int] = ()) -> dict[int, TextDelta]:
        """One more token of each answer, and what has come of it in letters; an answer's last piece holds the whole.

        Args:
            dropped: numbers of answers that nobody waits for any more; they end here.
        """
        drawn = self._generation.step(dropped)
        self._said = {number: said for number, said in self._said.items() if number in drawn}
        pieces = {}
        for number, token in drawn.items():
            said = self._said[number]
            said.ids.append(token)
            ended = token in self._processor.stop_ids or len(said.ids) == said.sampling.max_new_tokens
            answer = to_completion(self._processor, said.ids) if ended else None
            text = said.stream.finalize(answer.text) if answer else said.stream.add(token)
            if text or answer:
                pieces[number] = TextDelta(text, answer)
        return pieces


class _Said:
    """What has come of an answer."""

    def __init__(self, stream: IncrementalDetokenizer, sampling: Sampling) -> None:
        self.ids: list[int] = []
        self.stream = stream
        self.sampling = sampling


def collate(
    processor: Processor, clips: Sequence[ClipInputs | ClipFeatures], prompts: Sequence[str | Prompt]
) -> ModelInputs:
    """Prompts[i] on clips[i] as the network takes them; a clip that stands there several times is in it once."""
    different = {id(clip): clip for clip in clips}
    places = {key: place for place, key in enumerate(different)}
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    rows = [
        PromptRow(places[id(clip)], prompt.text, history=prompt.history, system=prompt.system)
        for clip, prompt in zip(clips, asked, strict=True)
    ]
    return processor.collate(rows, list(different.values()))


def to_completion(processor: Processor, ids: Sequence[int]) -> Completion:
    """The words of an answer's token ids."""
    text = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Completion(text, finished=ids[-1] in processor.stop_ids)
