"""Judge and language model settings, read by command lines and recipes before anything slow is imported."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from salmonn.config import MAY_CHANGE

JudgeKind = Literal["rule", "openai"]
ProtocolName = Literal["salmonn", "published"]


@dataclass(frozen=True)
class LLMConfig:
    """A language model on an OpenAI-compatible server.

    Args:
        model: name of the model on its server.
        base_url: address of the server, such as http://localhost:8000/v1; OpenAI's own by default.
        api_key_env: name of the environment variable with the server's API key. By default, OPENAI_API_KEY is sent to
            OpenAI, or to the address in OPENAI_BASE_URL, and no key to any other server.
        concurrency: number of concurrent requests.
        seed: added to the seed of each request; null sends no seeds.
        temperature: sampling temperature; null uses the server's default, which some models require.
        max_reply_tokens: token limit per reply; null sends none, and auto sends 4096, or none to OpenAI's own server,
            whose newer models reject one.
        structured: whether requests include a JSON schema for the reply; auto asks for any JSON object, then for
            nothing, if the server rejects it.
        timeout_seconds: time limit per request.
        retry_seconds: how long a request is retried while the server is busy, failing or unreachable.
        max_requests: spend cap: maximum number of requests in a run, retries included.
        max_tokens: spend cap: maximum number of tokens in a run, in prompts and replies; requests in flight when it
            is reached still count.
        cache: file in which all replies are saved and looked up.
    """

    model: str = ""
    base_url: str | None = None
    api_key_env: str | None = field(default=None, metadata=MAY_CHANGE)
    concurrency: int = field(default=8, metadata=MAY_CHANGE)
    seed: int | None = 0
    temperature: float | None = 0.0
    max_reply_tokens: int | Literal["auto"] | None = "auto"
    structured: Literal["auto", "always", "never"] = "auto"
    timeout_seconds: float = field(default=120.0, metadata=MAY_CHANGE)
    retry_seconds: float = field(default=600.0, metadata=MAY_CHANGE)
    max_requests: int | None = field(default=None, metadata=MAY_CHANGE)
    max_tokens: int | None = field(default=None, metadata=MAY_CHANGE)
    cache: Path = field(default=Path("~/.cache/salmonn/replies.sqlite"), metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or min(self.timeout_seconds, self.retry_seconds) <= 0:
            raise ValueError(
                "concurrency must be at least 1, timeout_seconds and retry_seconds above 0, got "
                f"{self.concurrency}, {self.timeout_seconds} and {self.retry_seconds}"
            )
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more, or null, got {self.seed}")
        caps = (self.max_requests, self.max_tokens, self.max_reply_tokens)
        if any(isinstance(cap, int) and cap < 1 for cap in caps):
            raise ValueError("max_requests, max_tokens and max_reply_tokens must be at least 1 if given")
        if self.base_url is not None:
            _check_address(self.base_url)
        if self.api_key_env is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env takes the name of an environment variable, such as VLLM_API_KEY, and not the key itself"
            )

    @property
    def reply_token_limit(self) -> int | None:
        """Return the token limit per reply. Local servers stop at 1,024 tokens by default, or never."""
        if self.max_reply_tokens == "auto":
            return 4096 if self.base_url else None
        return self.max_reply_tokens


def _check_address(base_url: str) -> None:
    """Raise a ValueError if it is not an address, or has parts in which keys are passed; they are not repeated."""
    address = urlsplit(base_url)
    remedy = "an API key belongs in an environment variable, which api_key_env names"
    if "@" in (address.netloc or base_url) or address.query or address.fragment:
        where = f" (got one with host {address.hostname})" if address.hostname else ""
        raise ValueError(f"base_url must have no user name, password, query or fragment{where}; {remedy}")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"base_url must be an address such as http://localhost:8000/v1, got {base_url!r}; {remedy}")


@dataclass(frozen=True)
class JudgeConfig(LLMConfig):
    """Judge options.

    Args:
        kind: rule parses captions of synthetic clips, offline; openai uses a language model on any OpenAI-compatible
            server.
        attempts: maximum number of requests per caption; after an invalid reply the model gets its errors. If no
            reply is valid, the caption is unscored.
    """

    kind: JudgeKind = "rule"
    attempts: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "openai" and not self.model:
            raise ValueError("the judge openai needs the name of a model on its server: pass --model")
        if self.kind == "rule" and (
            self.model or self.base_url or self.api_key_env or self.max_requests or self.max_tokens
        ):
            raise ValueError(
                "the judge rule uses no language model: pass --judge openai, or omit model, address, key and caps"
            )
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
