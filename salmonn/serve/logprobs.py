"""Log-probabilities of tokens, as OpenAI's chat completions have them."""

from collections.abc import Sequence
from typing import Any

from salmonn.caption.generate import SampledToken
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import token_bytes

_LOWEST = -9999.0  # OpenAI's value for a token that is very unlikely; JSON has no infinity


class LogprobsFormat:
    """Format of tokens with log-probabilities.

    Args:
        processor: processor of the model.
    """

    def __init__(self, processor: Processor) -> None:
        self._tokenizer = processor.tokenizer
        self._stop_ids = frozenset(processor.stop_ids)

    def to_json(self, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
        """Return the `logprobs` of a choice, or of a chunk of it; None without tokens.

        The end token is left out, since it is not a part of the message.
        """
        content = [
            {
                **self._entry(token.id, token.logprob or 0.0),
                "top_logprobs": [self._entry(other, logprob) for other, logprob in token.top],
            }
            for token in tokens
            if token.id not in self._stop_ids
        ]
        return {"content": content, "refusal": None} if content else None

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self._tokenizer, token)
        return {
            "token": data.decode(errors="backslashreplace"),
            "logprob": max(_LOWEST, logprob),
            "bytes": list(data),
        }
