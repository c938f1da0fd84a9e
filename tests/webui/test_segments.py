"""Captions of the segments of a clip, without a browser."""

import threading
from types import SimpleNamespace

import pytest

from salmonn.caption.engine import Overloaded
from salmonn.caption.generator import CaptionRequest, Span
from salmonn.caption.loader import ClipJob, ClipReader
from salmonn.caption.read_spec import ReadSpec
from salmonn.caption.segments import ShotSegments
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.media.container import ClipError
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.webui.rendering import render_segments
from salmonn.webui.segments import SegmentList, join_captions
from salmonn.webui.session import SEGMENTS_AT_ONCE
from tests.media.builders import BASE, write_media
from tests.webui.test_session import make_state

SAMPLER = FixedRateSampler(frames_per_second=1.0)


def make_jobs(path, count):
    """Segments of a second; the last one is read to the end of the file."""
    spans = [Span(float(start), start + 1.0) for start in range(count)]
    ends = [span.end_seconds for span in spans[:-1]] + [None]
    return [
        ClipJob(0, CaptionRequest(path, span=span), ReadSpec(SAMPLER, span.start_seconds, end), count)
        for span, end in zip(spans, ends, strict=True)
    ]


class RecordingEngine:
    """A fake engine that answers in another thread with the start of the span, and records its requests.

    Args:
        free: number of further requests that it accepts; None: all.
    """

    def __init__(self, free=None):
        self.free = free
        self.spans, self.num_active, self.most_active, self.num_cancelled = [], 0, 0, 0

    def submit(self, request, *, on_event):
        if self.free is not None and self.num_active >= self.free:
            raise Overloaded("too many requests")
        self.spans.append(request.span)
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        start = request.span.start_seconds

        def answer():
            self.num_active -= 1
            if start == 1.0:
                on_event(0, ClipError(f"{request.path}: has no frames there"))
            else:
                on_event(0, TextDelta(f"At {start:g}"))
                on_event(0, TextDelta(".", Completion(f"At {start:g}.", True)))

        threading.Timer(0.02, answer).start()
        return self

    def cancel(self):
        self.num_cancelled += 1


@pytest.mark.parametrize("free", [None, 1])
def test_segments_are_captioned_a_few_at_a_time(tmp_path, free):
    """A segment that cannot be read does not affect the others; nor does a queue that is almost full."""
    engine, path = RecordingEngine(free), tmp_path / "talk.mp4"
    jobs = make_jobs(path, 7)
    listed = SegmentList(jobs, "toy")
    for event in make_state(tmp_path, toy=engine).stream_segments(jobs, model="toy"):
        if event is not None:
            listed.add(*event)
    assert engine.most_active == (free or SEGMENTS_AT_ONCE) and engine.num_cancelled == 0
    assert engine.spans == [Span(float(start), start + 1.0) for start in range(6)] + [Span(6.0, None)]
    assert listed.num_done == 7
    captions = listed.captions()
    assert [caption.text for caption in captions] == ["At 0.", "At 2.", "At 3.", "At 4.", "At 5.", "At 6."]
    assert (captions[-1].start_seconds, captions[-1].end_seconds) == (6.0, 7.0)
    assert (captions[1].segment, captions[1].num_segments) == (2, 7)
    html = render_segments(listed.segments, path=path)
    assert "No caption: has no frames there" in html and str(tmp_path) not in html


def test_a_full_queue_is_an_error(tmp_path):
    with pytest.raises(Overloaded):
        list(make_state(tmp_path, toy=RecordingEngine(0)).stream_segments(make_jobs(tmp_path, 2), model="toy"))


def test_closing_cancels_the_segments_in_progress(tmp_path):
    engine = RecordingEngine()
    events = make_state(tmp_path, toy=engine).stream_segments(make_jobs(tmp_path / "a.mp4", 7), model="toy")
    next(events)
    events.close()
    assert engine.num_cancelled >= SEGMENTS_AT_ONCE - 1


def test_stopping_keeps_the_text_so_far(tmp_path):
    listed = SegmentList(make_jobs(tmp_path / "a.mp4", 3), "toy")
    listed.add(1, TextDelta("A do"))
    listed.add(0, TextDelta("", Completion("A cat.", True)))
    assert (listed.num_done, listed.captions()) == (1, [listed.segments[0].caption])
    listed.stop()
    captions = listed.captions()
    assert [(one.text, one.finished) for one in captions] == [("A cat.", True), ("A do", False)]
    joined = join_captions(captions)
    assert (joined.text, joined.finished, joined.start_seconds, joined.end_seconds) == ("A cat.\nA do", False, 0.0, 2.0)


def test_a_clip_is_split_into_its_shots(tmp_path):
    """It has a cut at each of six seconds; a sound has no shots, and a clip that is too long is refused first."""
    pytest.importorskip("scenedetect")
    paths = [write_media(tmp_path / "a.mp4", **BASE), write_media(tmp_path / "b.m4a", audio=(0, 2))]
    captioner = SimpleNamespace(
        processor=SimpleNamespace(check_prompt=str), resolve_prompt=str, read_spec=lambda request: ReadSpec(SAMPLER)
    )
    with ClipReader(workers=0) as reader:
        engine = SimpleNamespace(captioner=captioner, reader=reader, max_seconds=10.0)
        state = make_state(tmp_path, toy=engine)
        jobs = state.split_clip(CaptionRequest(paths[0]), ShotSegments(min_seconds=1.5), model="toy")
        spans = [(job.request.span.start_seconds, job.request.span.end_seconds) for job in jobs]
        assert spans == [pytest.approx(span, abs=0.06) for span in [(0, 2), (2, 4), (4, 6)]]
        with pytest.raises(ClipError, match=r"b\.m4a: has no video and so no shots"):
            state.split_clip(CaptionRequest(paths[1]), ShotSegments(), model="toy")
        engine.max_seconds = 5.0
        with pytest.raises(ClipError, match="5"):
            state.split_clip(CaptionRequest(paths[0]), ShotSegments(), model="toy")
