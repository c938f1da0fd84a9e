"""Requests to a fake server, as the tests of the client send them, and a clock for retries."""

import tenacity

from salmonn.score.llm_client import LLMClient
from salmonn.score.llm_protocol import LLMResponse

SCHEMA = {"type": "object"}


def complete(client: LLMClient, message: str = "hello", seed: int = 0) -> LLMResponse:
    return client.complete([{"role": "user", "content": message}], schema=SCHEMA, seed=seed)


def text_of(request: dict) -> str:
    return request["messages"][0]["content"]


def use_fake_clock(monkeypatch) -> "FakeClock":
    """Let retries take no real time; return the clock that records their exact delays."""
    clock = FakeClock()
    monkeypatch.setattr(tenacity, "time", clock)
    monkeypatch.setattr(tenacity, "sleep_using_event", lambda event: clock.sleep)
    return clock


class FakeClock:
    """Time that passes only by waiting between retries; `delays` are those waits, in seconds."""

    def __init__(self):
        self.now, self.delays = 0.0, []

    def monotonic(self) -> float:
        self.now += 1e-9  # no two calls return the same time
        return self.now

    def sleep(self, seconds: float) -> None:
        self.delays.append(seconds)
        self.now += seconds
