"""A judge from its configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from salmonn.score.judge import Judge
from salmonn.score.rule import RuleJudge

JudgeKind = Literal["rule", "openai"]


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges captions, and at what cost.

    Args:
        kind: rule reads captions of synthetic clips, offline; openai asks a language model on any OpenAI-compatible
            server.
        model: name of the language model, as its server knows it.
        base_url: address of the server, such as http://localhost:8000/v1; none is OpenAI's own. The key is read from
            the environment variable OPENAI_API_KEY.
        concurrency: requests under way at once.
        attempts: how often a caption is asked about, the fault of the reply before being named, until it is unscored.
        temperature: of the model; none leaves it to the server, as some models ask for.
        reply_tokens: longest reply; none leaves it to the server.
        structured: whether replies are asked for by JSON schema: auto does, until the server refuses.
        timeout_seconds: of one request.
        retry_seconds: how long one question is tried again where the server is busy, failing or away.
        max_requests: spend cap: the run stops before it asks more often, retries included.
        max_tokens: spend cap in tokens, of prompts and replies; what is under way when it is reached still counts.
        cache: file that keeps every reply, so that no question is asked twice.
    """

    kind: JudgeKind = "rule"
    model: str = ""
    base_url: str | None = None
    concurrency: int = 8
    attempts: int = 3
    temperature: float | None = 0.0
    reply_tokens: int | None = None
    structured: Literal["auto", "always", "never"] = "auto"
    timeout_seconds: float = 120.0
    retry_seconds: float = 600.0
    max_requests: int | None = None
    max_tokens: int | None = None
    cache: Path = Path.home() / ".cache" / "salmonn" / "judge.sqlite"

    def __post_init__(self) -> None:
        if self.kind == "openai" and not self.model:
            raise ValueError("the judge openai needs --model, the name of a model as its server knows it")
        if min(self.concurrency, self.attempts) < 1 or min(self.timeout_seconds, self.retry_seconds) <= 0:
            raise ValueError(
                "concurrency and attempts must be at least 1, timeout_seconds and retry_seconds above 0, got "
                f"{self.concurrency}, {self.attempts}, {self.timeout_seconds} and {self.retry_seconds}"
            )
        if any(cap is not None and cap < 1 for cap in (self.max_requests, self.max_tokens, self.reply_tokens)):
            raise ValueError("max_requests, max_tokens and reply_tokens must be at least 1 where they are given")


def make_judge(config: JudgeConfig) -> Judge:
    """The judge that the configuration names."""
    return RuleJudge()
