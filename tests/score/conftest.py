"""Fixtures of the scoring tests."""

import pytest

from salmonn.score.config import LLMConfig
from salmonn.score.llm_client import LLMClient
from tests.score.completions import FakeClock, use_fake_clock
from tests.score.fake_llm_server import FakeLLMServer


@pytest.fixture
def open_client(tmp_path):
    """Return a function that opens a client of a fake server, with the cache in the test's folder."""

    def open_(server: FakeLLMServer, **options) -> LLMClient:
        cache = options.pop("cache", tmp_path / "replies.sqlite")
        return LLMClient(LLMConfig(model="m", base_url=server.url, cache=cache, **options))

    return open_


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    """Let retries take no real time, and record their exact delays."""
    return use_fake_clock(monkeypatch)
