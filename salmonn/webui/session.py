"""What all sessions share (models, scorer, feedback, examples, uploads), and the requests in progress."""

import logging
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from salmonn.caption.engine import Engine, GenerationHandle, Overloaded
from salmonn.caption.generator import CaptionRequest, Span
from salmonn.caption.loader import ClipJob, split_into_segments
from salmonn.caption.read_spec import check_duration
from salmonn.caption.segments import FixedSegments, SegmentRule
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.preference.feedback import FeedbackStore
from salmonn.records import Caption, Modality, Reference
from salmonn.synthetic.render import make_clips, render_frames, sample_clip
from salmonn.synthetic.scene import SynthConfig
from salmonn.webui.chooser import CaptionChooser
from salmonn.webui.scorer import CaptionScorer
from salmonn.webui.uploads import UploadStore

logger = logging.getLogger(__name__)
Shown = TypeVar("Shown")
POLL_SECONDS = 0.25  # between keep-alive messages while no text arrives
UPDATE_SECONDS = 0.05  # between two updates of a growing answer
SEGMENTS_AT_ONCE = 4  # of one user, so that others are not kept waiting
# Example clips: larger than training clips, so that they look good in a video player, and rendered from a seed that no
# training config uses. The toy model describes the first one well; its captions of the others show every kind of error.
EXAMPLES = SynthConfig(clips=4, seed=20_330, size_pixels=288)


@dataclass(frozen=True)
class ExampleClip:
    """A clip that comes with the web UI: the video, a frame of it as an image file, and its complete annotation."""

    path: Path
    still: Path
    reference: Reference


def make_example_clips(folder: Path, config: SynthConfig = EXAMPLES) -> list[ExampleClip]:
    """Render the example clips; existing ones are kept."""
    examples = []
    for index, reference in enumerate(make_clips(folder, config, workers=1)):
        path = folder / reference.video
        still = path.with_suffix(".png")
        frames = render_frames(sample_clip(config, index=index)[0], config=config)
        # The frame that differs most from the first, which is empty.
        fullest = max(frames[::5], key=lambda frame: abs(frame.astype(int) - frames[0]).sum())
        Image.fromarray(fullest).save(still)
        examples.append(ExampleClip(path, still, reference))
    return examples


@dataclass(eq=False)
class ActiveRequest:
    """A caption request in progress.

    Args:
        path: video file.
        clicked: time of the click in the browser, in milliseconds.
        is_stopped: whether the user pressed Stop; the text so far is kept.
        is_cancelled: whether the session ended or switched to another video; nothing more is shown.
    """

    path: Path
    clicked: float = 0.0
    is_stopped: bool = False
    is_cancelled: bool = False


class ActiveRequests:
    """The active request of each session in one tab; a new one cancels the one before."""

    def __init__(self) -> None:
        self._latest: dict[str, ActiveRequest] = {}

    def start(self, session: str, path: Path, *, clicked: float | None = None) -> ActiveRequest:
        """Start a request; `clicked` is the time of the click in the browser."""
        self.cancel(session)
        active = self._latest[session] = ActiveRequest(path, clicked or 0.0)
        return active

    def stop(self, session: str) -> None:
        """Stop the session's request, keeping its text so far."""
        if active := self._latest.get(session):
            active.is_stopped = True

    def cancel(self, session: str) -> None:
        """Cancel the session's request."""
        if active := self._latest.pop(session, None):
            active.is_cancelled = True

    def switch_video(self, session: str, path: str | None, *, changed: float | None = None) -> bool:
        """Cancel the session's request unless it is about the video now shown; return whether it was cancelled.

        The click on a button can arrive before the change events of the video, and even of the previous video;
        `changed`, the time of the change in the browser, distinguishes them.
        """
        active = self._latest.get(session)
        if active and ((path and active.path == Path(path)) or (changed is not None and changed < active.clicked)):
            return False
        self.cancel(session)
        return True


@dataclass(frozen=True)
class Progress:
    """The text of an answer so far, and the time since the request; `completion` is the whole answer, once it is."""

    text: str = ""
    completion: Completion | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class AppState:
    """What the tabs share.

    Args:
        engines: inference engines by the model name shown to users; the first is the default.
        scorer: scorer of captions.
        feedback: store of people's feedback.
        examples: example clips.
        uploads: store of uploaded files.
        chooser: chooses among sampled captions; None without a reward model.
    """

    engines: Mapping[str, Engine]
    scorer: CaptionScorer
    feedback: FeedbackStore
    examples: Sequence[ExampleClip]
    uploads: UploadStore
    chooser: CaptionChooser | None = None

    @property
    def default_model(self) -> str:
        """Name of the default model."""
        return next(iter(self.engines))

    def example_of(self, path: Path) -> ExampleClip | None:
        """Return the example that a file is; None for other files."""
        return next((example for example in self.examples if example.path.resolve() == path.resolve()), None)

    def reference_of(self, path: Path) -> Reference | None:
        """Return the reference of an example, or of a known video with the file's name."""
        example = self.example_of(path)
        return example.reference if example else self.scorer.references.get(path.name)

    def stream_answers(
        self, request: CaptionRequest, models: Sequence[str]
    ) -> Generator[tuple[int, TextDelta] | None, None, None]:
        """Send a request to models, and stream their answers. Closing the iterator cancels the request.

        Args:
            request: the request.
            models: model of each answer; a model listed twice gives two samples.

        Yields:
            (index of the answer, text delta); None while no text arrives. The last delta of an answer holds all of it.

        Raises:
            Overloaded: the queue is full.
            ClipError: the file cannot be read.
            ValueError: the prompt contains a special token.
            RuntimeError: the model failed.
        """
        events: queue.SimpleQueue[tuple[int, TextDelta | Exception]] = queue.SimpleQueue()

        def on_event(indices: Sequence[int], sample: int, event: TextDelta | Exception) -> None:
            events.put((indices[sample], event))

        handles = []
        try:
            for model in dict.fromkeys(models):
                indices = [index for index, name in enumerate(models) if name == model]
                callback = partial(on_event, indices)
                samples = replace(request, num_samples=len(indices))
                handles.append(self.engines[model].submit(samples, on_event=callback))
            num_open = len(models)
            while num_open:
                try:
                    index, event = events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(event, Exception):
                    raise event
                num_open -= event.completion is not None
                yield index, event
        finally:
            for handle in handles:
                handle.cancel()

    def stream_progress(
        self, request: CaptionRequest, model: str, active: ActiveRequest
    ) -> Generator[Progress, None, None]:
        """Stream an answer as its text so far, at intervals; ends early if the request is stopped or cancelled.

        Raises:
            Overloaded, ClipError, ValueError, RuntimeError: see `stream_answers`.
        """
        progress, shown, begin = Progress(), 0.0, time.monotonic()
        with closing(self.stream_answers(request, [model])) as events:
            for event in events:
                seconds = time.monotonic() - begin
                if active.is_stopped or active.is_cancelled:
                    # What arrived since the last interval is not lost.
                    yield replace(progress, seconds=seconds)
                    return
                text, completion = (event[1].text, event[1].completion) if event else ("", None)
                progress = Progress(progress.text + text, completion, seconds)
                if event is None or completion or seconds - shown > UPDATE_SECONDS:
                    shown = seconds
                    yield progress

    def collect_answers(
        self,
        request: CaptionRequest,
        models: Sequence[str],
        active: ActiveRequest,
        show: Callable[[int, float], Shown],
    ) -> Generator[Shown, None, list[Completion]]:
        """Wait for the answers of models to a request, and return them; none if it is stopped or cancelled.

        Args:
            request, models: see `stream_answers`.
            active: the request as its session stops or cancels it.
            show: returns what is yielded at intervals, from the number of words of all answers so far and the seconds
                since the request.

        Raises:
            Overloaded, ClipError, ValueError, RuntimeError: see `stream_answers`.
        """
        answers: dict[int, Completion] = {}
        begin, num_words, shown = time.monotonic(), 0, 0.0
        with closing(self.stream_answers(request, models)) as events:
            for event in events:
                if active.is_cancelled or active.is_stopped:
                    return []
                if event is not None:
                    num_words += len(event[1].text.split())
                    if event[1].completion is not None:
                        answers[event[0]] = event[1].completion
                seconds = time.monotonic() - begin
                if event is None or seconds - shown > POLL_SECONDS:
                    shown = seconds
                    yield show(num_words, seconds)
        return [answers[index] for index in range(len(models))]

    def split_clip(self, request: CaptionRequest, rule: SegmentRule, *, model: str) -> list[ClipJob]:
        """Split a request into one for each segment of its clip, as batch captioning does.

        Raises:
            ClipError: the file cannot be read, is too long, has no timestamps, or has no picture to find shots in.
        """
        engine = self.engines[model]
        engine.captioner.processor.check_prompt(engine.captioner.resolve_prompt(request))
        job = ClipJob(0, request, engine.captioner.read_spec(request))
        seconds = engine.reader.measure_seconds(request.path, job.read_spec)
        check_duration(request.path, seconds, max_seconds=engine.max_seconds or math.inf)
        if isinstance(rule, FixedSegments):
            bounds: Sequence[float] = rule.bounds(request.span.start_seconds or 0.0, seconds)
        else:
            bounds = engine.reader.find_bounds(request.path, job.read_spec, rule) if seconds > 0 else []
        jobs = [part for part, _ in split_into_segments(job, bounds)]
        if seconds <= 0:  # reading it reports the reason
            engine.reader.submit(request.path, jobs[0].read_spec, lambda clip: clip).result()
        return jobs

    def stream_segments(
        self, jobs: Sequence[ClipJob], *, model: str
    ) -> Generator[tuple[int, TextDelta | ValueError] | None, None, None]:
        """Send the requests for the segments of a clip to a model, and stream their answers. Closing cancels them.

        Yields:
            (index of the segment, text delta, or the reason why it cannot be captioned); None while no text arrives.

        Raises:
            Overloaded: the queue is full.
            RuntimeError: the model failed.
        """
        events: queue.SimpleQueue[tuple[int, TextDelta | Exception]] = queue.SimpleQueue()
        waiting, handles = deque(enumerate(jobs)), dict[int, GenerationHandle]()

        def on_event(index: int, _: int, event: TextDelta | Exception) -> None:
            events.put((index, event))

        try:
            while waiting or handles:
                while waiting and len(handles) < SEGMENTS_AT_ONCE:
                    index, job = waiting[0]
                    # The last one has an open end: a file that breaks off is recognized by what it lacks there.
                    span = Span(job.read_spec.start_seconds, job.read_spec.end_seconds)
                    try:
                        handles[index] = self.engines[model].submit(
                            replace(job.request, span=span), on_event=partial(on_event, index)
                        )
                    except Overloaded:
                        if not handles:
                            raise
                        break
                    waiting.popleft()
                try:
                    index, event = events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(event, Exception) and not isinstance(event, ValueError):
                    raise event
                if isinstance(event, ValueError) or event.completion is not None:
                    del handles[index]
                yield index, event
        finally:
            for handle in handles.values():
                handle.cancel()

    def measure_seconds(self, path: Path, *, model: str) -> float:
        """Return the duration of a file by its packets, since recordings declare none; 0 if it is unknown."""
        engine = self.engines[model]
        return engine.reader.measure_seconds(path, engine.captioner.processor.read_spec("both"))

    def probe_modality(self, path: Path) -> Modality:
        """Return which streams a file has by its header; raises ClipError if it cannot be opened."""
        shape = self.engines[self.default_model].reader.declared_shape(path)
        return "audio" if not shape.width else "both" if shape.has_audio else "visual"

    def close(self) -> None:
        """Stop all engines, then close them: they share worker processes, which none may use when they are closed."""
        for engine in self.engines.values():
            engine.stop()
        for engine in self.engines.values():
            engine.close(grace_seconds=1.0)


def error_message(error: Exception, path: Path) -> str:
    """Return an error as shown to users, with the name of the file or folder instead of its path.

    Of system and model errors only the kind is shown; the details are logged.
    """
    if isinstance(error, (OSError, RuntimeError)):
        logger.warning("an error was shown to a user", exc_info=error)
        reason = error.strerror if isinstance(error, OSError) else None
        return f"{reason or f'it failed with {type(error).__name__}'} (see the server's log for details)"
    return str(error).replace(f"{path}: ", "").replace(str(path), path.name)


def to_caption(request: CaptionRequest, answer: Completion, model: str) -> Caption:
    """Return an answer as a caption record."""
    span = request.span
    return Caption(
        video=request.path.name,
        text=answer.text,
        prompt=request.prompt or "",
        model=model,
        finished=answer.finished,
        complete=answer.clip.is_complete,
        modality=answer.clip.modality,
        warnings=answer.clip.warnings,
        start_seconds=span.start_seconds,
        end_seconds=span.end_seconds,
    )
