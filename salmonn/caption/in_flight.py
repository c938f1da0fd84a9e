"""Requests in flight to a server, which are paid for: their replies are awaited, also after Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from salmonn.caption.generator import to_failure
from salmonn.caption.loader import ClipJob
from salmonn.caption.server_messages import EncodedClip
from salmonn.records import Failure
from salmonn.score.chat_client import LLMRejectedError, LLMStoppedError

Item = TypeVar("Item")
T = TypeVar("T")

_POLL_SECONDS = 0.5  # within which Ctrl-C is noticed


class AnswerError(ValueError):
    """An answer has no caption."""


class DeferredInterrupt:
    """Defers the first Ctrl-C within a `with` statement, wherever it comes, and raises it at the end of the statement.

    Python raises a KeyboardInterrupt between any two instructions: while a caption is being written, or in a loop over
    a generator, which then cannot finish its work. Here the statement learns of it by `is_set`, finishes what it has
    begun, and leaves early. A second Ctrl-C raises a KeyboardInterrupt at once.

    Ctrl-C is not deferred outside the main thread, nor where it has another handler than Python's.

    Attributes:
        is_set: whether Ctrl-C was pressed.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and no other error ends the statement.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._is_installed = False

    def __enter__(self) -> "DeferredInterrupt":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._defer)
            self._is_installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.is_set and (kind is None or kind is GeneratorExit):
            raise KeyboardInterrupt

    def _defer(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class InFlight(Generic[T]):
    """Requests that have been submitted and whose results have not been taken yet.

    Args:
        pool: threads that run them.
        answer: sends one and returns what becomes of the answer.
        interrupt: when it is set, no method waits long.

    Attributes:
        jobs: the requests by their future results.
        errors: errors after which no further request is possible.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, answer: Callable[[ClipJob, EncodedClip], T], *, interrupt: DeferredInterrupt
    ) -> None:
        self.jobs: dict[Future[T], ClipJob] = {}
        self.errors: list[LLMStoppedError] = []
        self.interrupt = interrupt
        self._pool, self._answer = pool, answer

    @property
    def has_completed(self) -> bool:
        """Whether a result can be taken without waiting."""
        return any(future.done() for future in self.jobs)

    def submit(self, job: ClipJob, clip: EncodedClip) -> None:
        """Send a request from one of the threads."""
        self.jobs[self._pool.submit(self._answer, job, clip)] = job

    def wait(self, other: Future[Any] | None = None) -> None:
        """Wait until a result can be taken, or another future is done, or Ctrl-C is pressed."""
        awaited: set[Future[Any]] = set(self.jobs) if other is None else {*self.jobs, other}
        # A wait without a timeout would not notice Ctrl-C.
        while not wait(awaited, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED).done and not self.interrupt.is_set:
            pass

    def take(self) -> list[tuple[ClipJob, T | Failure]]:
        """Wait for results and return them; after Ctrl-C, there may be none yet."""
        self.wait()
        done = [future for future in self.jobs if future.done()]
        results: list[tuple[ClipJob, T | Failure]] = []
        for future in done:
            job = self.jobs.pop(future)
            try:
                results.append((job, future.result()))
            except LLMStoppedError as error:
                self.errors.append(error)
            except (LLMRejectedError, AnswerError) as error:
                results.append((job, to_failure(job.request, f"{job.request.path}: {error}", stage="caption")))
        return results

    def raise_error(self) -> None:
        """Raise the first error after which no further request is possible, if there is one."""
        if self.errors:
            raise self.errors[0]


def next_in_thread(items: Iterator[Item]) -> "Future[Item | None]":
    """Return the next item as a future, None at the end.

    The thread does not keep the process alive: it may wait for a list that comes through a pipe.
    """
    future: Future[Item | None] = Future()

    def take() -> None:
        try:
            future.set_result(next(items, None))
        except BaseException as error:  # noqa: BLE001 - raised by the future
            future.set_exception(error)

    threading.Thread(target=take, name="next clip", daemon=True).start()
    return future
