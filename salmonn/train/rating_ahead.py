"""Rating of captions by a judge behind a URL, while further captions are sampled."""

import logging
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from salmonn import dist
from salmonn.preference.rating import Rating, Reward
from salmonn.records import Caption, Reference, Unscored
from salmonn.score.judge import Judge, ScoringTask
from salmonn.score.llm_judge import LLMJudge

log = logging.getLogger(__name__)
CaptionKey = tuple[str, int]  # video and sample


class RatingAhead:
    """Rates captions in a thread, so that no GPU waits for a judge behind a URL; to be used in a `with` statement.

    The ratings are those that `rate_captions` would make afterwards. Replies of the judge are saved as they arrive, so
    a killed run loses none. Leaving the statement waits for the last ratings; after an error in it, no further request
    is sent. With any other judge this does nothing: it would compete with the model that samples.

    Args:
        reward: reward that rates.
        judge: judge that it uses.
        references: annotations by video.
    """

    def __init__(self, reward: Reward, *, judge: Judge, references: Mapping[str, Reference]) -> None:
        self._reward = reward
        self._judge = judge if isinstance(judge, LLMJudge) else None
        self._references = references
        self._queue = queue.SimpleQueue[Sequence[Caption] | None]()
        self._ratings: dict[CaptionKey, Rating | Unscored] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rating")
        self._running: Future[None] | None = None

    def __enter__(self) -> "RatingAhead":
        if self._judge:
            self._running = self._executor.submit(self._run)
            self._running.add_done_callback(_warn_of_error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._judge is None or self._running is None:
            return
        if kind is not None:
            self._judge.client.stop()
        self._queue.put(None)
        # After an error, other ranks must learn of it before the replies in flight have arrived.
        self._executor.shutdown(wait=kind is None)
        if kind is None:
            self._running.result()

    def add(self, captions: Sequence[Caption]) -> None:
        """Rate captions, all those of a clip at once, as soon as those before them are rated."""
        if self._judge:
            self._queue.put(captions)

    def gather(self) -> dict[CaptionKey, Rating | Unscored]:
        """Return the ratings of all ranks, by video and sample."""
        parts = dist.gather([list(self._ratings.items())])  # of any lengths
        return dict(item for part in parts for item in part)

    def _run(self) -> None:
        while captions := self._take():
            ratings = self._reward.rate([ScoringTask(self._references[one.video], one) for one in captions])
            self._ratings |= {(one.video, one.sample): rating for one, rating in zip(captions, ratings, strict=True)}

    def _take(self) -> list[Caption]:
        """Wait for captions and return all that there are; none at the end."""
        captions = list(self._queue.get() or ())
        while captions:
            try:
                added = self._queue.get_nowait()
            except queue.Empty:
                break
            if added is None:
                self._queue.put(None)
                break
            captions += added
        return captions


def _warn_of_error(rating: "Future[None]") -> None:
    if error := rating.exception():
        log.warning("rating has stopped, and the run ends after sampling: %s", error)
