"""Client of a language model that judges: every reply is kept on disk, so that no request is paid for twice."""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from salmonn.score.api_keys import API_KEY_FLAG
from salmonn.score.budget import Budget
from salmonn.score.chat_client import ChatClient, LLMRejectedError, LLMStoppedError, NotSentError, SpendCapError
from salmonn.score.config import LLMConfig
from salmonn.score.llm_protocol import ChatMessage, ChatRequest, Choice, LLMResponse
from salmonn.score.response_cache import ResponseCache

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class LLMClient(ChatClient):
    """Sends requests to a language model, many of them concurrently.

    Args:
        config: server, limits, and the file of replies.
        budget, key_flag: see `ChatClient`.

    Raises:
        ValueError: the server's API key is not set, or the cache file cannot be used.
    """

    def __init__(self, config: LLMConfig, *, budget: Budget | None = None, key_flag: str = API_KEY_FLAG) -> None:
        super().__init__(config, saved=f"Replies so far are saved in {config.cache}", budget=budget, key_flag=key_flag)
        self._cache = ResponseCache(config.cache.expanduser())

    def complete(
        self, messages: Sequence[ChatMessage], *, schema: dict[str, Any], seed: int, only_text: bool = False
    ) -> LLMResponse:
        """Return the reply to a conversation, from the cache if possible.

        A cached reply is one of a model with the same name to the same request, wherever it was served.

        Args:
            messages: messages as `{"role", "content"}`.
            schema: JSON schema of the reply, for servers with structured outputs.
            seed: sampling seed, to which the configured one is added; another seed makes another request.
            only_text: accept only a text, not what a reply may have in its place, such as a refusal or reasoning.

        Raises:
            LLMRejectedError: the server rejects this request (for example because it is too long), or its reply, which
                is not kept, has no text where `only_text` asks for one.
            LLMStoppedError: no further request is possible.
        """
        config = self.config
        seed += config.seed or 0
        request = {"messages": list(messages), "seed": seed}
        request |= {"temperature": config.temperature, "max_reply_tokens": config.reply_token_limit}
        text = json.dumps([config.model, schema, request], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        response = self._cache.get(key)
        if response is None:
            reply = self.send(
                ChatRequest(
                    messages,
                    schema=None if config.structured == "never" else schema,
                    seed=None if config.seed is None else seed,
                    temperature=config.temperature,
                    token_limit=config.reply_token_limit,
                )
            )
            if only_text and not reply.choices[0].text.strip():
                raise LLMRejectedError(_describe_missing_text(reply.choices[0]))
            response = reply.first_reply()
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
        completed: SimpleQueue[Future[Result]] = SimpleQueue()
        futures = [executor.submit(function, item) for item in items]
        for future in futures:
            future.add_done_callback(completed.put)
        try:
            for _ in futures:
                result = _get_interruptibly(completed).result()
                if progress:
                    progress(result)
        except BaseException as error:
            self._stop.set()
            if isinstance(error, KeyboardInterrupt):
                logger.warning("waiting for replies in flight, which will be saved (press Ctrl-C again to drop them)")
            executor.shutdown(wait=False, cancel_futures=True)
            # Not `shutdown(wait=True)`: like every wait without a timeout, it can miss a second Ctrl-C.
            while not all(future.done() for future in futures):
                time.sleep(0.05)
            if isinstance(error, SpendCapError):
                # A request in flight may show that the cap is not the real problem.
                for future in futures:
                    other = None if future.cancelled() else future.exception()
                    if isinstance(other, LLMStoppedError) and not isinstance(other, SpendCapError | NotSentError):
                        raise other from None
            raise
        executor.shutdown()
        return [future.result() for future in futures]


def _describe_missing_text(choice: Choice) -> str:
    """Return why a reply without text cannot be used."""
    found = f"{choice.instead_kind}: {choice.instead[:200]!r}" if choice.instead else ""
    limit = "token limit reached" if choice.finish_reason == "length" else ""
    details = ", ".join(filter(None, (limit, found)))
    return f"the reply has no text{f' ({details})' if details else ''}; try another model"


def _get_interruptibly(queue: SimpleQueue[Item]) -> Item:
    """Return the next item; waits without a timeout can miss a Ctrl-C that comes just before they begin."""
    while True:
        with contextlib.suppress(Empty):
            return queue.get(timeout=0.5)
