"""The chat format that the language models were taught in, with a clip at the head of the conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from salmonn.caption.tokenizer import CHAT_TEMPLATE, CLIP_END, CLIP_START, TURN_END
from salmonn.model.config import Family

LIST_EVENTS = "List the events."
History = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Prompt:
    """What is asked of a clip.

    Args:
        words: the user's.
        history: prompts and answers on the same clip that come before.
        system: what the conversation begins with, "" for nothing; None takes the model's own.
    """

    words: str
    history: History = ()
    system: str | None = None

    @property
    def texts(self) -> list[str]:
        """All that was written."""
        return [*(text for turn in self.history for text in turn), self.system or "", self.words]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    placeholders: Sequence[int],
    family: Family,
    system: str,
    history: History = (),
) -> list[int]:
    """Token ids of a conversation about one clip, up to where the next answer begins.

    Args:
        tokenizer: of the model.
        prompt: the user's words.
        placeholders: (N,) ids that stand for the clip's tokens.
        family: salmonn2-plus has a token before and after the clip; salmonn2 has none, but two line breaks after.
        system: what the conversation begins with; "" for nothing.
        history: prompts and answers before this prompt.

    Raises:
        ValueError: the words hold a special token, which would be taken for a clip or the end of a turn.
    """
    prompts = [*(asked for asked, _ in history), prompt]
    answers = [answer for _, answer in history]
    refuse_special_tokens(tokenizer, [*prompts, *answers, system], what="prompt", placeholders=placeholders)
    clip = f"{CLIP_START}{CLIP_END}"
    turns = [{"role": "system", "content": system}] if system else []
    for number, words in enumerate(prompts):
        turns.append({"role": "user", "content": f"{clip}\n{words}" if number == 0 else words})
        turns += [{"role": "assistant", "content": answer} for answer in answers[number : number + 1]]
    # The template is the published one; that of a tokenizer may tell of tools, or take other contents.
    text = tokenizer.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True)
    before, after = text.split(clip, 1)
    pieces = [before, "\n", after] if family == "salmonn2" else [before + CLIP_START, CLIP_END + after]
    # Encoded one by one: together, two line breaks would be one token.
    head, *rest = (tokenizer.encode(piece, add_special_tokens=False) for piece in pieces)
    return [*head, *placeholders, *(token for piece in rest for token in piece)]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer, closed by the end of the turn.

    Raises:
        ValueError: it holds a special token.
    """
    refuse_special_tokens(tokenizer, [answer], what="answer")
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.convert_tokens_to_ids(TURN_END)]


def refuse_special_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, what: str, placeholders: Sequence[int] = ()
) -> None:
    """Raise a ValueError where texts hold a special token, or one of the tokens that stand for a clip's."""
    known = sorted({token for token in placeholders if token >= 0})
    # The clip's place is found by its two marks, which a tokenizer without them takes for letters.
    for special in {CLIP_START, CLIP_END, *tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(known)}:
        if any(special in text for text in texts):
            raise ValueError(f"the {what} holds the special token {special}: leave it out")
