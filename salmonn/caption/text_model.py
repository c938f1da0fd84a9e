"""A language model on an OpenAI-compatible server that rewrites captions from their text alone."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from salmonn.caption.generator import CaptionRequest
from salmonn.records import Caption
from salmonn.score.config import LLMConfig

if TYPE_CHECKING:
    from salmonn.score.budget import Budget
    from salmonn.score.llm_client import LLMClient
REFINE_KEY_FLAG = "--refine-api-key-env"


class TextModel:
    """Answers requests without looking at their clips.

    Args:
        client: client of the server.
    """

    def __init__(self, client: "LLMClient") -> None:
        self._client = client

    def answer(self, requests: Sequence[CaptionRequest]) -> list[Caption | str]:
        """Return an answer to each request, or why there is none.

        Raises:
            LLMStoppedError: the server is unavailable.
        """
        return self._client.map_concurrent(self._answer, requests)

    def _answer(self, request: CaptionRequest) -> Caption | str:
        from salmonn.score.chat_client import LLMRejectedError  # noqa: PLC0415 - imports openai

        messages = []
        for prompt, answer in request.history:
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": request.prompt or ""})
        try:
            response = self._client.complete(messages, schema={}, seed=request.seed, only_text=True)
        except LLMRejectedError as error:
            return f"{self._client.name}: {error}"
        return Caption(
            str(request.path),
            response.text.strip(),
            prompt=request.prompt or "",
            model=self._client.config.model,
            finished=not response.is_truncated,
        )


def text_model_config(*, url: str | None, model: str, api_key_env: str | None = None) -> LLMConfig:
    """Return the settings of a text model; raises a ValueError for an address that cannot be used."""
    return LLMConfig(model=model, base_url=url, api_key_env=api_key_env, structured="never")


@cache
def load_text_model(config: LLMConfig, *, budget: "Budget | None" = None, key_flag: str) -> TextModel:
    """Return the text model with these settings, the same one each time; see `ChatClient`."""
    from salmonn.score.llm_client import LLMClient  # noqa: PLC0415 - imports openai

    return TextModel(LLMClient(config, budget=budget, key_flag=key_flag))
