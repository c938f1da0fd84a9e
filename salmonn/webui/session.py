"""What all visitors of the page share: models, judge, examples, votes, and the files that they bring."""

import logging
import math
import queue
import random
import stat
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from salmonn.caption.captioner import Span
from salmonn.caption.engine import CaptionRequest, Engine
from salmonn.caption.probe import MediaInfo, probe_media
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.preference.votes import VoteStore
from salmonn.records import Caption, Reference
from salmonn.synthetic.render import make_clips, render_frames, sample_clip
from salmonn.synthetic.scene import SynthConfig
from salmonn.webui.scorer import CaptionScorer

logger = logging.getLogger(__name__)
Come = tuple[int, TextDelta | Exception]
PATIENCE_SECONDS = 0.25  # after which it is told that nothing has come
KEEP_SECONDS = 15 * 60.0  # for a file that nobody holds: it may be on its way to somebody
# Of no training config; larger than the clips of those, to look well in a player. What the toy model says of them shows
# each kind of mistake.
EXAMPLES = SynthConfig(clips=4, seed=20_270, size_pixels=288)


@dataclass(frozen=True)
class ExampleClip:
    """A clip that comes with the page.

    Args:
        path: of the clip.
        still: a picture of it.
        reference: all that is known of it.
    """

    path: Path
    still: Path
    reference: Reference


def make_example_clips(folder: Path, config: SynthConfig = EXAMPLES) -> list[ExampleClip]:
    """Film the examples; those that are there already stay."""
    examples = []
    for index, reference in enumerate(make_clips(folder, config, workers=1)):
        path = folder / reference.video
        still = path.with_suffix(".png")
        frames = render_frames(sample_clip(config, index=index)[0], config=config)
        # The fullest frame, as the first one is empty.
        fullest = max(frames[::5], key=lambda frame: abs(frame.astype(int) - frames[0]).sum())
        Image.fromarray(fullest).save(still)
        examples.append(ExampleClip(path, still, reference))
    return examples


class UploadStore:
    """Files that visitors hold; one is deleted when the last of those who hold it lets it go.

    Args:
        root: the folder of all uploads; nothing outside of it is deleted.
        max_bytes: of all of them together (default: any).
    """

    def __init__(self, root: Path, *, max_bytes: float = math.inf) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], Path] = {}
        self._left: dict[str, float] = {}
        self._num_coming = 0

    def hold(self, visitor: str, place: str, path: Path | None) -> None:
        """A visitor holds this file in a place of the page, in the stead of the one before.

        Of a visitor who is gone that is told late; nobody would let the file go, so that `sweep` takes it.
        """
        with self._lock:
            before = self._held.pop((visitor, place), None)
            if path and visitor not in self._left:
                self._held[visitor, place] = path.resolve()
            if before:
                self._drop(before)

    def leave(self, visitor: str) -> None:
        """A visitor is gone."""
        with self._lock:
            self._left[visitor] = time.time()
            for key in [key for key in self._held if key[0] == visitor]:
                self._drop(self._held.pop(key))

    def _drop(self, path: Path) -> None:
        if path in self._held.values() or not path.is_relative_to(self.root):
            return
        path.unlink(missing_ok=True)
        self._tidy(path.parent)

    def _tidy(self, folder: Path) -> None:
        """Remove a folder if it is empty: Gradio's are for a content, which files of several names may have."""
        if folder != self.root:
            with suppress(OSError):
                folder.rmdir()

    def admit(self, num_bytes: int) -> bool:
        """Whether there is room for an upload of this size; if so it is expected until it `arrived`."""
        with self._lock:
            # What has come of those that are coming counts twice: rather too few of them than too many.
            if self._num_coming + num_bytes + sum(size for _, size, _ in self._files()) > self.max_bytes:
                return False
            self._num_coming += num_bytes
            return True

    def arrived(self, num_bytes: int) -> None:
        """An upload of this size that was let in has ended, well or not."""
        with self._lock:
            self._num_coming -= num_bytes

    def delete_unused(self) -> None:
        """Delete what nobody holds and nothing was written to for a while, such as the half of an upload."""
        then = time.time() - KEEP_SECONDS
        with self._lock:
            for path, _, written in self._files():
                if written < then and path not in self._held.values():
                    self._drop(path)
            self._left = {visitor: left for visitor, left in self._left.items() if left > then}

    def _files(self) -> list[tuple[Path, int, float]]:
        """Each file with its size in bytes and the time when it was last written to."""
        files = []
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # one may be moved meanwhile
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    files.append((path, status.st_size, status.st_mtime))
        return files


@dataclass(eq=False)
class ActiveRequest:
    """A question of a visitor that is being answered.

    Args:
        path: of the file that it is about.
        is_stopped: the visitor has read enough; what has come is kept.
        is_over: the visitor looks at something else, or is gone: nothing more is shown.
    """

    path: Path
    is_stopped: bool = False
    is_over: bool = False


class ActiveRequests:
    """The question of each visitor that is being answered in one tab; the one before is over."""

    def __init__(self) -> None:
        self._latest: dict[str, ActiveRequest] = {}

    def begin(self, visitor: str, path: Path) -> ActiveRequest:
        """A new question."""
        self.end(visitor)
        turn = self._latest[visitor] = ActiveRequest(path)
        return turn

    def stop(self, visitor: str) -> None:
        """The visitor has read enough."""
        if turn := self._latest.get(visitor):
            turn.is_stopped = True

    def turn_to(self, visitor: str, path: str | None) -> bool:
        """The visitor looks at this file, or none; tells whether that is another than was asked about.

        Who is quick asks about a new file before it is told that there is one.
        """
        turn = self._latest.get(visitor)
        if turn and path and turn.path == Path(path):
            return False
        self.end(visitor)
        return True

    def end(self, visitor: str) -> None:
        """Nothing more is shown to the visitor."""
        if turn := self._latest.pop(visitor, None):
            turn.is_over = True


@dataclass(frozen=True)
class AppState:
    """What the tabs work with.

    Args:
        engines: a model each, by the name that visitors see.
        assessor: who lists events and scores.
        box: where votes go.
        examples: clips to try.
        uploads: the visitors' files.
    """

    engines: Mapping[str, Engine]
    scorer: CaptionScorer
    votes: VoteStore
    examples: Sequence[ExampleClip]
    uploads: UploadStore

    @property
    def first(self) -> str:
        """Name of the model that is asked unless another is chosen."""
        return next(iter(self.engines))

    def example_of(self, path: Path) -> ExampleClip | None:
        """The example that a file is; None of a visitor's own."""
        return next((example for example in self.examples if example.path.resolve() == path.resolve()), None)

    def reference_of(self, path: Path) -> Reference | None:
        """What is known of a file: an example's reference, or that of a video of its name."""
        example = self.example_of(path)
        return example.reference if example else self.scorer.references.get(path.name)

    def stream_answers(
        self, query: CaptionRequest, models: Sequence[str]
    ) -> Generator[tuple[int, TextDelta] | None, None, None]:
        """Ask models, each of which gives one answer, or several where it stands there several times.

        Yields:
            (place among the models, piece), or None where nothing has come for a while. The last piece of each answer
            holds the whole. Whoever closes the iterator is not answered further.

        Raises:
            Busy: too many wait.
            ClipError: the file cannot be read.
            ValueError: the prompt holds a special token.
            RuntimeError: the model failed.
        """
        told: queue.SimpleQueue[Come] = queue.SimpleQueue()
        under_way = []
        try:
            for model in dict.fromkeys(models):
                places = [place for place, name in enumerate(models) if name == model]
                tell = partial(_put, told, places)
                under_way.append(self.engines[model].begin(query, tell=tell, num_samples=len(places)))
            num_open = len(models)
            while num_open:
                try:
                    place, piece = told.get(timeout=PATIENCE_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(piece, Exception):
                    raise piece
                num_open -= piece.answer is not None
                yield place, piece
        finally:
            for answering in under_way:
                answering.drop()

    def probe_media(self, path: Path, *, model: str) -> MediaInfo:
        """What a file holds; raises ClipError where it is no video or sound."""
        engine = self.engines[model]
        return probe_media(path, engine.reader, engine.captioner.processor.read_spec("both"))

    def close(self) -> None:
        """Let go of models and workers, which the models share: none may take a query when they go."""
        for engine in self.engines.values():
            engine.stop()
        for engine in self.engines.values():
            engine.close(grace_seconds=1.0)


def _put(
    told: "queue.SimpleQueue[tuple[int, TextDelta | Exception]]",
    places: Sequence[int],
    sample: int,
    piece: TextDelta | Exception,
) -> None:
    told.put((places[sample], piece))


def tell(error: Exception, path: Path) -> str:
    """An error in words for a visitor, who knows the file or folder by its name alone; all of it goes to the log."""
    if isinstance(error, (OSError, RuntimeError)):
        logger.warning("a visitor was told of an error", exc_info=error)
        why = error.strerror if isinstance(error, OSError) else None
        return f"{why or f'it failed, {type(error).__name__}'} (the log of this page tells more)"
    return str(error).replace(f"{path}: ", "").replace(str(path), path.name)


def to_caption(query: CaptionRequest, answer: Completion, model: str) -> Caption:
    """An answer as a record."""
    span = query.span or Span()
    return Caption(
        video=query.path.name,
        text=answer.text,
        prompt=query.prompt or "",
        model=model,
        finished=answer.finished,
        start_seconds=span.start_seconds,
        end_seconds=span.end_seconds,
    )


def random_seed() -> int:
    """A seed that nobody chose."""
    return random.SystemRandom().randrange(1 << 31)
