"""One model and many who ask it: files are read in worker processes; who comes joins those who are being answered."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from salmonn.caption.captioner import NO_ROOM, Captioner, Span
from salmonn.caption.duration_limit import LimitedReadSpec
from salmonn.caption.generate import Sampling
from salmonn.caption.loader import ClipReader, ReadSpec
from salmonn.caption.prompt import History, Prompt
from salmonn.caption.streaming import TextDelta
from salmonn.media.clip import Clip
from salmonn.model.layout import ClipInputs
from salmonn.records import Modality

logger = logging.getLogger(__name__)
SHUTTING_DOWN = "the server is shutting down: ask again when it is back"
_CUT_SECONDS = 10.0  # for the step that the model is at when it is cut off


class Overloaded(Exception):
    """As many wait as may wait, or the engine is closing; the message is for whoever asked."""


class OutOfMemoryDuringBatch(Overloaded):
    """Those answered side by side had no room together, when a part of their answers was told already."""


class ModelFailedError(RuntimeError):
    """The model could not answer, through no fault of whoever asked."""


@dataclass(frozen=True)
class CaptionRequest:
    """What is asked of one file.

    Args:
        path: of the file.
        prompt: the words; None for a full description.
        history: prompts and answers on the same file that come before; "" stands for a full description too.
        system: what the conversation begins with; None for the model's own.
        sampling: how the answer is drawn; None for the likeliest words.
        span: the part of the file to look at; None for all of it.
        use: picture, sound or both.
        seed: of the draws; a further answer to the same query has the next number.
    """

    path: Path
    prompt: str | None = None
    sampling: Sampling | None = None
    span: Span | None = None
    modality: Modality = "both"
    seed: int = 0
    history: History = ()
    system: str | None = None


@dataclass(frozen=True)
class _Prepared:
    """A clip as the model takes it, with the words; `num_tokens` of both together."""

    media: ClipInputs
    prompt: Prompt
    num_tokens: int


Tell = Callable[[int, TextDelta | Exception], object]


class GenerationHandle:
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

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be told any more."""
        return self.is_gone or not self.num_open

    def drop(self) -> None:
        """Nobody waits for it any more; nothing happens where it has ended."""
        self._engine.drop(self)

    def tell(self, sample: int, piece: TextDelta | Exception) -> None:
        """Hand on a piece of an answer, or the error that ends them all."""
        if not self.is_gone:
            self._tell(sample, piece)


@dataclass(eq=False)
class _Row:
    """One answer that is waited for."""

    answering: GenerationHandle
    sample: int
    media: ClipInputs
    prompt: Prompt
    sampling: Sampling
    seed: int
    num_tokens: int
    num_drawn: int = 0
    is_told: bool = False
    goes_alone: bool = False  # since it had no room beside others


class Engine:
    """Answers queries from any number of threads.

    Answers go on side by side, a token of each at a time. Between two tokens those who wait may join: as many as are
    read in a moment, so that nobody's words stop for long.

    Args:
        captioner: the model.
        reader: with at least one worker process: the files are strangers'.
        max_waiting: answers at a time; more are refused with `Busy`.
        batch_size: answers side by side, at least 1 (default: the model's).
        max_seconds: length of a span that is taken (default: any).

    Attributes:
        num_answered, num_failed, num_dropped: queries so far.
        num_readings: of prompts, several together, that the model was asked for so far.
        failure: why the model failed when it was last asked; None where it did not.
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
        self.batch_size = captioner.processor.config.batch_size if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.max_seconds = max_seconds
        self.num_answered = self.num_failed = self.num_cancelled = self.num_prefills = 0
        self.failure: str | None = None
        self._changed = threading.Condition()
        self._present: set[GenerationHandle] = set()
        self._waiting: list[_Row] = []
        self._is_closing = False
        self._cut_off = threading.Event()
        # Of the model's thread alone: the answers under way.
        self._answers = captioner.begin()
        self._rows: dict[int, _Row] = {}
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def num_active(self) -> int:
        """Answers that are being read for, waited for or given."""
        with self._changed:
            return sum(answering.num_samples for answering in self._present)

    @property
    def num_waiting(self) -> int:
        """Answers whose file is read, and which wait for the model."""
        with self._changed:
            return len(self._waiting)

    def ask(self, query: CaptionRequest) -> Iterator[TextDelta]:
        """Answer a query as the words come; whoever closes the iterator early is not answered further.

        The last piece holds the whole answer.

        Raises:
            Busy: too many wait.
            ClipError: the file cannot be read.
            ValueError: the prompt holds a special token.
            ModelFailedError: the model failed.
        """
        told: queue.SimpleQueue[TextDelta | Exception] = queue.SimpleQueue()
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

    def begin(self, query: CaptionRequest, *, tell: Tell, num_samples: int = 1) -> GenerationHandle:
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
        usual = self.captioner.default_prompt(query.modality)
        history = [(asked or usual, answer) for asked, answer in query.history]
        prompt = Prompt(query.prompt or usual, history, query.system)
        processor.check_prompt(prompt)
        read_spec = processor.read_spec(query.modality, start_seconds=span.start_seconds, end_seconds=span.end_seconds)
        answering = GenerationHandle(self, num_samples=num_samples, tell=tell)
        with self._changed:
            if self._is_closing:
                raise Overloaded(SHUTTING_DOWN)
            if self.num_active + num_samples > self.max_waiting:
                raise Overloaded(f"{self.num_active} answers are waited for already: ask again in a while")
            self._present.add(answering)
        try:
            # Outside of the lock: a reader that another engine closes has a lock of its own while it tells this one.
            answering.future = self.reader.submit(query.path, self._bound(read_spec), partial(self._prepare, prompt))
        except RuntimeError as error:  # it was closed meanwhile
            with self._changed:
                self._leave(answering)
            raise Overloaded(SHUTTING_DOWN) from error
        answering.future.add_done_callback(partial(self._take, answering, query))
        return answering

    def _bound(self, read_spec: ReadSpec) -> ReadSpec:
        return (
            read_spec if self.max_seconds is None else LimitedReadSpec(**vars(read_spec), max_seconds=self.max_seconds)
        )

    def drop(self, answering: GenerationHandle) -> None:
        """See `Answering.drop`; a file that is being read is read no further."""
        with self._changed:
            if answering.is_over:
                return
            answering.is_gone = True
            self.num_cancelled += 1
            future = answering.future
            if future is not None and (future.cancel() or future.done()):
                self._leave(answering)
        if future is not None:  # outside of the lock, for the reader has its own
            self.reader.cancel(future)

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
            self._fail(answering, Overloaded(SHUTTING_DOWN))

    def _take(self, answering: GenerationHandle, query: CaptionRequest, future: "Future[_Prepared]") -> None:
        """Put a query whose file is read among those who wait for the model."""
        answering.reading_seconds = time.monotonic() - answering.begun
        if answering.is_gone:
            with self._changed:
                self._leave(answering)
        elif future.cancelled() or self._cut_off.is_set():  # which ended the worker too, and is no fault of the file
            self._fail(answering, Overloaded(SHUTTING_DOWN))
        elif (error := future.exception()) is None:
            self._add(answering, query, future.result())
        elif isinstance(error, ValueError):
            self._fail(answering, error)
        else:
            logger.error("a file that was read could not be prepared", exc_info=error)
            words = f"the file could not be prepared ({type(error).__name__}); the server's log tells more"
            self._fail(answering, ModelFailedError(words))

    def _prepare(self, prompt: Prompt, clip: Clip) -> _Prepared:
        """What the model takes of a clip and the words, and how many tokens these are."""
        media = self.captioner.processor.clip_inputs(clip)
        return _Prepared(media, prompt, self.captioner.processor.count_tokens(media, prompt))

    def _add(self, answering: GenerationHandle, query: CaptionRequest, prepared: _Prepared) -> None:
        sampling = query.sampling or self.captioner.default_sampling()
        answering.num_prompt_tokens = prepared.num_tokens
        with self._changed:
            self._waiting += [
                _Row(
                    answering,
                    sample,
                    prepared.media,
                    prepared.prompt,
                    sampling,
                    query.seed + sample,
                    prepared.num_tokens,
                )
                for sample in range(answering.num_samples)
            ]
            self._changed.notify_all()

    def _leave(self, answering: GenerationHandle) -> None:
        self._present.discard(answering)
        self._changed.notify_all()

    def _fail(self, answering: GenerationHandle, error: Exception) -> None:
        """End the answers of a query that have not ended with an error."""
        with self._changed:
            if not answering.num_open:
                return
            self.num_failed += not answering.is_gone
            answering.num_open = 0
            self._leave(answering)
        answering.tell(0, error)

    def _work(self) -> None:
        """What the model's thread does: those who may join do, then all go on by a token, again and again."""
        while (coming := self._next()) or self._rows:
            if coming:
                self._join(coming)
            if self._rows:
                self._step()

    def _next(self) -> list[_Row]:
        """Rows that join now; waited for where none is under way. None at the end."""
        with self._changed:
            while not self._cut_off.is_set():
                self._waiting = [row for row in self._waiting if not row.answering.is_over]
                if self._waiting or self._rows:
                    coming = self._choose()
                    self._waiting = [row for row in self._waiting if row not in coming]
                    return coming
                if self._is_closing and not self._present:
                    break
                self._changed.wait()
        return []

    def _choose(self) -> list[_Row]:
        """Those of the waiting who join: the eldest, and others whose answers are drawn alike.

        As many as have room, and, where others' words stop meanwhile, as are read at once. All answers to a query join
        together, for they share what is read.
        """
        if not self._waiting:
            return []
        first, coming, num_tokens = self._waiting[0], list[_Row](), 0
        if first.goes_alone or any(row.goes_alone for row in self._rows.values()):
            return [] if self._rows else [first]
        room = self.batch_size - len(self._rows)
        alike = (row for row in self._waiting if row.sampling == first.sampling)
        for _, group in groupby(alike, key=lambda row: id(row.answering)):
            rows = list(group)
            num_tokens += rows[0].num_tokens
            is_long = bool(self._rows and coming) and num_tokens > self.captioner.network.prefill_chunk_tokens
            # More answers than ever have room begin where nobody else is.
            is_wide = bool(self._rows or coming) and min(len(rows), self.batch_size) > room - len(coming)
            if is_long or is_wide:
                break
            coming += rows[: room - len(coming)]
        return coming

    def _join(self, coming: Sequence[_Row]) -> None:
        def join() -> None:
            numbers = self._answers.join(
                [row.media for row in coming],
                [row.prompt for row in coming],
                sampling=coming[0].sampling,
                seeds=[row.seed for row in coming],
            )
            self._rows |= dict(zip(numbers, coming, strict=True))

        self.num_prefills += 1
        if not self._rows:  # anew, so that nothing of those who have ended is left
            self._answers = self.captioner.begin()
        is_alone = len(coming) == 1 and not self._rows
        if self._attempt(join, coming) == "no room":
            self._give_room(coming, is_alone=is_alone)

    def _step(self) -> None:
        """One token more of each answer under way; where that fails none is, but those without room may begin anew."""
        dropped = {number for number, row in self._rows.items() if row.answering.is_over}
        rows = [row for number, row in self._rows.items() if number not in dropped]
        self._rows = {number: row for number, row in self._rows.items() if number not in dropped}
        if self._cut_off.is_set():
            self._rows = {}
            self._end(rows, Overloaded(SHUTTING_DOWN))
            return
        outcome = self._attempt(lambda: self._hand_on(self._answers.step(dropped)), rows)
        if outcome != "done":
            self._rows, self._answers = {}, self.captioner.begin()  # lets go of what they held
        if outcome == "no room":
            self._give_room(rows, is_alone=len(rows) == 1)

    def _attempt(self, work: Callable[[], object], rows: Sequence[_Row]) -> Literal["done", "failed", "no room"]:
        """Have the model work for rows, who are told where it fails, but not where there is no room.

        What an error keeps of the model's memory is let go with the end of this.
        """
        try:
            work()
        except torch.OutOfMemoryError as error:
            # As text, since a log may keep what it is given.
            logger.warning("%d side by side have no room: %s", len(rows), str(error))
            return "no room"
        except Exception as error:
            logger.exception("the model failed")
            self.failure = type(error).__name__  # its words may tell strangers of this machine
            self._end(rows, ModelFailedError(f"the model failed ({self.failure}); the server's log tells more"))
            return "failed"
        return "done"

    def _give_room(self, rows: Sequence[_Row], *, is_alone: bool) -> None:
        """Answer one by one, where all together have no room; say so where that is too late or does not help."""
        if is_alone:
            self._end(rows, ValueError(f"the clip {NO_ROOM}"))
            return
        told = [row for row in rows if row.is_told]
        self._end(told, OutOfMemoryDuringBatch("the GPU has no room for all who ask now: ask again in a while"))
        anew = [row for row in rows if not row.answering.is_over]
        for row in anew:
            row.goes_alone = True
            row.answering.num_answer_tokens -= row.num_drawn
            row.num_drawn = 0
        with self._changed:
            self._waiting = [*anew, *self._waiting]

    def _hand_on(self, pieces: dict[int, TextDelta]) -> None:
        """Hand on what came of a step, which made one token for each row under way."""
        for row in self._rows.values():
            row.num_drawn += 1
            row.answering.num_answer_tokens += 1
            if row.num_drawn == 1:  # those that went on before do not show that a reading goes well
                self.failure = None
        for number, piece in pieces.items():
            row = self._rows[number]
            if piece.answer is not None:
                del self._rows[number]
            if self._is_heard(row.answering, ends=piece.answer is not None):
                row.is_told = True
                row.answering.tell(row.sample, piece)

    def _is_heard(self, answering: GenerationHandle, *, ends: bool) -> bool:
        """Whether anybody waits for a piece of an answer; notes where it is the last."""
        with self._changed:
            if answering.is_over:
                return False
            answering.num_open -= ends
            if not answering.num_open:
                self.num_answered += 1
                self._leave(answering)
        return True

    def _end(self, rows: Sequence[_Row], error: Exception) -> None:
        """Tell rows whose answers have not ended why they do."""
        for row in rows:
            if not row.answering.is_over:
                self._fail(row.answering, error)
