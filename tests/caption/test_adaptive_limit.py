"""The adaptive limit against simulated servers: where it settles, and how it reacts to a busy server."""

import heapq

import pytest

from salmonn.caption.adaptive_limit import AdaptiveLimit


class Simulation:
    """A server that answers up to `capacity` requests at once in a second each, and the others more slowly.

    With more than `queue` requests it refuses further ones with status 429, and the client retries a second later.
    """

    def __init__(self, maximum: int, *, capacity: float, queue: float = float("inf")) -> None:
        self.now = 0.0
        self.limit = AdaptiveLimit(maximum, now=lambda: self.now)
        self.capacity, self.queue = capacity, queue
        self.limits: list[int] = []
        self.num_refused = 0
        self._events: list[tuple[float, int, object]] = []
        self._number = 0

    def run(self, answers: int) -> None:
        """Send requests, as many as the limit allows, until there are this many answers."""
        while answers:
            while not self.limit.is_full:
                self._send(self.limit.start())
            self.now, _, ticket = heapq.heappop(self._events)
            self.limit.finish(ticket)
            self.limits.append(self.limit.limit)
            answers -= 1

    def _send(self, ticket) -> None:
        delay = 0.0
        while self.limit.num_active > self.queue + delay:  # each retry finds the queue shorter
            self.num_refused += 1
            self.limit.back_off()
            delay += 1.0
        self._number += 1
        seconds = delay + max(1.0, self.limit.num_active / self.capacity)
        heapq.heappush(self._events, (self.now + seconds, self._number, ticket))


def test_an_idle_server_gets_as_many_requests_as_allowed():
    simulation = Simulation(32, capacity=1000)
    simulation.run(200)
    assert simulation.limits[0] == 2 and simulation.limits[-1] == max(simulation.limits) == 32
    # Slow start doubles: 2, 4, 8, ... so that 32 are reached within five rounds.
    assert simulation.now < 13


@pytest.mark.parametrize("capacity", [2, 5, 10])
def test_answers_that_take_three_times_as_long_stop_the_growth(capacity):
    simulation = Simulation(256, capacity=capacity)
    simulation.run(3000)
    settled = simulation.limits[1000:]
    assert capacity <= sum(settled) / len(settled) <= 4 * capacity
    assert max(settled) < 8 * capacity and min(settled) >= 1


def test_a_refusing_server_is_approached_from_below():
    simulation = Simulation(256, capacity=1000, queue=12)
    simulation.run(3000)
    settled = simulation.limits[1000:]
    assert 6 <= sum(settled) / len(settled) <= 13 and max(settled) <= 14
    assert simulation.num_refused < 300


def test_back_off_counts_once_for_a_burst_and_never_ends_below_one():
    now = [0.0]
    limit = AdaptiveLimit(64, now=lambda: now[0])
    for _ in range(62):
        limit.start()
        limit.finish(limit.start()), limit.abandon(limit.start())
        limit.num_active = 0
    before = limit.limit
    for _ in range(10):
        limit.back_off()
    assert limit.limit == before // 2
    for _ in range(10):
        now[0] += 100.0
        limit.back_off()
    assert limit.limit == 1 and not limit.is_full


def test_an_unused_limit_does_not_grow():
    limit = AdaptiveLimit(64)
    limit.finish(limit.start())  # one of two places
    assert limit.limit == 2
    first, second = limit.start(), limit.start()
    limit.finish(second)
    assert limit.limit == 3
    limit.finish(first)
    assert limit.limit == 3


def test_longer_clips_are_no_slower_server():
    now = [0.0]
    limit = AdaptiveLimit(8, now=lambda: now[0])
    for tokens in [100] * 40 + [10_000] * 40:
        tickets = [limit.start() for _ in range(limit.limit)]
        now[0] += tokens / 100
        for ticket in tickets:
            limit.finish(ticket, work=tokens)
    assert limit.limit == 8


def test_a_workload_that_becomes_slower_is_measured_again():
    """Without a measure of their size, clips that take 20 times as long first look like a congested server."""
    now = [0.0]
    limit = AdaptiveLimit(8, now=lambda: now[0])
    limits = []
    for seconds in [1.0] * 20 + [20.0] * 60:
        tickets = [limit.start() for _ in range(limit.limit)]
        now[0] += seconds
        for ticket in tickets:
            limit.finish(ticket)
        limits.append(limit.limit)
    assert limits[19] == 8 and min(limits[20:]) == 1 and limits[-1] == 8
