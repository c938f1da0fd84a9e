"""Chat format of prompts and answers about one clip, and the tokenizer of models that are trained from scratch.

A model that starts from a published language model brings its own tokenizer. The one trained here is a byte-level BPE
with the chat format of Qwen2 and placeholders for clip tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from salmonn.caption.generator import History
from salmonn.model.families.base import (
    AUDIO_PAD,
    CHAT_TEMPLATE,
    CLIP_END,
    CLIP_START,
    PAD,
    TURN_END,
    TURN_START,
    VIDEO_PAD,
    Family,
)

LIST_EVENTS = "List the events."
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class Prompt:
    """User message about a clip, and the conversation before it.

    Args:
        text: the user message.
        history: earlier prompts and answers about the same clip.
        system: system message, "" for none; None for the model's default.
        clip_turn: number of the user message, from 0, that shows the clip.
    """

    text: str
    history: History = ()
    system: str | None = None
    clip_turn: int = 0

    @property
    def texts(self) -> list[str]:
        """All texts of the conversation."""
        return [*(text for turn in self.history for text in turn), self.system or "", self.text]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    placeholders: Sequence[int],
    family: Family,
    system: str,
    history: History = (),
    clip_turn: int = 0,
) -> list[int]:
    """Tokenize a conversation about one clip, up to the start of the next answer.

    Args:
        tokenizer: tokenizer of the model.
        prompt: the user message.
        placeholders: (N,) ids that stand for the clip's tokens.
        family: the model's family, which puts markers around the clip.
        system: system message; "" for none.
        history: earlier prompts and answers.
        clip_turn: see `Prompt`.

    Raises:
        ValueError: a text contains a special token, which would be taken for a clip or the end of a message.
    """
    prompts = [*(earlier for earlier, _ in history), prompt]
    answers = [answer for _, answer in history]
    refuse_special_tokens(tokenizer, [*prompts, *answers, system], what="prompt", placeholders=placeholders)
    clip = f"{CLIP_START}{CLIP_END}"
    messages = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(prompts):
        messages.append({"role": "user", "content": f"{clip}\n{text}" if number == clip_turn else text})
        messages += [{"role": "assistant", "content": answer} for answer in answers[number : number + 1]]
    # The published template. A tokenizer's own may add tools or expect structured content.
    chat = tokenizer.apply_chat_template(
        messages, chat_template=family.chat_template, tokenize=False, add_generation_prompt=True
    )
    before, after = family.surround_clip(*chat.split(clip, 1))
    head, *tail = (tokenizer.encode(text, add_special_tokens=False) for text in (before, *after))
    return [*head, *placeholders, *(token for ids in tail for token in ids)]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, *, end: str | None) -> list[int]:
    """Tokenize an answer and the token that ends its message; None for an answer without an end.

    Raises:
        ValueError: the answer contains a special token.
    """
    refuse_special_tokens(tokenizer, [answer], what="answer")
    end_ids = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    return [*tokenizer.encode(answer, add_special_tokens=False), *end_ids]


def refuse_special_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, what: str, placeholders: Sequence[int] = ()
) -> None:
    """Raise a ValueError if a text contains a special token or the text of a placeholder."""
    known = sorted({token for token in placeholders if token >= 0})
    # The clip is located by its two markers, which are plain text for a tokenizer without them.
    for special in {CLIP_START, CLIP_END, *tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(known)}:
        if any(special in text for text in texts):
            raise ValueError(f"the {what} contains the special token {special}; remove it")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; text that it was not trained on falls back to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_START, TURN_END, CLIP_START, CLIP_END, VIDEO_PAD, AUDIO_PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer that has the special tokens for transformers, with the chat format."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, CLIP_START, CLIP_END, VIDEO_PAD, AUDIO_PAD],
        chat_template=CHAT_TEMPLATE,
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes that a token of a byte-level BPE stands for; a character may be cut between two tokens."""
    text = tokenizer.convert_ids_to_tokens(token) or ""  # a model may have more ids than its tokenizer
    if token in tokenizer.added_tokens_decoder:
        return text.encode()
    return bytes(_BYTES[character] for character in text)


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first of some stop strings begins in a text."""
    found = [start for one in stop if (start := text.find(one)) >= 0]
    return min(found, default=None)


class IncrementalDetokenizer:
    """Detokenizer of one answer while it is generated; its parts concatenate to the stripped answer.

    Args:
        tokenizer: tokenizer of the model.
        stop: strings that end the answer.

    Attributes:
        is_stopped: whether a stop string has ended the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._emitted = ""
        # Whitespace, which is dropped at the end of the answer, and what may be the beginning of a stop string.
        self._held_back = ""

    def add(self, token: int) -> str:
        """Return the text that a token completes, "" after an incomplete character."""
        text = self._held_back + (self._stream.step(self._tokenizer, token) or "")
        if not self._emitted:
            text = text.lstrip()
        end = find_stop(text, self._stop)
        self.is_stopped = end is not None
        if end is None:
            beginnings = [one[:length] for one in self._stop for length in range(1, len(one))]
            end = len(text) - max((len(one) for one in beginnings if text.endswith(one)), default=0)
        new = text[:end].rstrip()
        self._held_back = text[len(new) :]
        self._emitted += new
        return new

    def finalize(self, answer: str) -> str:
        """Return the rest of the whole answer."""
        return answer.removeprefix(self._emitted)
