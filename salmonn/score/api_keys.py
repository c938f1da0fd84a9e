"""API keys of servers. A key goes only to the server that it is meant for.

`OPENAI_API_KEY` is the key of OpenAI, or of the server in `OPENAI_BASE_URL`, as for OpenAI's own clients. Any other
server gets the key in the environment variable that its settings name, and without one none at all.
"""

import os
from urllib.parse import urlsplit

from salmonn.score.config import LLMConfig

NO_KEY = "none"  # what a server without a key is sent, as OpenAI's clients do not work without one
API_KEY_FLAG = "--api-key-env"
OPENAI = "https://api.openai.com/v1"
_OPENAI_KEY = "OPENAI_API_KEY"


def default_address() -> str:
    """Return the address of the server that is used where none is given."""
    return os.environ.get("OPENAI_BASE_URL") or OPENAI


def is_default_server(config: LLMConfig) -> bool:
    """Return whether OPENAI_API_KEY, and other settings of OpenAI's clients in the environment, are for this server."""
    return config.base_url is None or _origin(config.base_url) == _origin(default_address())


def key_variable(config: LLMConfig) -> str | None:
    """Return the environment variable that has a server's key; None for a server without a key."""
    return config.api_key_env or (_OPENAI_KEY if is_default_server(config) else None)


def find_api_key(config: LLMConfig, *, flag: str = API_KEY_FLAG) -> str:
    """Return the key for a server, or NO_KEY.

    Args:
        config: the server.
        flag: flag that sets `api_key_env`.

    Raises:
        ValueError: the environment variable is not set.
    """
    variable = key_variable(config)
    if variable is None:
        return NO_KEY
    if key := os.environ.get(variable, "").strip():
        return key
    if config.api_key_env is not None:
        # A key that was given instead of a name is not repeated.
        name = variable if variable.isupper() else f"that {flag} names"
        raise ValueError(f"the environment variable {name} is not set; set it to the API key, or leave out {flag}")
    raise ValueError(
        "OpenAI requires an API key: set the environment variable OPENAI_API_KEY, or pass the address of another "
        "server, such as --base-url http://localhost:8000/v1"
    )


def _origin(address: str) -> tuple[str, str]:
    parts = urlsplit(address)
    return parts.scheme, parts.netloc.lower()
