"""Prompts, and the chat format that a language model was taught them in."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from salmonn.caption.tokenizer import CLIP_END, CLIP_START

DESCRIBE = "Describe the video and its sounds in detail."
DESCRIBE_VISUAL = "Describe what can be seen in detail."
DESCRIBE_AUDIO = "Describe what can be heard in detail."
LIST_EVENTS = "List the events."


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, placeholders: Sequence[int], system: str
) -> list[int]:
    """Token ids of a user's turn about one clip, up to where the answer begins.

    Args:
        tokenizer: with a chat template and the clip's special tokens.
        prompt: the user's words.
        placeholders: (N,) ids that stand for the clip's tokens.
        system: what the conversation begins with; "" for nothing.

    Raises:
        ValueError: the words hold a special token, which would be taken for a clip or the end of a turn.
    """
    for special in tokenizer.all_special_tokens:
        if special in prompt:
            raise ValueError(f"the prompt holds the special token {special}: leave it out")
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": f"{CLIP_START}{CLIP_END}\n{prompt}"})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, after = text.split(f"{CLIP_START}{CLIP_END}", 1)
    start, end = (
        tokenizer.encode(piece, add_special_tokens=False) for piece in (before + CLIP_START, CLIP_END + after)
    )
    return [*start, *placeholders, *end]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer, closed by the end of the turn."""
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
