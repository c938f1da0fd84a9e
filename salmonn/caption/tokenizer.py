"""The tokenizer of models made here: byte-level BPE with the chat format of Qwen2 and placeholders for clip tokens.

A model that starts from a published language model brings its own tokenizer; this one is for training from nothing.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# As Qwen2.5-VL and video-SALMONN 2+ name them.
CLIP_START, CLIP_END, VIDEO_PAD, AUDIO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|audio_pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on texts; any other text still splits into bytes, so nothing is unknown."""
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
    """A tokenizer that has the special tokens, as transformers takes it, with the chat format."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, CLIP_START, CLIP_END, VIDEO_PAD, AUDIO_PAD],
        chat_template=CHAT_TEMPLATE,
    )


class IncrementalDetokenizer:
    """An answer's text, token by token: together the pieces are the whole answer, stripped as it is.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._told = ""
        self._held = ""  # blanks, which may turn out to be the last

    def add(self, token: int) -> str:
        """What is new, "" while a token is half a letter."""
        text = self._held + (self._stream.step(self._tokenizer, token) or "")
        if not self._told:
            text = text.lstrip()
        piece = text.rstrip()
        self._held = text[len(piece) :]
        self._told += piece
        return piece

    def end(self, text: str) -> str:
        """What is still to be told of the whole answer `text`."""
        return text.removeprefix(self._told)
