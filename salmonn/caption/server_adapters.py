"""Load LoRA adapters on a server while it runs, by the routes of vLLM and SGLang.

POST http://host:8000/v1/load_lora_adapter {"lora_name": "round_1", "lora_path": "/shared/round_1"}   vLLM, our service
POST http://host:8000/load_lora_adapter                                                               SGLang

The server reads the folder itself, so it must be able to read it under the same path.
"""

import logging
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import openai

from salmonn.score.chat_client import ChatClient, LLMStoppedError

logger = logging.getLogger(__name__)

VLLM_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank takes
_HOW_TO_START = (
    "start vLLM with --enable-lora and the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, SGLang with "
    "--enable-lora, or `salmonn serve` with --lora-dirs"
)


class AdapterLoader:
    """Loads adapters on the server of a client.

    Args:
        client: client of the model without an adapter; the address of servers with such routes ends in /v1.

    Attributes:
        base_name: name of the model without an adapter.
        is_sglang: whether the server has SGLang's routes; None before the first adapter.
    """

    def __init__(self, client: ChatClient) -> None:
        self.is_sglang: bool | None = None
        self.base_name = client.config.model
        self._client = client
        self._root = client.address.removesuffix("/v1")

    def load(self, name: str, folder: Path, *, rank: int) -> str:
        """Load an adapter, replacing an earlier one of that name, and return the name of the model with it.

        Args:
            name: name of the adapter.
            folder: PEFT folder.
            rank: its rank, for error messages.

        Raises:
            ValueError: the server does not load it.
        """
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        try:
            self._post("load_lora_adapter", body)
        except openai.APIStatusError as error:
            if not re.search(r"already (been )?loaded", error.response.text):
                raise self._describe(error, folder, rank=rank) from error
            self.unload(name)
            try:
                self._post("load_lora_adapter", body)
            except openai.APIStatusError as error:
                raise self._describe(error, folder, rank=rank) from error
        return f"{self.base_name}:{name}" if self.is_sglang else name

    def unload(self, name: str) -> None:
        """Unload an adapter; a server that cannot is only warned about."""
        try:
            self._post("unload_lora_adapter", {"lora_name": name})
        except (openai.APIStatusError, LLMStoppedError) as error:
            logger.warning("%s does not unload the adapter %s: %s", self._client.address, name, error)

    def _post(self, route: str, body: dict[str, str]) -> None:
        """Send a request to a route, wherever the server has it.

        Raises:
            APIStatusError: the server refuses it.
            LLMStoppedError: the server cannot be reached, or is busy for too long.
        """
        # vLLM answers with status 500 where it refuses a rank.
        post = partial(self._client.post, body=body, retries_internal_errors=False)
        if self.is_sglang is not None:
            post(f"{self._root}/{route}" if self.is_sglang else f"/{route}")
            return
        try:
            post(f"/{route}")
            self.is_sglang = False
        except openai.APIStatusError as error:
            if not _lacks_route(error):
                self.is_sglang = False
                raise
            post(f"{self._root}/{route}")
            self.is_sglang = True

    def _describe(self, error: openai.APIStatusError, folder: Path, *, rank: int) -> ValueError:
        """Return an error that says why the server does not load an adapter, and how to change it."""
        address, words = self._client.address, _words_of(error)
        if _lacks_route(error):
            return ValueError(
                f"{address} does not load adapters while it runs (status {error.status_code}); {_HOW_TO_START}"
            )
        if re.search(r"max_lora_rank|max-lora-rank|LoRA memory pool", words):
            wanted = next((one for one in VLLM_MAX_RANKS if one >= rank), rank)
            return ValueError(
                f"{address} does not take an adapter of rank {rank}: {words}; start it with --max-lora-rank {wanted}"
            )
        if error.status_code in (403, 404) or "No adapter found" in words:
            return ValueError(
                f"{address} cannot read the adapter in {folder.resolve()}: {words}; the server must be able to read "
                "this folder under the same path: set adapters_dir to one on a file system that both share"
            )
        if re.search(r"not enabled|enable.lora|not support", words, re.IGNORECASE):
            return ValueError(f"{address} does not take adapters: {words}; {_HOW_TO_START}")
        return ValueError(f"{address} does not load the adapter in {folder.resolve()}: {words}; see the server's log")


def _words_of(error: openai.APIStatusError) -> str:
    """Return the server's words: those of OpenAI's format, of SGLang's, or the body."""
    text = error.response.text
    with suppress(ValueError, TypeError, AttributeError):
        body = error.response.json()
        found = body.get("error") or body
        text = found.get("message") or found.get("error_message") or text
    return " ".join(str(text).split())[:300]


def _lacks_route(error: openai.APIStatusError) -> bool:
    """Return whether an error means that there is no such route, and not that there is no such adapter."""
    return error.status_code in (404, 405, 501) and not re.search(r"adapter|lora_", error.response.text)
