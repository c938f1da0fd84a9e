"""Questions to a language model on any OpenAI-compatible server, at bounded cost.

Every reply is kept (`ResponseCache`), so that a question is asked once, whatever happens in between. A server that is
busy, failing or away is tried again with growing pauses, for a limited time. What cannot get better by trying again
(a wrong key, no quota, a spend cap) stops the run with a sentence.
"""

import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import openai
import tenacity

from salmonn.score.config import LLMConfig
from salmonn.score.replies import LLMResponse, ResponseCache

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
ChatMessage = dict[str, str]

# May go well the next time. A reply that is no completion comes from a failing proxy as a rule.
_PASSING = (
    openai.APIConnectionError,
    openai.RateLimitError,
    openai.InternalServerError,
    openai.ConflictError,
    openai.APIResponseValidationError,
)
_GREETING = [{"role": "user", "content": "Reply with the word yes."}]
_REFUSED_STATUS = (400, 413, 422)  # bad, too large, not to be processed: another question may be welcome
_LONGEST_PAUSE_SECONDS = 60.0
_FIRST_CONTACT_SECONDS = 10.0
_MOST_REFUSED = 20  # before anything was answered


class LLMStoppedError(ValueError):
    """No further question can be asked in this run."""


class SpendCapError(LLMStoppedError):
    """A spend cap is reached."""


class LLMRejectedError(ValueError):
    """The server refuses this question, and would again."""


class LLMFailedError(LLMRejectedError):
    """The server fails on this question, though not on others."""


class LLMClient:
    """Asks a model questions, many side by side."""

    def __init__(self, config: LLMConfig) -> None:
        self.config = config
        self.name = f"{config.model} at {(config.base_url or 'OpenAI').rstrip('/')}"
        self.num_requests = self.num_tokens = self._num_refused = 0
        self._has_answered = False
        self._told = -1.0
        self._cache = ResponseCache(config.cache.expanduser())
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._takes_schema = config.structured != "never"
        key = os.environ.get("OPENAI_API_KEY") or ("none" if config.base_url else None)
        if key is None:
            raise ValueError(
                "OpenAI asks for a key: set the environment variable OPENAI_API_KEY, or give the address of another "
                "server, such as --base-url http://localhost:8000/v1"
            )
        # Retries are ours, so that they count against the spend cap and end after a set time.
        self._client = openai.OpenAI(
            api_key=key, base_url=config.base_url, timeout=config.timeout_seconds, max_retries=0
        )

    def complete(self, messages: Sequence[ChatMessage], *, schema: dict[str, Any], seed: int) -> LLMResponse:
        """The reply to a conversation, from the cache where it was asked before.

        Args:
            messages: `{"role", "content"}` each.
            schema: JSON schema of the reply, which servers that know how to hold the model to.
            seed: of the model's draws; another seed is another question.

        Raises:
            LLMRejectedError: the server refuses this question (too long for the model, say).
            LLMStoppedError: no further question can be asked.
        """
        asked = {"messages": list(messages), "seed": seed}
        asked |= {"temperature": self.config.temperature, "max_reply_tokens": self.config.reply_token_limit}
        words = json.dumps([self.name, schema, asked], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(words.encode()).hexdigest()
        reply = self._cache.find(key)
        if reply is None:
            reply = self._ask_anew(messages, schema=schema, seed=seed)
            self._cache.keep(key, reply, judge=self.name, asked=asked)
        return reply

    def map_concurrent(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        progress: Callable[[Result], object] | None = None,
    ) -> list[Result]:
        """`[function(item) for item in items]`, `concurrency` of them at once; `progress` sees each result as it comes.

        On Ctrl-C, or where one raises, no new question is asked; those under way are waited for, since they are paid
        for. Whoever catches a second Ctrl-C must end the process: Python itself waits for the threads.
        """
        executor = ThreadPoolExecutor(self.config.concurrency)
        futures = [executor.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                result = future.result()
                if progress:
                    progress(result)
            return [future.result() for future in futures]
        except SpendCapError:
            # What is under way may find out that the cap is not what is wrong.
            self._stop.set()
            executor.shutdown(cancel_futures=True)
            for future in futures:
                error = None if future.cancelled() else future.exception()
                if isinstance(error, LLMStoppedError) and not isinstance(error, SpendCapError):
                    raise error from None
            raise
        except BaseException as error:
            self._stop.set()
            if isinstance(error, KeyboardInterrupt):
                logger.warning("waiting for the replies that are under way, which are kept (Ctrl-C again drops them)")
            raise
        finally:
            executor.shutdown(cancel_futures=True)

    def _ask_anew(self, messages: Sequence[ChatMessage], *, schema: dict[str, Any], seed: int) -> LLMResponse:
        wants_schema = self._takes_schema
        try:
            return self._ask_patiently(messages, schema=schema if wants_schema else None, seed=seed)
        except LLMRejectedError as error:
            if not wants_schema or self.config.structured == "always" or isinstance(error, LLMFailedError):
                raise
            first = error
        # Whether it was the schema that the server does not take shows without it.
        reply = self._ask_patiently(messages, schema=None, seed=seed)
        if self._takes_schema:
            self._takes_schema = False
            logger.warning("%s takes no JSON schema (%s): replies are parsed as they come", self.name, first)
        return reply

    def _ask_patiently(
        self, messages: Sequence[ChatMessage], *, schema: dict[str, Any] | None, seed: int
    ) -> LLMResponse:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=self._pause,
            stop=self._is_too_late,
            sleep=tenacity.sleep_using_event(self._stop),
            before_sleep=self._tell_pause,
            reraise=True,
        )
        try:
            return retrying(self._request, messages, schema, seed)
        except openai.APIError as error:
            raise self._judge_fault(error) from error

    def _judge_fault(self, error: openai.APIError) -> LLMStoppedError | LLMRejectedError:
        """What a request's final failure means: for this question, or for all."""
        if getattr(error, "status_code", 0) in _REFUSED_STATUS:
            self._num_refused += 1
            # A wrong model or option is refused for every caption; a long caption for itself.
            if self._has_answered or self._num_refused < _MOST_REFUSED:
                return LLMRejectedError(f"the server refuses the question: {_words(error)}")
        elif _may_pass(error) and self._is_alive():
            return LLMFailedError(f"the server fails on this question, not on others: {_words(error)}")
        words = f"{self.name} cannot be asked: {_words(error)}"
        if isinstance(error, openai.APIConnectionError) and not self._has_answered:
            words += "; is the server started, and the address right?"
        if isinstance(error, openai.NotFoundError):
            words += "; is the address complete (most end in /v1), and the model's name as the server knows it?"
        if self._has_answered:
            words += f". What it answered is kept in {self.config.cache}; the same command goes on from there"
        return LLMStoppedError(words)

    def _is_alive(self) -> bool:
        """Whether the server answers a question that is easy to answer."""
        try:
            self._request(_GREETING, None, 0)
        except openai.APIError:
            return False
        return True

    def _request(self, messages: Sequence[ChatMessage], schema: dict[str, Any] | None, seed: int) -> LLMResponse:
        self._spend()
        options: dict[str, Any] = {"seed": seed}
        if self.config.temperature is not None:
            options["temperature"] = self.config.temperature
        if self.config.reply_token_limit is not None:
            options["max_tokens"] = self.config.reply_token_limit
        if schema is not None:
            options["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": schema},
            }
        until = time.monotonic() + self.config.timeout_seconds
        with self._client.chat.completions.with_streaming_response.create(
            model=self.config.model,
            messages=list(messages),  # type: ignore[arg-type]
            **options,
        ) as answer:
            return self._read(self._receive(answer, until=until), response=answer.http_response)

    def _receive(self, answer: openai.APIResponse[Any], *, until: float) -> bytes:
        """The body; the client's own time-out is that of one read, which a server that drips never runs into."""
        body = b""
        try:
            for chunk in answer.iter_bytes():
                if time.monotonic() > until:
                    raise openai.APITimeoutError(request=answer.http_request)
                body += chunk
        except openai.OpenAIError:
            raise
        # The client passes on what its transport raises here, httpx or httpx2 by its version.
        except Exception as error:
            raise openai.APIConnectionError(message=f"broken off: {error}", request=answer.http_request) from error
        return body

    def _read(self, body: bytes, *, response: Any) -> LLMResponse:
        try:
            value = json.loads(body)
            choice = value["choices"][0]
            text, is_truncated = choice["message"]["content"], choice.get("finish_reason") == "length"
            num_tokens = (value.get("usage") or {}).get("total_tokens")
            if not isinstance(text, str | None) or not isinstance(num_tokens, int | None):
                raise TypeError("content or total_tokens of another kind")
        except (TypeError, LookupError, ValueError, AttributeError, RecursionError) as error:
            words = f"no completion in the reply ({error})"
            raise openai.APIResponseValidationError(response, None, message=words) from error
        # Half a character, which a model may write, cannot be kept nor sent.
        text = (text or "").encode("utf-8", "replace").decode()
        if num_tokens is None and self.config.max_tokens is not None:
            raise LLMStoppedError(
                f"{self.name} does not say how many tokens it used, so that --max-tokens cannot be kept: "
                "cap the requests instead, by --max-requests"
            )
        with self._lock:
            self.num_tokens += num_tokens or 0
            self._has_answered = True
        return LLMResponse(text, is_truncated, num_tokens)

    def _spend(self) -> None:
        """Count a request, or stop at a cap."""
        config = self.config
        with self._lock:
            for cap, spent, name in (
                (config.max_requests, self.num_requests, "requests"),
                (config.max_tokens, self.num_tokens, "tokens"),
            ):
                if cap is not None and spent >= cap:
                    raise SpendCapError(
                        f"the cap of {cap} {name} is reached ({self.num_requests} requests, {self.num_tokens} tokens "
                        f"in this run). What was answered is kept in {config.cache}; the same command goes on from "
                        f"there with {cap} {name} more, or with a higher --max-{name}"
                    )
            if self._stop.is_set():
                raise LLMStoppedError("stopped before this question was asked")
            self.num_requests += 1

    def _seconds_left(self, state: tenacity.RetryCallState) -> float:
        """For more tries of a question; a server that was never there gets little."""
        error = _error_of(state)
        is_away = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
        limit = self.config.retry_seconds
        limit = limit if self._has_answered or not is_away else min(limit, _FIRST_CONTACT_SECONDS)
        return limit - (state.seconds_since_start or 0.0)

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next try: twice as long each time, spread out, never sooner than the server asks for.

        The last one ends with the time for the question, so that a server that is back by then is asked once more.
        """
        longest = min(2.0 ** (state.attempt_number - 1), _LONGEST_PAUSE_SECONDS)
        pause = min(random.uniform(longest / 2, longest), max(self._seconds_left(state), 0.0))
        error = _error_of(state)
        wish = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
        return max(pause, float(wish)) if wish.replace(".", "", 1).isdigit() else pause

    def _is_too_late(self, state: tenacity.RetryCallState) -> bool:
        """Whether no time is left, or less than the server asks to wait."""
        left = self._seconds_left(state)
        return self._stop.is_set() or left <= 0 or state.upcoming_sleep > left

    def _tell_pause(self, state: tenacity.RetryCallState) -> None:
        error = _error_of(state)
        pause = state.next_action.sleep if state.next_action else 0.0
        with self._lock:  # one line for all that wait for the same server
            is_told, self._told = time.monotonic() < self._told + 1, time.monotonic()
        if not is_told:
            logger.warning("%s: %s; trying again in %.1f s", self.name, _words(error), pause)


def _may_pass(error: BaseException) -> bool:
    # An empty account answers 429 as a busy server does, but does not fill up by waiting.
    is_empty = "insufficient_quota" in (getattr(error, "code", None), getattr(error, "type", None))
    return (isinstance(error, _PASSING) or getattr(error, "status_code", 0) == 408) and not is_empty


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _words(error: BaseException | None) -> str:
    """What went wrong, in one line of bounded length."""
    # Servers say why in the body, not all of them in the place that the client's own message is taken from.
    reason = f" {error.response.text}" if isinstance(error, openai.APIStatusError) else ""
    if isinstance(error, openai.APIConnectionError) and error.__cause__:
        reason = f" ({error.__cause__})"
    words = " ".join(f"{error}{reason}".split()) or type(error).__name__
    return words if len(words) <= 300 else words[:300] + " ..."
