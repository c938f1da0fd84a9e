"""Who judges, where, and at what cost: read by command lines and recipes before anything heavy is imported."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

JudgeKind = Literal["rule", "openai"]
ProtocolName = Literal["salmonn", "published"]


@dataclass(frozen=True)
class LLMConfig:
    """A language model on an OpenAI-compatible server.

    Args:
        model: name of the language model, as its server knows it.
        base_url: address of the server, such as http://localhost:8000/v1; none is OpenAI's own. The key is read from
            the environment variable OPENAI_API_KEY.
        concurrency: requests under way at once.
        temperature: of the model; null leaves it to the server, as some models ask for.
        max_reply_tokens: longest reply; the default is 4096, and no limit on OpenAI's own server, whose newer
            models refuse one.
        structured: whether replies are asked for by JSON schema: auto does, until the server refuses.
        timeout_seconds: of one request.
        retry_seconds: how long one question is tried again where the server is busy, failing or away.
        max_requests: spend cap: the run stops before it asks more often, retries included.
        max_tokens: spend cap in tokens, of prompts and replies; what is under way when it is reached still counts.
        cache: file that keeps every reply, so that no question is asked twice.
    """

    model: str = ""
    base_url: str | None = None
    concurrency: int = 8
    temperature: float | None = 0.0
    max_reply_tokens: int | None = None
    structured: Literal["auto", "always", "never"] = "auto"
    timeout_seconds: float = 120.0
    retry_seconds: float = 600.0
    max_requests: int | None = None
    max_tokens: int | None = None
    cache: Path = Path("~/.cache/salmonn/replies.sqlite")

    @property
    def reply_token_limit(self) -> int | None:
        """In tokens. Servers at home cut off at 1,024 by themselves, or never."""
        return self.max_reply_tokens or (4096 if self.base_url else None)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or min(self.timeout_seconds, self.retry_seconds) <= 0:
            raise ValueError(
                "concurrency must be at least 1, timeout_seconds and retry_seconds above 0, got "
                f"{self.concurrency}, {self.timeout_seconds} and {self.retry_seconds}"
            )
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if any(cap is not None and cap < 1 for cap in (self.max_requests, self.max_tokens, self.max_reply_tokens)):
            raise ValueError("max_requests, max_tokens and max_reply_tokens must be at least 1 where they are given")
        address = urlsplit(self.base_url or "https://localhost")
        if address.scheme not in ("http", "https") or not address.hostname or address.username:
            raise ValueError(
                f"base_url must be an address such as http://localhost:8000/v1, got {self.base_url!r}; a key belongs "
                "into the environment variable OPENAI_API_KEY"
            )


@dataclass(frozen=True)
class JudgeConfig(LLMConfig):
    """Who judges captions, and at what cost.

    Args:
        kind: rule reads captions of synthetic clips, offline; openai asks a language model on any OpenAI-compatible
            server.
        attempts: how often a caption is asked about, the fault of the reply before being named, until it is unscored.
    """

    kind: JudgeKind = "rule"
    attempts: int = 3

    def essential(self) -> "JudgeConfig":
        """What the scores depend on; the rest, which may change while a run is under way, as by default."""
        usual = JudgeConfig()
        return replace(
            self,
            concurrency=usual.concurrency,
            timeout_seconds=usual.timeout_seconds,
            retry_seconds=usual.retry_seconds,
            max_requests=None,
            max_tokens=None,
            cache=usual.cache,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "openai" and not self.model:
            raise ValueError("the judge openai needs a model, by the name that its server knows it by: give --model")
        if self.kind == "rule" and (self.model or self.base_url or self.max_requests or self.max_tokens):
            raise ValueError("the judge rule asks no model: give --judge openai, or leave out model, address and caps")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
