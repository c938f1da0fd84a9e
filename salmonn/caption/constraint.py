"""JSON that follows a schema: at each step, only the tokens that can continue it may be sampled."""

import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

logger = logging.getLogger(__name__)
_NUM_CACHED = 16  # compiled schemas
# No white space between values: a model could otherwise emit it up to the token limit.
_OPTIONS: "JsonCompileOptions" = {"whitespace_flexible": False}


class JsonGrammars:
    """Compiler of JSON schemas for a tokenizer; it needs the package llguidance.

    Args:
        tokenizer: tokenizer of the model.
        end_id: token that ends an answer.

    Raises:
        ValueError: llguidance is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, end_id: int) -> None:
        try:
            from llguidance import hf  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ValueError("answers in JSON need llguidance: pip install 'salmonn[json]'") from error
        self._tokenizer = hf.from_tokenizer(tokenizer, eos_token=end_id)
        self._compile = lru_cache(_NUM_CACHED)(self._compile_schema)

    def check(self, schema: str) -> None:
        """Raise a ValueError if a text is not a JSON schema, or has keywords that are not supported."""
        self._compile(schema)

    def matcher(self, schema: str) -> "LLMatcher":
        """Return a new state of the grammar of a schema; raises what `check` does."""
        return self._compile(schema).deep_copy()

    def _compile_schema(self, schema: str) -> "LLMatcher":
        from llguidance import LLMatcher  # noqa: PLC0415 - an extra

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_OPTIONS)
        except ValueError as error:
            raise ValueError(f"the JSON schema cannot be used: {error}") from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the JSON schema cannot be used: {' '.join(matcher.get_error().split())[:400]}")
        return matcher


class Constraints:
    """The states of the grammars of R rows.

    Args:
        matchers: one for each row.
    """

    def __init__(self, matchers: Sequence["LLMatcher"]) -> None:
        self._matchers = list(matchers)

    def mask(self, logits: Tensor, active: Sequence[bool]) -> Tensor:
        """Return the logits (R, V) with -inf for the tokens that cannot follow; rows that have ended are unchanged."""
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        for row, (matcher, is_active) in enumerate(zip(self._matchers, active, strict=True)):
            if not is_active:
                allowed[row] = True
                continue
            # A model may have more ids than its tokenizer; these are not allowed.
            bias = np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8)[: logits.shape[1]]
            allowed[row, : len(bias)] = torch.from_numpy(bias > 0)
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def advance(self, tokens: Sequence[int], active: Sequence[bool]) -> None:
        """Add a token to each row that has not ended."""
        for matcher, token in compress(zip(self._matchers, tokens, strict=True), active):
            if not matcher.consume_token(token):  # then only the end token may follow
                logger.error("a grammar failed: %s", matcher.get_error())

    def evict(self, active: Sequence[bool]) -> None:
        """Remove rows that have ended."""
        self._matchers = list(compress(self._matchers, active))


def is_json(text: str) -> bool:
    """Return whether a text is a complete JSON value."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
