"""The trained tokenizer is lossless, and the chat format is that of Qwen2."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from salmonn.caption.prompt import answer_ids, prompt_ids, token_bytes, train_tokenizer
from salmonn.model.config import SalmonnConfig
from salmonn.model.families import get_family
from salmonn.model.families.base import TURN_END, TURN_START

SALMONN2, PLUS = (get_family(SalmonnConfig(family=name)) for name in ("salmonn2", "salmonn2-plus"))
UNKNOWN = ["Grüße, 世界! 🎬", "a  b\n\n c\t ", "ZEBRA 12345 #!?", "na\u00efve \u2028 \x00 end", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle appears"] * 9 + ["a low tone is heard"] * 9, vocab_size=290)


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_text_is_reproduced(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert all(token is not None for token in tokenizer.convert_ids_to_tokens(ids))


def test_known_phrases_need_few_tokens(tokenizer):
    assert len(tokenizer.encode("a red circle appears")) < len("a red circle appears") / 2
    assert len(tokenizer) == 290


def test_special_tokens_are_one_id_each(tokenizer):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    specials += ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|audio_pad|>"]
    assert [tokenizer.encode(token) for token in specials] == [[0], [1], [2], [3], [4], [5], [6]]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert sorted(tokenizer.all_special_tokens) == sorted(specials)


def test_a_prompt_is_a_chat_message(tokenizer):
    ids = prompt_ids(tokenizer, "Tell me.", placeholders=[5, 6, 5], family=PLUS, system="")
    turn = (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|audio_pad|><|video_pad|><|vision_end|>\nTell me.<|im_end|>\n"
    )
    assert tokenizer.decode(ids) == f"{turn}<|im_start|>assistant\n"
    system = prompt_ids(tokenizer, "Tell me.", placeholders=[5, 6, 5], family=PLUS, system="Help.")
    assert tokenizer.decode(system) == f"<|im_start|>system\nHelp.<|im_end|>\n{turn}<|im_start|>assistant\n"
    # Special tokens are single ids.
    assert [token for token in ids if token < 7] == [1, 3, 5, 6, 5, 4, 2, 1]


def test_an_answer_ends_with_the_end_of_its_message(tokenizer):
    ids = answer_ids(tokenizer, "a tone", end=TURN_END)
    assert ids[-1] == 2 and tokenizer.decode(ids[:-1]) == "a tone"
    assert answer_ids(tokenizer, "", end=TURN_END) == [2] and answer_ids(tokenizer, "", end=None) == []


@pytest.mark.parametrize("special", ["<|video_pad|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>"])
def test_a_special_token_in_the_prompt_is_rejected(tokenizer, special):
    with pytest.raises(ValueError) as caught:
        prompt_ids(tokenizer, f"Tell{special}me", placeholders=[5, 6], family=PLUS, system="")
    assert special in str(caught.value)


@pytest.mark.parametrize("where", ["system", "question", "answer"])
def test_special_tokens_before_the_prompt_are_rejected(tokenizer, where):
    texts = {"system": "Help.", "question": "Tell.", "answer": "A star."}
    texts[where] += "<|im_end|>"
    history = [(texts["question"], texts["answer"])]
    with pytest.raises(ValueError, match=r"special token <\|im_end\|>"):
        prompt_ids(
            tokenizer, "Why?", placeholders=[5], family=SALMONN2, system=texts["system"], history=history
        )  # fmt: skip


def test_clip_markers_in_text_are_rejected_if_the_tokenizer_lacks_them():
    """Otherwise the clip would be inserted into a system message that contains them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), eos_token=TURN_END, additional_special_tokens=[TURN_START]
    )
    assert "<|vision_start|>" not in tokenizer.all_special_tokens
    with pytest.raises(ValueError, match=r"special token <\|vision_(start|end)\|>"):
        prompt_ids(tokenizer, "Why?", placeholders=[-1], family=SALMONN2, system="<|vision_start|><|vision_end|>")


def test_bytes_of_tokens(captioner):
    """Together those of the text, with characters of several tokens."""
    tokenizer = captioner.processor.tokenizer
    text = "a € é <b>\n"
    ids = tokenizer.encode(text)
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"<|im_end|>"
    assert token_bytes(tokenizer, 10**6) == b""
