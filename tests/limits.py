"""Outer limits of waiting, in one place: healthy code does not reach them even where a step takes ten times as long."""

import time
from collections.abc import Callable

STEP_SECONDS = 180.0  # one step: an answer of a server, an event of a page, the end of a thread
RUN_SECONDS = 900.0  # a whole process


def wait_until(done: Callable[[], object], *, seconds: float = STEP_SECONDS) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
