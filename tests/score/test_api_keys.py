"""API keys and settings of the environment: each goes to its own server only."""

import pytest

from salmonn.score.api_keys import find_api_key
from salmonn.score.config import LLMConfig
from salmonn.score.llm_client import LLMClient
from tests.score.completions import complete
from tests.score.fake_llm_server import Answer


def test_requires_an_api_key(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        LLMClient(LLMConfig("m", cache=tmp_path / "c"))
    # A key in place of a name is not repeated.
    for name, message in (("MY_KEY", "the environment variable MY_KEY is not set"), ("hf_abc", "that --api-key-env")):
        with pytest.raises(ValueError, match=message) as caught:
            LLMClient(LLMConfig("m", base_url="http://host/v1", api_key_env=name, cache=tmp_path / "c"))
        assert "hf_abc" not in str(caught.value)
    with pytest.raises(ValueError, match="api_key_env takes the name of an environment variable") as caught:
        LLMConfig("m", api_key_env="sk-123")
    assert "sk-123" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "environment", "key"),
    [
        ({}, {}, "openai"),
        ({"base_url": "https://api.openai.com/v1/"}, {}, "openai"),
        ({"base_url": "http://localhost:8000/v1"}, {}, "none"),
        ({"base_url": "http://api.openai.com/v1"}, {}, "none"),  # not encrypted
        ({"base_url": "https://api.openai.com.evil.org/v1"}, {}, "none"),
        ({"base_url": "https://host/v1"}, {}, "none"),
        ({"base_url": "https://host/v1", "api_key_env": "HOST_KEY"}, {}, "host"),
        ({"api_key_env": "HOST_KEY"}, {}, "host"),
        ({}, {"OPENAI_BASE_URL": "https://proxy/v1"}, "openai"),
        ({"base_url": "https://proxy/v2"}, {"OPENAI_BASE_URL": "https://proxy/v1"}, "openai"),
        ({"base_url": "https://api.openai.com/v1"}, {"OPENAI_BASE_URL": "https://proxy/v1"}, "none"),
    ],
)
def test_a_key_goes_to_its_own_server_only(monkeypatch, config, environment, key):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, value in {"OPENAI_API_KEY": "openai", "HOST_KEY": "host", **environment}.items():
        monkeypatch.setenv(name, value)
    assert find_api_key(LLMConfig("m", **config)) == key


@pytest.mark.parametrize("is_default", [True, False])
def test_what_the_environment_has_for_openai_goes_nowhere_else(serve, open_client, monkeypatch, is_default):
    server = serve(lambda request, number: Answer("x"))
    variables = {"API_KEY": "key", "ORG_ID": "org", "PROJECT_ID": "project", "CUSTOM_HEADERS": "X-Secret: custom"}
    variables["BASE_URL"] = server.url if is_default else "http://elsewhere/v1"
    for name, value in variables.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    client = open_client(server)
    complete(client)
    client.list_models()
    expected = ["org", "project", "custom", "Bearer key"] if is_default else [None, None, None, "Bearer none"]
    for sent in (server.headers[0], server.get_headers[0]):
        names = ("OpenAI-Organization", "OpenAI-Project", "X-Secret", "Authorization")
        assert [sent.get(name) for name in names] == expected
