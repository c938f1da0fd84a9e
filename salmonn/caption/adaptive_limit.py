"""Adaptive limit on concurrent requests to a server: additive increase, multiplicative decrease (AIMD).

    limit = AdaptiveLimit(16)
    ticket = limit.start()             # waits while there are as many requests as allowed
    limit.finish(ticket, work=tokens)  # or limit.abandon(ticket); limit.back_off() at status 429

The limit grows by one for each answer until a first signal, as in TCP's slow start, and then by one for each round of
answers. A busy server (429, 5xx, a timeout) halves it. So does, by a quarter, an answer time that has tripled: by then
requests wait in the server's own queue, and more of them only wait longer. One request at a time that is as slow means
that the clips have become longer, not the queue: the best time is then measured again.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_START = 2.0
_BUSY_FACTOR, _SLOW_FACTOR = 0.5, 0.75
_MAX_SLOWDOWN = 3.0  # of the time per unit of work, relative to the best round
_MIN_ROUND = 4  # answers


@dataclass(frozen=True)
class Ticket:
    """A request that was started: when, and whether it used the last free place."""

    started_at: float
    filled: bool


class AdaptiveLimit:
    """Adaptive limit on concurrent requests; threads may share it.

    Args:
        maximum: highest limit.
        now: clock, in seconds.

    Attributes:
        num_active: number of requests in flight.
    """

    def __init__(self, maximum: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self.num_active = 0
        self._maximum, self._now = float(maximum), now
        self._limit = min(_START, self._maximum)
        self._is_slow_start = True
        self._round: list[float] = []  # seconds per unit of work
        self._best = float("inf")
        self._answer_seconds = 0.0
        self._decreased_at = -float("inf")
        self._lock = threading.Condition()

    @property
    def limit(self) -> int:
        """The limit at present, at least 1."""
        return int(self._limit)

    @property
    def is_full(self) -> bool:
        """Whether no request may be started now."""
        return self.num_active >= self.limit

    def start(self) -> Ticket:
        """Wait while there are as many requests as allowed, and note that another one starts."""
        with self._lock:
            self._lock.wait_for(lambda: not self.is_full)
            self.num_active += 1
            return Ticket(self._now(), self.num_active >= self.limit)

    def abandon(self, ticket: Ticket) -> None:
        """Note that a request ended without an answer."""
        with self._lock:
            self.num_active -= 1
            self._lock.notify_all()

    def finish(self, ticket: Ticket, *, work: float = 1.0) -> None:
        """Note that a request was answered.

        Args:
            ticket: from `start`.
            work: measure of its size, such as its number of tokens.
        """
        with self._lock:
            self.num_active -= 1
            self._lock.notify_all()
            self._answer_seconds = self._now() - ticket.started_at
            if ticket.started_at >= self._decreased_at:  # others show the time at a higher limit
                self._round.append(self._answer_seconds / max(work, 1.0))
            ends_round = len(self._round) >= max(_MIN_ROUND, self.limit)
            if ends_round and self._end_round():
                self._decrease(_SLOW_FACTOR)
            elif ticket.filled and (ends_round or self._is_slow_start):  # a limit that is not reached is not tested
                self._limit = min(self._limit + 1.0, self._maximum)

    def back_off(self) -> None:
        """Note that the server is busy; requests that were started before the last decrease do not count again."""
        with self._lock:
            if self._now() - self._decreased_at > max(1.0, self._answer_seconds):
                self._decrease(_BUSY_FACTOR)

    def _end_round(self) -> bool:
        """Return whether the requests of a round took too long."""
        mean = sum(self._round) / len(self._round)
        self._round.clear()
        if mean <= _MAX_SLOWDOWN * self._best:
            self._best = min(self._best, mean)
            return False
        if self.limit == 1:
            self._best, self._is_slow_start = mean, True
            return False
        return True

    def _decrease(self, factor: float) -> None:
        self._limit = max(self._limit * factor, 1.0)
        self._is_slow_start = False
        self._decreased_at = self._now()
        self._round.clear()
