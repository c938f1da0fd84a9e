"""Client of a language model on any OpenAI-compatible server, with a cache, retries and spend caps.

Every reply is cached on disk (`ResponseCache`), so no request is paid for twice. Transient failures (server busy,
failing or unreachable) are retried with growing delays for a limited time. Permanent ones (wrong key, no quota, spend
cap) stop the run with an error message.
"""

import hashlib
import json
import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import openai
import tenacity

from salmonn.score.config import LLMConfig

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
ChatMessage = dict[str, str]

# An invalid completion is transient too: it usually comes from a failing proxy.
_TRANSIENT = (
    openai.APIConnectionError,
    openai.RateLimitError,
    openai.InternalServerError,
    openai.ConflictError,
    openai.APIResponseValidationError,
)
_PROBE = [{"role": "user", "content": "Reply with the word yes."}]
_REJECTED_STATUS = (400, 413, 422)  # bad request, too large, unprocessable: another request may succeed
_MAX_DELAY_SECONDS = 60.0
_FIRST_CONTACT_SECONDS = 10.0
_MAX_REJECTED = 20  # before the first reply
_CACHE_FORMAT = 1


class LLMStoppedError(ValueError):
    """No further request is possible in this run."""


class SpendCapError(LLMStoppedError):
    """A spend cap is reached."""


class LLMRejectedError(ValueError):
    """The server rejects this request, and would reject it again."""


class LLMFailedError(LLMRejectedError):
    """The server fails on this request, but not on others."""


@dataclass(frozen=True)
class LLMResponse:
    """A reply of a language model.

    Args:
        text: text of the reply.
        is_truncated: whether it reached its token limit.
        num_tokens: tokens of prompt and reply by the server's count; None if the server sends no usage.
    """

    text: str
    is_truncated: bool = False
    num_tokens: int | None = None


class ResponseCache:
    """Replies by request hash in an SQLite file. Threads and processes may share it; a kill loses no finished reply.

    Args:
        path: SQLite file, created if missing.

    Raises:
        ValueError: the file is not a cache of this format.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._path = path
        # The default rollback journal, because write-ahead logs do not work on network file systems.
        self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        if self._format() != _CACHE_FORMAT:
            self._execute("BEGIN IMMEDIATE")  # other processes may be creating the same file
            if self._format() != _CACHE_FORMAT and self._execute("SELECT 1 FROM sqlite_master").fetchone():
                self._connection.close()
                raise ValueError(f"{path} is not a reply cache of format {_CACHE_FORMAT}: pass another file as --cache")
            self._execute(
                "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, model TEXT, request TEXT, reply TEXT, "
                "is_truncated INTEGER, num_tokens INTEGER, date TEXT DEFAULT CURRENT_TIMESTAMP)"
            )
            self._execute(f"PRAGMA user_version = {_CACHE_FORMAT}")
            self._execute("COMMIT")

    def get(self, key: str) -> LLMResponse | None:
        """Return the reply to a request, or None if it is not cached."""
        row = self._execute("SELECT reply, is_truncated, num_tokens FROM responses WHERE key = ?", (key,)).fetchone()
        return LLMResponse(row[0], bool(row[1]), row[2]) if row else None

    def put(self, key: str, response: LLMResponse, *, model: str, request: object) -> None:
        """Store a reply; model and request are stored for people who read the file."""
        self._execute(
            "INSERT OR REPLACE INTO responses (key, model, request, reply, is_truncated, num_tokens) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                key,
                model,
                json.dumps(request, ensure_ascii=False),
                response.text,
                response.is_truncated,
                response.num_tokens,
            ),
        )

    def _format(self) -> int:
        return int(self._execute("PRAGMA user_version").fetchone()[0])

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            with self._lock:
                return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise ValueError(
                f"{self._path} cannot be used as reply cache ({error}): pass another file as --cache"
            ) from error


class LLMClient:
    """Sends requests to a language model, many of them concurrently.

    Raises:
        ValueError: no API key is set for OpenAI's own server, or the cache file cannot be used.
    """

    def __init__(self, config: LLMConfig) -> None:
        self.config = config
        self.name = f"{config.model} at {(config.base_url or 'OpenAI').rstrip('/')}"
        self.num_requests = self.num_tokens = self._num_rejected = 0
        self._has_replied = False
        self._last_warning = -1.0
        self._cache = ResponseCache(config.cache.expanduser())
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._accepts_schema = config.structured != "never"
        key = os.environ.get("OPENAI_API_KEY") or ("none" if config.base_url else None)
        if key is None:
            raise ValueError(
                "OpenAI requires an API key: set the environment variable OPENAI_API_KEY, or pass the address of "
                "another server, such as --base-url http://localhost:8000/v1"
            )
        # Retries are handled here, so that they count against the spend cap and end after a set time.
        self._client = openai.OpenAI(
            api_key=key, base_url=config.base_url, timeout=config.timeout_seconds, max_retries=0
        )

    def complete(self, messages: Sequence[ChatMessage], *, schema: dict[str, Any], seed: int) -> LLMResponse:
        """Return the reply to a conversation, from the cache if possible.

        Args:
            messages: messages as `{"role", "content"}`.
            schema: JSON schema of the reply, for servers with structured outputs.
            seed: sampling seed; another seed makes another request.

        Raises:
            LLMRejectedError: the server rejects this request (for example because it is too long).
            LLMStoppedError: no further request is possible.
        """
        request = {"messages": list(messages), "seed": seed}
        request |= {"temperature": self.config.temperature, "max_reply_tokens": self.config.reply_token_limit}
        text = json.dumps([self.name, schema, request], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        response = self._cache.get(key)
        if response is None:
            response = self._complete_uncached(messages, schema=schema, seed=seed)
            self._cache.put(key, response, model=self.name, request=request)
        return response

    def map_concurrent(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        progress: Callable[[Result], object] | None = None,
    ) -> list[Result]:
        """Return `[function(item) for item in items]`, with up to `concurrency` calls at once.

        On Ctrl-C, or if a call raises, no new request is sent, but requests in flight are completed, because they are
        paid for. A caller that catches a second Ctrl-C must end the process: Python itself waits for the threads.

        Args:
            function: function that sends requests.
            items: its arguments.
            progress: called with each result when it is ready.
        """
        executor = ThreadPoolExecutor(self.config.concurrency)
        futures = [executor.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                result = future.result()
                if progress:
                    progress(result)
        except BaseException as error:
            self._stop.set()
            if isinstance(error, KeyboardInterrupt):
                logger.warning("waiting for replies in flight, which will be saved (press Ctrl-C again to drop them)")
            executor.shutdown(cancel_futures=True)  # not in `finally`, which would wait again after a second Ctrl-C
            if isinstance(error, SpendCapError):
                # A request in flight may show that the cap is not the real problem.
                for future in futures:
                    other = None if future.cancelled() else future.exception()
                    if isinstance(other, LLMStoppedError) and not isinstance(other, SpendCapError):
                        raise other from None
            raise
        executor.shutdown()
        return [future.result() for future in futures]

    def _complete_uncached(self, messages: Sequence[ChatMessage], *, schema: dict[str, Any], seed: int) -> LLMResponse:
        sends_schema = self._accepts_schema
        try:
            return self._request_with_retries(messages, schema=schema if sends_schema else None, seed=seed)
        except LLMRejectedError as error:
            if not sends_schema or self.config.structured == "always" or isinstance(error, LLMFailedError):
                raise
            rejection = error
        # Without the schema the request succeeds only if the schema was the problem.
        response = self._request_with_retries(messages, schema=None, seed=seed)
        if self._accepts_schema:
            self._accepts_schema = False
            logger.warning("%s does not accept a JSON schema (%s); requests are sent without one", self.name, rejection)
        return response

    def _request_with_retries(
        self, messages: Sequence[ChatMessage], *, schema: dict[str, Any] | None, seed: int
    ) -> LLMResponse:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=self._delay,
            stop=lambda state: (
                self._stop.is_set()
                or self._seconds_left(state) <= 0
                or state.upcoming_sleep > self._seconds_left(state)  # less than the server asks to wait
            ),
            sleep=tenacity.sleep_using_event(self._stop),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            return retrying(self._request, messages, schema, seed)
        except openai.APIError as error:
            raise self._classify_failure(error) from error

    def _classify_failure(self, error: openai.APIError) -> LLMStoppedError | LLMRejectedError:
        """Decide whether a request's final failure concerns this request only, or all of them."""
        if getattr(error, "status_code", 0) in _REJECTED_STATUS:
            self._num_rejected += 1
            # A wrong model or option is rejected for every caption, a long caption only by itself.
            if self._has_replied or self._num_rejected < _MAX_REJECTED:
                return LLMRejectedError(f"the server rejects the request: {_summarize(error)}")
        elif _is_transient(error) and self._is_alive():
            return LLMFailedError(f"the server fails on this request but not on others: {_summarize(error)}")
        message = f"{self.name} is unavailable: {_summarize(error)}"
        if isinstance(error, openai.APIConnectionError) and not self._has_replied:
            message += "; is the server running, and is the address right?"
        if isinstance(error, openai.NotFoundError):
            message += "; is the address complete (most end in /v1), and the model's name the one the server uses?"
        if self._has_replied:
            message += f". Replies so far are saved in {self.config.cache}; run the same command again to resume"
        return LLMStoppedError(message)

    def _is_alive(self) -> bool:
        """Return whether the server replies to a trivial request."""
        try:
            self._request(_PROBE, None, 0)
        except openai.APIError:
            return False
        return True

    def _request(self, messages: Sequence[ChatMessage], schema: dict[str, Any] | None, seed: int) -> LLMResponse:
        self._count_request()
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
        deadline = time.monotonic() + self.config.timeout_seconds
        with self._client.chat.completions.with_streaming_response.create(
            model=self.config.model,
            messages=list(messages),  # type: ignore[arg-type]
            **options,
        ) as answer:
            return self._parse(_read_body(answer, deadline=deadline), response=answer.http_response)

    def _parse(self, body: bytes, *, response: Any) -> LLMResponse:
        try:
            value = json.loads(body)
            choice = value["choices"][0]
            text, is_truncated = choice["message"]["content"], choice.get("finish_reason") == "length"
            num_tokens = (value.get("usage") or {}).get("total_tokens")
            if not isinstance(text, str | None) or not isinstance(num_tokens, int | None):
                raise TypeError("content or total_tokens has the wrong type")
        except (TypeError, LookupError, ValueError, AttributeError, RecursionError) as error:
            message = f"the response is not a completion ({error})"
            raise openai.APIResponseValidationError(response, None, message=message) from error
        # An unpaired surrogate, which a model can write, can be neither saved nor sent.
        text = (text or "").encode("utf-8", "replace").decode()
        if num_tokens is None and self.config.max_tokens is not None:
            raise LLMStoppedError(
                f"{self.name} does not report token usage, which --max-tokens needs: cap the requests with "
                "--max-requests instead"
            )
        with self._lock:
            self.num_tokens += num_tokens or 0
            self._has_replied = True
        return LLMResponse(text, is_truncated, num_tokens)

    def _count_request(self) -> None:
        """Count a request; raise LLMStoppedError at a spend cap or after a stop."""
        config = self.config
        with self._lock:
            for cap, spent, name in (
                (config.max_requests, self.num_requests, "requests"),
                (config.max_tokens, self.num_tokens, "tokens"),
            ):
                if cap is not None and spent >= cap:
                    raise SpendCapError(
                        f"the cap of {cap} {name} is reached ({self.num_requests} requests, {self.num_tokens} tokens "
                        f"in this run). Replies so far are saved in {config.cache}; run the same command again to "
                        f"resume with {cap} more {name}, or raise --max-{name}"
                    )
            if self._stop.is_set():
                raise LLMStoppedError("stopped before this request was sent")
            self.num_requests += 1

    def _seconds_left(self, state: tenacity.RetryCallState) -> float:
        """Return the time left for retries of a request; a server that was never reached gets little."""
        error = _error_of(state)
        is_unreachable = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
        limit = self.config.retry_seconds
        if is_unreachable and not self._has_replied:
            limit = min(limit, _FIRST_CONTACT_SECONDS)
        return limit - (state.seconds_since_start or 0.0)

    def _delay(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds until the next attempt: exponential backoff with jitter, at least the Retry-After header.

        The last delay ends at the time limit, so that a server that has recovered by then gets one more attempt.
        """
        longest = min(2.0 ** (state.attempt_number - 1), _MAX_DELAY_SECONDS)
        delay = min(random.uniform(longest / 2, longest), max(self._seconds_left(state), 0.0))
        error = _error_of(state)
        after = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
        return max(delay, float(after)) if after.replace(".", "", 1).isdigit() else delay

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        with self._lock:  # one line for all threads that wait for the same server
            is_repeated, self._last_warning = time.monotonic() < self._last_warning + 1, time.monotonic()
        if not is_repeated:
            delay = state.next_action.sleep if state.next_action else 0.0
            logger.warning("%s: %s; retrying in %.1f s", self.name, _summarize(_error_of(state)), delay)


def _read_body(answer: openai.APIResponse[Any], *, deadline: float) -> bytes:
    """Read the body until a deadline; the client's own timeout is per read, which a slow trickle never exceeds."""
    body = b""
    try:
        for chunk in answer.iter_bytes():
            if time.monotonic() > deadline:
                raise openai.APITimeoutError(request=answer.http_request)
            body += chunk
    except openai.OpenAIError:
        raise
    # The client passes on its transport's exceptions here: httpx or httpx2, depending on its version.
    except Exception as error:
        message = f"the connection was lost: {error}"
        raise openai.APIConnectionError(message=message, request=answer.http_request) from error
    return body


def _is_transient(error: BaseException) -> bool:
    # An account without quota gets 429 like a busy server, but waiting does not help.
    is_out_of_quota = "insufficient_quota" in (getattr(error, "code", None), getattr(error, "type", None))
    return (isinstance(error, _TRANSIENT) or getattr(error, "status_code", 0) == 408) and not is_out_of_quota


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _summarize(error: BaseException | None) -> str:
    """Return what went wrong in one line of limited length."""
    # Servers give the reason in the body, not always in the field that the client's message is taken from.
    reason = f" {error.response.text}" if isinstance(error, openai.APIStatusError) else ""
    if isinstance(error, openai.APIConnectionError) and error.__cause__:
        reason = f" ({error.__cause__})"
    text = " ".join(f"{error}{reason}".split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
