"""Streaming generation of text: completions whole, or as they grow, with requests added at any time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from salmonn.caption.constraint import is_json
from salmonn.caption.generate import DecodeBatch, SampledToken
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import Processor, PromptRow
from salmonn.caption.prompt import IncrementalDetokenizer, Prompt, find_stop
from salmonn.model.layout import ClipFeatures, ClipInfo, ClipInputs, ModelInputs
from salmonn.model.network import Network


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Args:
        text: the text.
        finished: False if it was cut off at the token limit.
        clip: what is known about the clip that it is about.
        tokens: all generated tokens, the end token included, if `Sampling.logprobs` asks for log-probabilities.
    """

    text: str
    finished: bool
    clip: ClipInfo = field(default_factory=ClipInfo)
    tokens: tuple[SampledToken, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """The text that was added since the last delta.

    Args:
        text: the text.
        completion: the whole text, in the last delta only.
        tokens: the tokens since the last delta, if `Sampling.logprobs` asks for log-probabilities.
    """

    text: str
    completion: Completion | None = None
    tokens: tuple[SampledToken, ...] = ()


class StreamingGenerator:
    """A `DecodeBatch` that yields text. False once all completions have ended.

    Args:
        network: network in evaluation mode.
        processor: processor of the same model.
        whole: yield only whole completions, without the work of converting each token to text.
    """

    def __init__(self, network: Network, processor: Processor, *, whole: bool = False) -> None:
        self._processor = processor
        self._whole = whole
        self._device = network.device
        self._batch = DecodeBatch(network, stop_ids=processor.stop_ids)
        self._texts: dict[int, _PartialText] = {}
        self._stopped: set[int] = set()  # rows to end before the next step

    def __bool__(self) -> bool:
        return bool(self._batch)

    def add(
        self,
        clips: Sequence[ClipInputs | ClipFeatures],
        prompts: Sequence[str | Prompt],
        *,
        sampling: Sampling,
        seeds: Sequence[int | tuple[int, int]],
    ) -> range:
        """Prefill B prompts and add them to the batch; if that fails, the batch is unchanged.

        Args:
            clips: (B,) clips; one that occurs several times is prefilled once for all its prompts.
            prompts: (B,) prompts.
            sampling: sampling parameters.
            seeds: (B,) random seeds, or seeds with the numbers of samples.

        Returns:
            B row numbers, which `step` uses.
        """
        if sampling.json_schema is not None:
            self._batch.grammars = self._processor.json_grammars
        self._batch.stop_ids = self._processor.stop_ids
        inputs = collate(self._processor, clips, prompts).to(self._device)
        rows = self._batch.add(inputs, sampling=sampling, seeds=seeds)
        for row, clip in zip(rows, clips, strict=True):
            detokenizer = IncrementalDetokenizer(self._processor.tokenizer, stop=sampling.stop)
            self._texts[row] = _PartialText(detokenizer, sampling, clip.info)
        return rows

    @property
    def num_stored_tokens(self) -> int:
        """Number of tokens that the KV cache has memory for, in use or not."""
        return self._batch.num_stored_tokens

    def clear(self) -> None:
        """Remove all rows; on a GPU, memory and recorded decode steps are kept for others."""
        self._texts, self._stopped = {}, set()
        self._batch.clear()

    def restart(self) -> None:
        """Let what comes next be decoded as in a new batch, to the last bit."""
        self._batch.decoder.restart()

    def release_unused(self) -> None:
        """Release memory of the KV cache if at most half of it is in use."""
        self._batch.release_unused()

    def step(self, cancelled: Collection[int] = ()) -> dict[int, TextDelta]:
        """Generate one token for each active row.

        Args:
            cancelled: numbers of rows to end without a completion.

        Returns:
            The deltas by row number; a row whose new token does not complete a character has none.
        """
        tokens = self._batch.step({*cancelled, *self._stopped})
        self._stopped = set()
        self._texts = {row: text for row, text in self._texts.items() if row in tokens}
        deltas = {}
        for row, token in tokens.items():
            text = self._texts[row]
            text.tokens.append(token)
            has_ended = token.id in self._processor.stop_ids or len(text.tokens) == text.sampling.max_new_tokens
            is_needed = not self._whole or bool(text.sampling.stop)
            added = text.detokenizer.add(token.id) if is_needed and not has_ended else ""
            if text.detokenizer.is_stopped:
                self._stopped.add(row)
                has_ended = True
            completion = None
            if has_ended:
                completion = to_completion(self._processor, text.tokens, text.clip, sampling=text.sampling)
                added += text.detokenizer.finalize(completion.text)
            if completion or (added and not self._whole):
                deltas[row] = TextDelta(added, completion, text.take_tokens())
        return deltas


@dataclass
class _PartialText:
    """A row's tokens so far, and their conversion to text."""

    detokenizer: IncrementalDetokenizer
    sampling: Sampling
    clip: ClipInfo
    tokens: list[SampledToken] = field(default_factory=list)
    num_taken: int = 0

    def take_tokens(self) -> tuple[SampledToken, ...]:
        """Return the tokens since the last call, if they have log-probabilities."""
        taken = tuple(self.tokens[self.num_taken :])
        self.num_taken = len(self.tokens)
        return taken if self.sampling.logprobs is not None else ()


def collate(
    processor: Processor, clips: Sequence[ClipInputs | ClipFeatures], prompts: Sequence[str | Prompt]
) -> ModelInputs:
    """Collate prompts[i] about clips[i]; a clip that occurs several times is included once."""
    unique = {id(clip): clip for clip in clips}
    index = {key: number for number, key in enumerate(unique)}
    rows: dict[tuple[int, int | str], PromptRow] = {}
    keys = []
    for clip, given in zip(clips, prompts, strict=True):
        # Samples have the same prompt: a clip may have 40,000 tokens, and is converted once.
        keys.append((id(clip), given if isinstance(given, str) else id(given)))
        if keys[-1] not in rows:
            prompt = Prompt(given) if isinstance(given, str) else given
            rows[keys[-1]] = PromptRow(
                index[id(clip)], prompt.text, history=prompt.history, system=prompt.system, clip_turn=prompt.clip_turn
            )
    inputs = processor.collate(list(rows.values()), list(unique.values()))
    if len(rows) == len(keys):
        return inputs
    numbers = {key: number for number, key in enumerate(rows)}
    return inputs.select([numbers[key] for key in keys])


def to_completion(
    processor: Processor, tokens: Sequence[SampledToken], clip: ClipInfo, *, sampling: Sampling
) -> Completion:
    """Decode the tokens of a completion, up to the first stop string."""
    # White space at the end is kept until the search: it may belong to a stop string.
    text = processor.tokenizer.decode([token.id for token in tokens], skip_special_tokens=True).lstrip()
    end = find_stop(text, sampling.stop)
    finished = end is not None or tokens[-1].id in processor.stop_ids
    if end is None and sampling.json_schema is not None:
        finished = is_json(text)  # a grammar that is too complex may have ended it early
    return Completion(text[:end].rstrip(), finished, clip, () if sampling.logprobs is None else tuple(tokens))
