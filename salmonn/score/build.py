"""A judge from its configuration."""

from dataclasses import dataclass, replace
from typing import Literal

from salmonn.score.chat import Chat, ChatConfig
from salmonn.score.judge import Judge
from salmonn.score.llm import EventForm, LlmJudge
from salmonn.score.published import FORMS
from salmonn.score.rule import RuleJudge

JudgeKind = Literal["rule", "openai"]


@dataclass(frozen=True)
class JudgeConfig(ChatConfig):
    """Who judges captions, and at what cost.

    Args:
        kind: rule reads captions of synthetic clips, offline; openai asks a language model on any OpenAI-compatible
            server.
        attempts: how often a caption is asked about, the fault of the reply before being named, until it is unscored.
    """

    kind: JudgeKind = "rule"
    attempts: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "openai" and not self.model:
            raise ValueError("the judge openai needs a model, by the name that its server knows it by: give --model")
        if self.kind == "rule" and (self.model or self.base_url):
            raise ValueError("the judge rule asks no model: give --judge openai, or neither --model nor --base-url")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")


def make_judge(config: JudgeConfig, *, published: bool = False, processes: int = 1) -> Judge:
    """The judge that the configuration names.

    Args:
        config: who, and at what cost.
        published: whether a language model is asked, and its replies are read, as the published scorer does.
        processes: how many of them share the caps and the concurrency.
    """
    if config.kind == "rule":
        return RuleJudge()
    chat = make_chat(config, processes=processes)
    if published:
        return LlmJudge(chat, forms=FORMS, names_faults=False)
    return LlmJudge(chat, forms=[EventForm()] * config.attempts)


def make_chat(config: JudgeConfig, *, processes: int = 1) -> Chat:
    """The language model that the configuration names; caps and concurrency are one process's share.

    Raises:
        ValueError: a cap is too small to be shared.
    """

    def share(cap: int | None) -> int | None:
        if cap is not None and cap < processes:
            raise ValueError(f"{processes} processes cannot share a cap of {cap}: raise max_requests or max_tokens")
        return None if cap is None else cap // processes

    return Chat(
        replace(
            config,
            concurrency=max(1, config.concurrency // processes),
            max_requests=share(config.max_requests),
            max_tokens=share(config.max_tokens),
        )
    )
