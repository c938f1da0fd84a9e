"""The tokenizer of models made here: byte-level BPE with the chat format of Qwen2 and placeholders for clip tokens.

A model that starts from a published language model brings its own tokenizer; this one is for training from nothing.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# As Qwen2.5-VL and video-SALMONN 2+ name them.
CLIP_START, CLIP_END, SEEN, HEARD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|audio_pad|>"
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
        special_tokens=[PAD, TURN_START, TURN_END, CLIP_START, CLIP_END, SEEN, HEARD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return with_chat(tokenizer)


def with_chat(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that has the special tokens, as transformers takes it, with the chat format."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, CLIP_START, CLIP_END, SEEN, HEARD],
        chat_template=CHAT_TEMPLATE,
    )
