"""Servers and models of the judge's tests."""

import pytest

from salmonn.score.config import ChatConfig
from salmonn.score.llm_client import Chat
from tests.score.fake_llm_server import ScriptedServer


@pytest.fixture
def open_chat(tmp_path):
    """A chat with a scripted server, its replies kept in the test's folder."""

    def open_(server: ScriptedServer, **options) -> Chat:
        cache = options.pop("cache", tmp_path / "replies.sqlite")
        return Chat(ChatConfig(model="m", base_url=server.url, cache=cache, **options))

    return open_
