"""Caption requests, and the interface of everything that answers them.

Every entry point (command line, batch job, HTTP API, web UI, recipes) describes its work as `CaptionRequest`s. A
`Generator` turns them into captions; the local `Captioner` is one, and a client of a remote server can be another.
This module imports no torch, so that worker processes and remote clients start fast.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from salmonn.media.frame_sampling import FrameOptions
from salmonn.records import Caption, Failure, FailureStage, Modality
from salmonn.speech import SpeechEvent, describe_speech

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner
    from salmonn.caption.limits import BatchLimits
    from salmonn.caption.loader import ClipReader
    from salmonn.caption.segments import BoundsStore, SegmentRule
    from salmonn.caption.shape import Shape
    from salmonn.model.layout import ClipFeatures, ClipInputs

SHIPPED_MODEL = Path(__file__).parent.parent / "tiny"
MAX_TOP_LOGPROBS = 20
History = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Span:
    """A part of a video in seconds; None is the start or the end of the video."""

    start_seconds: float | None = None
    end_seconds: float | None = None

    def __post_init__(self) -> None:
        start = self.start_seconds or 0.0
        if start < 0 or (self.end_seconds is not None and self.end_seconds <= start):
            raise ValueError(f"the span from {start} to {self.end_seconds} s is empty: it must end after it starts")


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: 0 takes the most likely token each time (greedy).
        top_p: nucleus: tokens are sampled from the smallest set that has this probability.
        max_new_tokens: maximum length of an answer.
        repetition_penalty: factor by which tokens that already occur in the answer (salmonn2-plus: or in the prompt)
            are made less likely, as in transformers; 1 has no effect, None uses the model's own value.
        stop: strings that end an answer; the answer is cut off before the first of them.
        logprobs: None for no log-probabilities; K for those of each generated token and of the K tokens that were most
            likely in its place, from 0 to 20.
        json_schema: JSON schema, as text, that an answer follows; None for free text. It needs the extra `json`.
    """

    temperature: float = 0.0
    top_p: float = 0.9
    max_new_tokens: int = 160
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false with everything, is rejected too.
        if self.temperature and not 0.01 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy), or 0.01 or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"logprobs must be from 0 to {MAX_TOP_LOGPROBS}, or None, got {self.logprobs}")
        if "" in self.stop:
            raise ValueError("stop must not contain an empty string, which would end every answer at once")


@dataclass(frozen=True)
class CaptionRequest:
    """A request for captions of one video file, or for answers to any prompt about it.

    Args:
        path: video or audio file.
        prompt: user prompt; None asks for a full description, in the wording that the model was trained on.
        sampling: sampling parameters; None is greedy decoding up to the model's own limit.
        span: part of the file to read.
        modality: video, audio or both.
        seed: random seed; sample k of several depends on the seed and k alone.
        num_samples: number N of captions; the file is read and prefilled once for all of them.
        history: earlier (prompt, answer) turns about the same file; an empty prompt asks for a full description too.
        system: system prompt; None uses the model's own.
        frames: which frames to look at; None uses the model's own rule.
        clip_turn: number of the prompt, counted over history and prompt, that shows the file.
        speech: speech of the whole file; the part within the span is added to the prompt; None adds nothing.
        source: where the video comes from, if `path` is a temporary copy; it names the fields of templates.
        finished_starts: starts of segments, in seconds, that have a caption and are left out when the file is split.
    """

    path: Path
    prompt: str | None = None
    sampling: Sampling | None = None
    span: Span = Span()
    modality: Modality = "both"
    seed: int = 0
    num_samples: int = 1
    history: History = ()
    system: str | None = None
    frames: FrameOptions | None = None
    clip_turn: int = 0
    speech: tuple[SpeechEvent, ...] | None = None
    source: Path | None = None
    finished_starts: frozenset[float] = frozenset()

    def with_context(self, prompt: str) -> str:
        """Return a prompt with the transcript of the span, if the speech is given."""
        if self.speech is None:
            return prompt
        text, _ = describe_speech(self.speech, self.span.start_seconds, self.span.end_seconds)
        return f"{prompt}\n\n{text}"


class Generator(Protocol):
    """Anything that answers caption requests: a local model, or a client of a server that runs one."""

    name: str

    def generate(self, requests: Sequence[CaptionRequest]) -> list[list[Caption]]:
        """Return `num_samples` captions for each request.

        Raises:
            ClipError: a file cannot be read.
        """
        ...


@dataclass(frozen=True)
class SegmentResult:
    """The result for a request, or for one of the segments that its file was split into.

    Attributes:
        index: position of the request among the requests.
        num_segments: number of segments that the file was split into.
        result: caption, or the reason why there is none.
    """

    index: int
    num_segments: int
    result: Caption | Failure


class BatchCaptioner(Protocol):
    """A generator that captions any number of files as they are read: a local model, or a client of a server."""

    def default_sampling(self) -> Sampling:
        """Return greedy decoding up to the model's own token limit."""
        ...

    def caption_batches(
        self,
        requests: Iterable[CaptionRequest],
        *,
        segments: "SegmentRule | None" = None,
        store: "BoundsStore | None" = None,
        batch_size: int | None = None,
        reader: "ClipReader | None" = None,
        shape: "Shape | None" = None,
    ) -> Iterator[list[SegmentResult]]:
        """See `Captioner.caption_batches`."""
        ...


def to_failure(request: CaptionRequest, reason: str, *, stage: FailureStage) -> Failure:
    """Return the record of a request that has no caption."""
    return Failure(str(request.path), reason, stage, request.span.start_seconds, request.span.end_seconds)


class CachedGenerator:
    """The local model as a generator for clips whose inputs or encoder features are at hand, so that no file is read.

    Args:
        captioner: local model.
        clips: inputs or cached features of each path that will be requested, whole and in all modalities.
        limits: limits of the batch, see `Captioner.generate`.
    """

    def __init__(
        self,
        captioner: "Captioner",
        clips: Mapping[Path, "ClipInputs | ClipFeatures"],
        *,
        limits: "BatchLimits | None" = None,
    ) -> None:
        self.name = captioner.name
        self._captioner = captioner
        self._clips = clips
        # Used for all calls, so that memory and recorded decode steps are used again on a GPU.
        self._scheduler = captioner.scheduler(limits)
        self._limits = self._scheduler.limits

    def generate(self, requests: Sequence[CaptionRequest]) -> list[list[Caption]]:
        """See `Generator`."""
        clips = [self._clips[request.path] for request in requests]
        return self._captioner.generate(requests, clips=clips, limits=self._limits, scheduler=self._scheduler)
