"""A bar with clips a minute, time left and failures; how many there are is counted meanwhile, in a thread."""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from tqdm import tqdm

from salmonn.batch.job import RunStats

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_FORMAT_WITHOUT_TOTAL = "{desc}: {n_fmt} videos [{elapsed}{postfix}]"
_LOG_SECONDS = 30.0  # between two lines where the bar goes into a file


class JobProgress:
    """The bar of a run; to be used in a `with` statement.

    Args:
        tally: what the run counts.
        count: gives one item for each video that is to be done; None where that cannot be asked, as of stdin.
        is_shown: False on all processes but one.
    """

    def __init__(self, stats: RunStats, *, count: Callable[[], Iterable[object]] | None, is_shown: bool = True) -> None:
        self._tally = stats
        self._count = count
        self._is_over = threading.Event()
        self._total: int | None = None
        self._begin = time.perf_counter()
        self._bar = tqdm(
            desc="captioning",
            unit="video",
            disable=not is_shown,
            bar_format=_FORMAT_WITHOUT_TOTAL,
            mininterval=0.1 if sys.stderr.isatty() else _LOG_SECONDS,
        )

    def __enter__(self) -> "JobProgress":
        if self._count and not self._bar.disable:
            threading.Thread(target=self._count_all, name="counting", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._bar.close()

    def step(self) -> None:
        """Show what was counted since."""
        if self._total is not None and self._bar.total is None:
            self._bar.total, self._bar.bar_format = self._total, _FORMAT
        minutes = (time.perf_counter() - self._begin) / 60
        words = f"{self._tally.videos / minutes:.1f} clips/min"
        if self._tally.failed:
            words += f", {self._tally.failed} failed"
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(self._tally.videos - self._bar.n)

    def _count_all(self) -> None:
        assert self._count is not None
        total = 0
        for _ in self._count():
            total += 1
            if self._is_over.is_set():
                return
        self._total = total
