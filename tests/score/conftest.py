"""Servers and models of the judge's tests."""

import pytest

from salmonn.score.chat import Chat, ChatConfig
from tests.score.scripted import ScriptedServer


@pytest.fixture
def serve():
    """Starts scripted servers, and stops them in the end."""
    servers = []

    def start(script) -> ScriptedServer:
        servers.append(ScriptedServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def open_chat(tmp_path):
    """A chat with a scripted server, its replies kept in the test's folder."""

    def open_(server: ScriptedServer, **options) -> Chat:
        cache = options.pop("cache", tmp_path / "replies.sqlite")
        return Chat(ChatConfig(model="m", base_url=server.url, cache=cache, **options))

    return open_
