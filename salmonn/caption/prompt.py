"""Prompts, and the chat format that a language model was taught them in."""

from transformers import PreTrainedTokenizerBase

from salmonn.caption.tokenizer import CLIP, CLIP_END, CLIP_START

DESCRIBE = "Describe the video and its sounds in detail."
DESCRIBE_VISUAL = "Describe what can be seen in detail."
DESCRIBE_AUDIO = "Describe what can be heard in detail."
LIST_EVENTS = "List the events."


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_clip_tokens: int) -> list[int]:
    """Token ids of a user's turn about one clip, up to where the answer begins.

    Args:
        tokenizer: with a chat template and the clip's special tokens.
        prompt: the user's words.
        num_clip_tokens: N placeholders for the clip's tokens.

    Raises:
        ValueError: the words hold a special token, which would be taken for a clip or the end of a turn.
    """
    for special in tokenizer.all_special_tokens:
        if special in prompt:
            raise ValueError(f"the prompt holds the special token {special}: leave it out")
    content = f"{CLIP_START}{CLIP * num_clip_tokens}{CLIP_END}{prompt}"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer, closed by the end of the turn."""
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
