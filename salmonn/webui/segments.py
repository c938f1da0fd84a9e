"""Captions of the segments of a clip, in order of time, as they are generated."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from salmonn.caption.loader import ClipJob
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.records import Caption
from salmonn.webui.session import to_caption


@dataclass
class Segment:
    """A segment of a clip.

    Args:
        start_seconds, end_seconds: its span.
        text: its caption so far.
        caption: its caption, once it is complete.
        error: the reason why it has none.
    """

    start_seconds: float
    end_seconds: float
    text: str = ""
    caption: Caption | None = None
    error: str = ""

    @property
    def is_growing(self) -> bool:
        """Whether more text is to come."""
        return self.caption is None and not self.error


@dataclass
class SegmentList:
    """The segments of a clip that have been started.

    Args:
        jobs: jobs of all segments.
        model: name of the model.
    """

    jobs: Sequence[ClipJob]
    model: str
    _started: dict[int, Segment] = field(default_factory=dict)

    @property
    def segments(self) -> list[Segment]:
        """The segments that have text or an error, in order of time."""
        return [self._started[index] for index in sorted(self._started)]

    @property
    def num_done(self) -> int:
        """Number of segments that are complete or have failed."""
        return sum(not one.is_growing for one in self._started.values())

    def add(self, index: int, event: TextDelta | ValueError) -> None:
        """Add what arrived for a segment."""
        span = self.jobs[index].request.span
        assert span.start_seconds is not None and span.end_seconds is not None
        segment = self._started.setdefault(index, Segment(span.start_seconds, span.end_seconds))
        if isinstance(event, ValueError):
            segment.error = str(event)
            return
        segment.text += event.text
        if event.completion is not None:
            self._complete(index, event.completion)

    def stop(self) -> None:
        """End the segments that are still growing with their text so far."""
        for index, segment in self._started.items():
            if segment.is_growing:
                self._complete(index, Completion(segment.text.strip(), finished=False))

    def captions(self) -> list[Caption]:
        """Return the captions so far in order of time, without empty ones."""
        return [one.caption for one in self.segments if one.caption and one.caption.text]

    def _complete(self, index: int, completion: Completion) -> None:
        caption = to_caption(self.jobs[index].request, completion, self.model)
        self._started[index].text = caption.text
        self._started[index].caption = replace(caption, segment=index, num_segments=len(self.jobs))


def to_segment(caption: Caption) -> Segment:
    """Return a complete caption of a segment as it is shown."""
    assert caption.start_seconds is not None and caption.end_seconds is not None
    return Segment(caption.start_seconds, caption.end_seconds, caption.text, caption)


def join_captions(captions: Sequence[Caption]) -> Caption:
    """Return the captions of all segments as one, to be copied, asked about, and checked for damage."""
    warnings = tuple(dict.fromkeys(warning for one in captions for warning in one.warnings))
    return replace(
        captions[0],
        text="\n".join(one.text for one in captions),
        finished=all(one.finished for one in captions),
        complete=all(one.complete for one in captions),
        warnings=warnings,
        start_seconds=captions[0].start_seconds,
        end_seconds=captions[-1].end_seconds,
        segment=0,
        num_segments=1,
    )
