"""Client of a chat model on any OpenAI-compatible server, with retries, negotiated parameters and spend caps.

Transient failures (server busy, failing or unreachable) are retried with growing delays for a limited time. Permanent
ones (wrong key, no quota, spend cap) raise an error that stops the run. An optional parameter that the server refuses
is sent in another way, or left out, from then on.
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import openai
import tenacity

from salmonn.score.api_keys import (
    API_KEY_FLAG,
    OPENAI,
    default_address,
    find_api_key,
    is_default_server,
    key_variable,
)
from salmonn.score.budget import Budget
from salmonn.score.config import LLMConfig
from salmonn.score.llm_protocol import (
    ALL_OPTIONS,
    ChatRequest,
    ChatResponse,
    ErrorBody,
    RequestOptions,
    excerpt,
    read_response,
    refused_option,
    retry_after_seconds,
    suspected_option,
)

logger = logging.getLogger(__name__)

_PROBE = [{"role": "user", "content": "Reply with the word yes."}]
_PROBE_TOKENS = 16
_REJECTED_STATUS = (400, 413, 422)  # bad request, too large, unprocessable: another request may succeed
_MAX_DELAY_SECONDS = 60.0
_FIRST_CONTACT_SECONDS = 10.0
_MAX_REJECTED = 20  # before the first reply


class LLMStoppedError(ValueError):
    """No further request is possible in this run."""


class NotSentError(LLMStoppedError):
    """A request was not sent because another error, or the caller, has stopped the client."""


class SpendCapError(LLMStoppedError):
    """A spend cap is reached."""


class LLMRejectedError(ValueError):
    """The server rejects this request, and would reject it again."""


class LLMFailedError(LLMRejectedError):
    """The server fails on this request, but not on others."""


@dataclass(frozen=True)
class ServedModel:
    """A model in a server's list: its name, and who owns it according to the server."""

    name: str
    owner: str


class ChatClient:
    """Sends requests to a chat model; threads may share it.

    Args:
        config: server and limits.
        saved: sentence for errors in the middle of a run: where its results so far are.
        budget: what all clients of a run may spend together; None for the caps of `config`, for this client alone.
        key_flag: flag that sets `config.api_key_env`.

    Attributes:
        on_retry: called with the error of each request that is about to be retried.
        internal_error_seconds: how long a request is retried after status 500, which some servers also send for what
            they cannot process; at most `config.retry_seconds`.

    Raises:
        ValueError: the server's API key is not set.
    """

    def __init__(
        self, config: LLMConfig, *, saved: str, budget: Budget | None = None, key_flag: str = API_KEY_FLAG
    ) -> None:
        self.config = config
        self.internal_error_seconds = config.retry_seconds
        self.on_retry: Callable[[BaseException], object] = lambda error: None
        self._saved, self._key_flag = saved, key_flag
        self.budget = budget or Budget(config.max_requests, config.max_tokens)
        base_url = (config.base_url or default_address()).rstrip("/")
        self.address = "OpenAI" if base_url == OPENAI else base_url
        self.name = f"{config.model} at {self.address}"
        self._num_rejected = 0
        self._has_replied = False
        self._last_warning = self._resume_at = -1.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._options: RequestOptions = {**ALL_OPTIONS}  # what requests include before the server has refused anything
        if config.structured == "always":
            self._options = {**ALL_OPTIONS, "response_format": ("json_schema",)}
        self._accepted_formats: set[str] = set()  # response formats with which the server has replied
        # Retries are handled here, so that they count against the spend cap and end after a set time.
        self._client = openai.OpenAI(
            api_key=find_api_key(config, flag=key_flag),
            base_url=base_url,
            timeout=config.timeout_seconds,
            max_retries=0,
            # A proxy in the environment cannot reach a server on this machine.
            http_client=openai.DefaultHttpxClient(mounts=dict.fromkeys(("all://", "http://", "https://")))
            if _is_loopback(config.base_url)
            else None,
        )
        if not is_default_server(config):  # those of the environment are OpenAI's, too
            self._client.organization = self._client.project = None
            self._client._custom_headers = {}

    def list_models(self) -> list[ServedModel] | None:
        """Return the models that the server offers; None if it has no such list.

        Raises:
            LLMStoppedError: the server is unreachable, refuses the key, or is not OpenAI-compatible.
        """
        try:
            # Not parsed by the client, which takes any body for a list; not by a copy of the client (`with_options`),
            # which would read OpenAI's headers from the environment again.
            body = self._client.models.with_raw_response.list(timeout=_FIRST_CONTACT_SECONDS).text
            listed = json.loads(body)["data"]
            return [ServedModel(str(model["id"]), str(model.get("owned_by"))) for model in listed]
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise LLMStoppedError(self._key_refused(error)) from error
            if error.status_code in (404, 405, 501):
                return None
            raise LLMStoppedError(f"{self.address} cannot list its models: {_summarize(error)}") from error
        except openai.APIConnectionError as error:
            raise LLMStoppedError(
                f"{self.address} cannot be reached: {_summarize(error)}; is the server running, and is the address "
                f"right?{self._proxy_note()}"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise LLMStoppedError(
                f"{self.address} is not an OpenAI-compatible server: instead of a list of models it sends "
                f"{excerpt(body.encode())}; most addresses end in /v1"
            ) from error

    def post(self, route: str, body: Mapping[str, Any], *, retries_internal_errors: bool = True) -> str:
        """Send a request that is not a chat completion, and return the body of the response.

        Args:
            route: path behind the server's address, or a whole address on the server.
            body: JSON object.
            retries_internal_errors: whether status 500 is taken for a fault that may pass, and not for a refusal.

        Raises:
            APIStatusError: the server refuses the request.
            LLMStoppedError: the server refuses the key, cannot be reached, or is busy for too long.
        """

        def may_pass(error: BaseException | None) -> bool:
            return _is_transient(error) and (retries_internal_errors or _status_of(error) != 500)

        retrying = tenacity.Retrying(
            retry=lambda state: may_pass(_error_of(state)),
            wait=self._delay,
            stop=lambda state: self._stop.is_set() or self._seconds_left(state) <= 0,
            sleep=tenacity.sleep_using_event(self._stop),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            return retrying(self._client.post, route, cast_to=str, body=dict(body))
        except openai.APIStatusError as error:
            if error.status_code == 401:
                raise LLMStoppedError(self._key_refused(error)) from error
            if may_pass(error):
                raise LLMStoppedError(f"{self.address} is unavailable: {_summarize(error)}") from error
            raise
        except openai.APIConnectionError as error:
            raise LLMStoppedError(f"{self.address} cannot be reached: {_summarize(error)}") from error

    def use_model(self, name: str) -> None:
        """Address further requests to another model of the server, such as an adapter of the same one."""
        self.config = replace(self.config, model=name)
        self.name = f"{name} at {self.address}"

    def stop(self) -> None:
        """Send no further request; those in flight are completed."""
        self._stop.set()

    def send(self, request: ChatRequest) -> ChatResponse:
        """Send a request; if the server refuses an optional part of it, send it without, and all further ones too.

        Raises:
            LLMRejectedError: the server rejects this request (for example because it is too long).
            LLMStoppedError: no further request is possible.
        """
        options = request.applicable(self._options)
        reasons: dict[str, str] = {}  # errors by the option that they made us change
        empty: ChatResponse | None = None
        while True:
            try:
                response = self._request_with_retries(request, options)
            except openai.APIError as error:
                if empty:
                    return empty
                name, reason = self._next_change(options, error), _summarize(error)
                if not name:
                    raise self._classify_failure(error) from error
            else:
                if not response.is_empty:
                    self._keep(options, reasons)
                    return response
                empty = empty or response
                name, reason = suspected_option(options, 200, self._accepted_formats), "empty reply"
                if not name:
                    self._accepted_formats.update(self._options["response_format"])  # they are not the cause
                    return empty
            reasons.setdefault(name, reason)
            options = {**options, name: options[name][1:]}

    def _next_change(self, options: RequestOptions, error: openai.APIError) -> str:
        """Return the name of the option to change after an error, or "" if none can have caused it."""
        status = _status_of(error)
        if name := refused_option(options, _describe(error), status):
            return name
        name = suspected_option(options, status, self._accepted_formats) if status >= 400 else ""
        return name if status < 500 or self._is_alive() else ""

    def _keep(self, options: RequestOptions, reasons: dict[str, str]) -> None:
        """Send all further requests with options that have just succeeded."""
        with self._lock:
            self._accepted_formats.add(options["response_format"][0])
            for name, reason in reasons.items():
                if len(options[name]) < len(self._options[name]):
                    old, new = self._options[name][0], options[name][0]
                    self._options = {**self._options, name: options[name]}
                    logger.warning(
                        "%s does not accept %s (%s); requests are sent %s",
                        self.name,
                        old or f"requests without {new}",
                        reason,
                        f"with {new}" if new else "without it",
                    )

    def _request_with_retries(self, request: ChatRequest, options: RequestOptions) -> ChatResponse:
        retrying = tenacity.Retrying(
            retry=self._should_retry,
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
        return retrying(self._request, request, options)

    def _should_retry(self, state: tenacity.RetryCallState) -> bool:
        error, options = _error_of(state), state.args[1]
        if not _is_transient(error) or refused_option(options, _describe(error), _status_of(error)):
            return False
        # Some servers break on a response format that they do not know, and on nothing else.
        is_suspect = state.attempt_number >= 3 and _status_of(error) == 500 and not self._stop.is_set()
        return not (is_suspect and suspected_option(options, 500, self._accepted_formats) and self._is_alive())

    def _classify_failure(self, error: openai.APIError) -> LLMStoppedError | LLMRejectedError:
        """Decide whether a request's final failure concerns this request only, or all of them."""
        after = _retry_after(error)
        if _status_of(error) in _REJECTED_STATUS:
            self._num_rejected += 1
            # A wrong model or option is rejected for every caption; a caption that is too long is rejected alone.
            if self._has_replied or self._num_rejected < _MAX_REJECTED:
                return LLMRejectedError(f"the server rejects the request: {_summarize(error)}")
        elif _is_transient(error) and not after and self._is_alive():
            return LLMFailedError(f"the server fails on this request but not on others: {_summarize(error)}")
        if _status_of(error) in (401, 403) and isinstance(error, openai.APIStatusError):
            return LLMStoppedError(self._key_refused(error))
        message = f"{self.name} is unavailable: {_summarize(error)}"
        if after:
            message += (
                f"; the server asks to wait {after:.0f} s, and --retry-seconds is {self.config.retry_seconds:.0f}"
            )
        if isinstance(error, openai.APIConnectionError) and not self._has_replied:
            message += f"; is the server running, and is the address right?{self._proxy_note()}"
        if _status_of(error) == 404:
            message += "; is the address complete (most end in /v1), and the model's name the one the server uses?"
        if self._has_replied:
            message += f". {self._saved}; run the same command again to resume"
        return LLMStoppedError(message)

    def _proxy_note(self) -> str:
        """Return a sentence about the proxy between us and the server, if there is one."""
        address = self._client.base_url
        proxy = getproxies().get(address.scheme) or getproxies().get("all")
        if not proxy or _is_loopback(self.config.base_url) or proxy_bypass(address.host):
            return ""
        return f" Requests go through the proxy {proxy.rpartition('@')[2]} of the environment; NO_PROXY excludes hosts."

    def _is_alive(self) -> bool:
        """Return whether the server replies to a trivial request."""
        config = self.config
        limit = None if config.reply_token_limit is None else min(config.reply_token_limit, _PROBE_TOKENS)
        probe = ChatRequest(_PROBE, temperature=config.temperature, token_limit=limit)
        try:
            self._request(probe, probe.applicable(self._options))
        except openai.APIError as error:
            return _status_of(error) in _REJECTED_STATUS  # it has read the request
        return True

    def _key_refused(self, error: openai.APIStatusError) -> str:
        variable = key_variable(self.config)
        if variable is None:
            key = f"requires an API key: name the environment variable that has it with {self._key_flag}"
        else:
            key = f"refuses the API key in the environment variable {variable}"
        return f"{self.address} {key}: {_summarize(error)}"

    def _request(self, request: ChatRequest, options: RequestOptions) -> ChatResponse:
        while (seconds := self._resume_at - time.monotonic()) > 0 and not self._stop.wait(seconds):
            pass
        if self._stop.is_set():
            raise NotSentError("stopped before this request was sent")
        if reason := self.budget.take_request(self.name):
            raise SpendCapError(reason.format(saved=self._saved))
        deadline = time.monotonic() + self.config.timeout_seconds
        with self._client.chat.completions.with_streaming_response.create(
            model=self.config.model,
            messages=list(request.messages),  # type: ignore[arg-type]
            extra_body=request.body(options),
        ) as answer:
            body = _read_body(answer, deadline=deadline)
            try:
                response = read_response(body)
            except ValueError as error:
                invalid = openai.APIResponseValidationError(
                    answer.http_response, getattr(error, "details", None), message=str(error)
                )
                invalid.status_code = error.status if isinstance(error, ErrorBody) else 200
                raise invalid from error
        if response.num_tokens is None and self.budget.max_tokens is not None:
            raise LLMStoppedError(
                f"{self.name} does not report token usage, which {self.budget.token_cap_flag} needs: cap the requests "
                "with --max-requests instead"
            )
        self.budget.add_tokens(self.name, response.num_tokens or 0)
        self._has_replied = True
        return response

    def _seconds_left(self, state: tenacity.RetryCallState) -> float:
        """Return the time left for retries of a request; a server that was never reached gets little."""
        error = _error_of(state)
        is_unreachable = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
        limit = self.internal_error_seconds if _status_of(error) == 500 else self.config.retry_seconds
        if is_unreachable and not self._has_replied:
            limit = min(limit, _FIRST_CONTACT_SECONDS)
        return limit - (state.seconds_since_start or 0.0)

    def _delay(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds until the next attempt: exponential backoff with jitter, or what the server asks.

        The last delay ends at the time limit, so that a server that has recovered by then gets one more attempt.
        """
        longest = min(2.0 ** (state.attempt_number - 1), _MAX_DELAY_SECONDS)
        delay = min(random.uniform(longest / 2, longest), max(self._seconds_left(state), 0.0))
        after = _retry_after(_error_of(state))
        if 0 < after <= self._seconds_left(state):  # other requests wait for the server as well
            self._resume_at = max(self._resume_at, time.monotonic() + after)
        return max(delay, after)

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        if error := _error_of(state):
            self.on_retry(error)
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


def _is_loopback(address: str | None) -> bool:
    host = urlsplit(address or "").hostname or ""
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _is_transient(error: BaseException | None) -> bool:
    # An account without quota gets 429 like a busy server, but waiting does not help.
    if "insufficient_quota" in (getattr(error, "code", None), getattr(error, "type", None)):
        return False
    status = _status_of(error)
    # An invalid body with status 200 is transient too: it usually comes from a failing proxy.
    return isinstance(error, openai.APIConnectionError) or status in (200, 408, 409, 429) or status >= 500


def _status_of(error: BaseException | None) -> int:
    """Return the HTTP status of an error, that of an error in a body with status 200 included; 0 without one."""
    return int(getattr(error, "status_code", 0))


def _retry_after(error: BaseException | None) -> float:
    response = getattr(error, "response", None)
    return 0.0 if response is None else retry_after_seconds(response.headers)


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _describe(error: BaseException | None) -> str:
    """Return what went wrong in one line."""
    # Servers give the reason in the body, not always in the field that the client's message is taken from.
    reason = f" {error.response.text}" if isinstance(error, openai.APIStatusError) else ""
    if isinstance(error, openai.APIConnectionError) and error.__cause__:
        reason = f" ({error.__cause__})"
    return " ".join(f"{error}{reason}".split()) or type(error).__name__


def _summarize(error: BaseException | None) -> str:
    """Return what went wrong in one line of limited length."""
    text = _describe(error)
    return text if len(text) <= 300 else text[:300] + " ..."
