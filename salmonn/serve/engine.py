"""One model and many who ask it: files are read in worker processes, those who wait are answered side by side."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from salmonn.caption.captioner import NO_ROOM, Captioner, Piece, Span
from salmonn.caption.generate import Sampling
from salmonn.caption.prompt import prompt_ids
from salmonn.caption.reading import ClipReader, Wanted
from salmonn.media.clip import Clip
from salmonn.model.network import Media
from salmonn.records import Use
from salmonn.serve.bounds import Bounded

logger = logging.getLogger(__name__)
SHUTTING_DOWN = "the server is shutting down: ask again when it is back"
_CUT_SECONDS = 10.0  # for the step that the model is at when it is cut off


class Busy(Exception):
    """As many wait as may wait, or the engine is closing; the message is for whoever asked."""


class CrowdedError(Busy):
    """Those answered side by side had no room together, when a part of their answers was told already."""


class ModelFailedError(RuntimeError):
    """The model could not answer, through no fault of whoever asked."""


@dataclass(frozen=True)
class Query:
    """What is asked of one file.

    Args:
        path: of the file.
        prompt: the words; None for a full description.
        sampling: how the answer is drawn; None for the likeliest words.
        span: the part of the file to look at; None for all of it.
        use: picture, sound or both.
        seed: of the draws; a further answer to the same query has the next number.
    """

    path: Path
    prompt: str | None = None
    sampling: Sampling | None = None
    span: Span | None = None
    use: Use = "both"
    seed: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A clip as the model takes it, with the words; `num_tokens` of both together."""

    media: Media
    prompt: str
    num_tokens: int


Tell = Callable[[int, Piece | Exception], object]


class Answering:
    """A query under way: what `Engine.begin` gives.

    Attributes:
        num_prompt_tokens: of the clip and the words; 0 until the file is read.
        num_answer_tokens: of all answers so far, their end tokens included.
        reading_seconds: from the query to the end of reading; 0 until then.
    """

    def __init__(self, engine: "Engine", *, num_samples: int, tell: Tell) -> None:
        self.num_prompt_tokens = self.num_answer_tokens = 0
        self.reading_seconds = 0.0
        self.num_samples = num_samples
        self.num_open = num_samples
        self.is_gone = False
        self.future: Future[_Prepared] | None = None
        self.begun = time.monotonic()
        self._engine = engine
        self._tell = tell

    def drop(self) -> None:
        """Nobody waits for it any more; nothing happens where it has ended."""
        self._engine.drop(self)

    def tell(self, sample: int, piece: Piece | Exception) -> None:
        """Hand on a piece of an answer, or the error that ends them all."""
        if not self.is_gone:
            self._tell(sample, piece)


@dataclass(eq=False)
class _Row:
    """One answer that is waited for."""

    answering: Answering
    sample: int
    media: Media
    prompt: str
    sampling: Sampling
    seed: int
    is_told: bool = False
    has_ended: bool = False


class _Gone:
    """Those of a batch that nobody waits for: all, once the engine is cut off."""

    def __init__(self, batch: Sequence[_Row], cut_off: threading.Event) -> None:
        self._batch = batch
        self._cut_off = cut_off

    def __contains__(self, row: object) -> bool:
        assert isinstance(row, int)
        return self._cut_off.is_set() or self._batch[row].answering.is_gone


class Engine:
    """Answers queries from any number of threads.

    Queries that are there when the model becomes free, and are to be drawn alike, are answered in one batch.

    Args:
        captioner: the model.
        reader: with at least one worker process: the files are strangers'.
        max_waiting: answers at a time; more are refused with `Busy`.
        batch_size: answers side by side (default: the model's).
        max_seconds: length of a span that is taken (default: any).

    Attributes:
        num_answered, num_failed, num_dropped: queries so far.
        num_batches: that the model was given so far.
        failure: why the model could not answer the last batch; None where it could.
    """

    def __init__(
        self,
        captioner: Captioner,
        reader: ClipReader,
        *,
        max_waiting: int = 64,
        batch_size: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self.captioner = captioner
        self.reader = reader
        self.max_waiting = max_waiting
        self.batch_size = batch_size or captioner.processor.config.batch_size
        self.max_seconds = max_seconds
        self.num_answered = self.num_failed = self.num_dropped = self.num_batches = 0
        self.failure: str | None = None
        self._changed = threading.Condition()
        self._present: set[Answering] = set()
        self._waiting: list[_Row] = []
        self._is_closing = False
        self._cut_off = threading.Event()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def num_present(self) -> int:
        """Answers that are being read for, waited for or given."""
        with self._changed:
            return sum(answering.num_samples for answering in self._present)

    @property
    def num_waiting(self) -> int:
        """Answers whose file is read, and which wait for the model."""
        with self._changed:
            return len(self._waiting)

    def ask(self, query: Query) -> Iterator[Piece]:
        """Answer a query as the words come; whoever closes the iterator early is not answered further.

        The last piece holds the whole answer.

        Raises:
            Busy: too many wait.
            ClipError: the file cannot be read.
            ValueError: the prompt holds a special token.
            ModelFailedError: the model failed.
        """
        told: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        answering = self.begin(query, tell=lambda _, piece: told.put(piece))
        try:
            while True:
                piece = told.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.answer is not None:
                    return
        finally:
            answering.drop()

    def begin(self, query: Query, *, tell: Tell, num_samples: int = 1) -> Answering:
        """Like `ask`, without waiting, and for several answers to one query, whose file is read once.

        Args:
            query: what is asked.
            tell: called in other threads with (number of the answer, piece). The last piece of each answer holds the
                whole; an error stands for all that have not ended, and is the last that is told.
            num_samples: answers.

        Raises:
            Busy: too many wait.
            ValueError: the prompt holds a special token.
        """
        processor, span = self.captioner.processor, query.span or Span()
        prompt = query.prompt or self.captioner.describe(query.use)
        processor.check(prompt)
        wanted = processor.wanted(query.use, start_seconds=span.start_seconds, end_seconds=span.end_seconds)
        answering = Answering(self, num_samples=num_samples, tell=tell)
        with self._changed:
            if self._is_closing:
                raise Busy(SHUTTING_DOWN)
            if self.num_present + num_samples > self.max_waiting:
                raise Busy(f"{self.num_present} answers are waited for already: ask again in a while")
            self._present.add(answering)
        try:
            # Outside of the lock: a reader that another engine closes has a lock of its own while it tells this one.
            answering.future = self.reader.submit(query.path, self._bound(wanted), partial(self._prepare, prompt))
        except RuntimeError as error:  # it was closed meanwhile
            with self._changed:
                self._leave(answering)
            raise Busy(SHUTTING_DOWN) from error
        answering.future.add_done_callback(partial(self._take, answering, query))
        return answering

    def _bound(self, wanted: Wanted) -> Wanted:
        return wanted if self.max_seconds is None else Bounded(**vars(wanted), max_seconds=self.max_seconds)

    def drop(self, answering: Answering) -> None:
        """See `Answering.drop`; a file that is being read keeps its place until it is read."""
        with self._changed:
            if answering.is_gone or not answering.num_open:
                return
            answering.is_gone = True
            self.num_dropped += 1
            if answering.future is not None and (answering.future.cancel() or answering.future.done()):
                self._leave(answering)

    def stop(self) -> None:
        """Take no more queries."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def close(self, *, grace_seconds: float = 30.0) -> None:
        """Take no more queries, answer those that are there for so long, and end."""
        self.stop()
        self._thread.join(grace_seconds)
        self._cut_off.set()
        self.stop()
        self.reader.close()
        self._thread.join(_CUT_SECONDS)
        with self._changed:
            left = list(self._present)
        for answering in left:
            self._fail(answering, Busy(SHUTTING_DOWN))

    def _take(self, answering: Answering, query: Query, future: "Future[_Prepared]") -> None:
        """Put a query whose file is read among those who wait for the model."""
        answering.reading_seconds = time.monotonic() - answering.begun
        if answering.is_gone:
            with self._changed:
                self._leave(answering)
        elif future.cancelled() or self._cut_off.is_set():  # which ended the worker too, and is no fault of the file
            self._fail(answering, Busy(SHUTTING_DOWN))
        elif (error := future.exception()) is None:
            self._add(answering, query, future.result())
        elif isinstance(error, ValueError):
            self._fail(answering, error)
        else:
            logger.error("a file that was read could not be prepared", exc_info=error)
            words = f"the file could not be prepared ({type(error).__name__}); the server's log tells more"
            self._fail(answering, ModelFailedError(words))

    def _prepare(self, prompt: str, clip: Clip) -> _Prepared:
        """What the model takes of a clip and the words, and how many tokens these are."""
        processor, config = self.captioner.processor, self.captioner.processor.config
        media = processor.media(clip)
        places = [-1] * len(processor.lay_out(media).is_seen)  # which token stands there does not matter
        ids = prompt_ids(
            processor.tokenizer, prompt, placeholders=places, family=config.family, system=config.system_prompt
        )
        return _Prepared(media, prompt, len(ids))

    def _add(self, answering: Answering, query: Query, prepared: _Prepared) -> None:
        sampling = query.sampling or self.captioner.greedy()
        answering.num_prompt_tokens = prepared.num_tokens
        with self._changed:
            self._waiting += [
                _Row(answering, sample, prepared.media, prepared.prompt, sampling, query.seed + sample)
                for sample in range(answering.num_samples)
            ]
            self._changed.notify_all()

    def _leave(self, answering: Answering) -> None:
        self._present.discard(answering)
        self._changed.notify_all()

    def _fail(self, answering: Answering, error: Exception) -> None:
        """End the answers of a query that have not ended with an error."""
        with self._changed:
            if not answering.num_open:
                return
            self.num_failed += not answering.is_gone
            answering.num_open = 0
            self._leave(answering)
        answering.tell(0, error)

    def _work(self) -> None:
        """What the model's thread does: the oldest row, and with it those that may go along."""
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[_Row]:
        """The next rows, waited for; none at the end."""
        with self._changed:
            while not self._cut_off.is_set():
                self._waiting = [row for row in self._waiting if not row.answering.is_gone]
                if self._waiting:
                    first = self._waiting[0].sampling
                    batch = [row for row in self._waiting if row.sampling == first][: self.batch_size]
                    self._waiting = [row for row in self._waiting if row not in batch]
                    return batch
                if self._is_closing and not self._present:
                    break
                self._changed.wait()
        return []

    def _answer(self, batch: Sequence[_Row]) -> None:
        self.num_batches += 1
        is_without_room = False
        try:
            steps = self.captioner.follow(
                [row.media for row in batch],
                [row.prompt for row in batch],
                sampling=batch[0].sampling,
                seeds=[row.seed for row in batch],
                dropped=_Gone(batch, self._cut_off),
            )
            for pieces in steps:
                self._hand_on(batch, pieces)
        except torch.OutOfMemoryError as error:
            # As text, since a log may keep what it is given.
            logger.warning("%d side by side have no room: %s", len(batch), str(error))
            is_without_room = True
        except Exception as error:
            logger.exception("the model failed")
            self.failure = type(error).__name__  # its words may tell strangers of this machine
            self._end(batch, ModelFailedError(f"the model failed ({self.failure}); the server's log tells more"))
        else:
            self._end(batch, Busy(SHUTTING_DOWN))
        if is_without_room:  # out of the block, since the error keeps all that the model held
            self._give_room(batch)

    def _give_room(self, batch: Sequence[_Row]) -> None:
        """Answer one by one, where all together have no room; say so where that is too late or does not help."""
        if len(batch) == 1:
            self._end(batch, ValueError(f"the clip {NO_ROOM}"))
        elif any(row.is_told for row in batch):
            self._end(batch, CrowdedError("the GPU has no room for all who ask now: ask again in a while"))
        else:
            for row in batch:
                self._answer([row])

    def _hand_on(self, batch: Sequence[_Row], pieces: dict[int, Piece]) -> None:
        """Hand on what came of a step, which made one token for each row that has not ended."""
        self.failure = None
        for row in batch:
            row.answering.num_answer_tokens += not row.has_ended and not row.answering.is_gone
        for number, piece in pieces.items():
            row = batch[number]
            row.is_told = True
            row.has_ended = piece.answer is not None
            if row.has_ended:
                self._finish(row.answering)
            row.answering.tell(row.sample, piece)

    def _finish(self, answering: Answering) -> None:
        """Note that one answer has ended."""
        with self._changed:
            if answering.is_gone or not answering.num_open:
                return
            answering.num_open -= 1
            if not answering.num_open:
                self.num_answered += 1
                self._leave(answering)

    def _end(self, batch: Sequence[_Row], error: Exception) -> None:
        """What those get whose answer has not ended, though the batch has."""
        for row in batch:
            if not row.has_ended and not row.answering.is_gone:
                self._fail(row.answering, error)
