"""The engine: continuous batching, token counts, cancellation and shutdown."""

import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from salmonn.caption.encode_ahead import ClipEncoder
from salmonn.caption.engine import Overloaded
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.processor import PromptRow
from salmonn.caption.read_spec import ReadSpec
from salmonn.model.layout import ClipInfo
from tests.caption.engine_client import EventRecorder, expected_text, make_steps, stream_text
from tests.completions import generate
from tests.limits import STEP_SECONDS, wait_until

SHORT = Sampling(max_new_tokens=12)
FREE = Sampling(temperature=1.0, max_new_tokens=12)


class SlowReadSpec(ReadSpec):
    """Reads for ten minutes."""

    def read(self, path):
        time.sleep(600)


def test_stream_equals_caption(engine, model, videos):
    request = CaptionRequest(videos[0], sampling=SHORT)
    *deltas, last = engine.stream(request)
    caption = model.caption(videos[0], sampling=SHORT)
    assert last.completion.text == caption.text and last.completion.finished == caption.finished
    assert last.completion.clip == ClipInfo("both")
    assert "".join(delta.text for delta in [*deltas, last]) == caption.text
    span = Span(1.0, 3.0)
    options = dict(prompt="What is heard?", sampling=FREE, span=span, modality="audio", seed=7)
    assert stream_text(engine, CaptionRequest(videos[1], **options)) == model.caption(videos[1], **options).text


def test_queued_requests_are_batched(engine, model, videos, monkeypatch):
    """Five are queued while one is prefilled, two of them with other sampling: prefills of 1, 3 and 2."""
    monkeypatch.setattr(model.network, "prefill_chunk_tokens", 8192)
    model.gate.clear()
    num_prefills, recorders = engine.num_prefills, [EventRecorder() for _ in range(6)]
    requests = [
        CaptionRequest(videos[index % 2], sampling=FREE if index in (2, 4) else SHORT, seed=index) for index in range(6)
    ]
    engine.submit(requests[0], on_event=recorders[0])
    wait_until(lambda: model.batches == [1])
    engine.submit(requests[1], on_event=recorders[1])
    wait_until(lambda: engine.num_waiting == 1)
    for request, recorder in zip(requests[2:], recorders[2:], strict=True):
        engine.submit(request, on_event=recorder)
    wait_until(lambda: engine.num_waiting == 5)
    model.gate.set()
    wait_until(lambda: not engine.num_active)
    assert model.batches == [1, 3, 2] and engine.num_prefills - num_prefills == 3 and model.largest_batch == 6
    for request, recorder in zip(requests, recorders, strict=True):
        wait_until(recorder.texts)
        assert recorder.texts() == {0: expected_text(model, request)}


def test_a_new_request_joins_the_running_batch(engine, model, videos):
    """A short answer ends before a long one that started earlier; both equal the answers of separate runs."""
    long = Sampling(max_new_tokens=24)
    first, second = EventRecorder(), EventRecorder()
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=long), on_event=first)
    make_steps(model, 3)
    engine.submit(CaptionRequest(videos[1], sampling=FREE, seed=4), on_event=second)
    wait_until(lambda: engine.num_waiting == 1)
    make_steps(model, 13)  # one step before it joins
    wait_until(second.texts)
    assert not first.texts() and model.batches == [1, 1] and model.largest_batch == 2
    model.gate.set()
    wait_until(first.texts)
    assert first.texts() == {0: expected_text(model, CaptionRequest(videos[0], sampling=long))}
    assert second.texts() == {0: expected_text(model, CaptionRequest(videos[1], sampling=FREE, seed=4))}


def test_a_request_is_encoded_while_others_are_decoded(engine, model, videos, monkeypatch):
    """As on a GPU; it joins once its features are there. One for which memory is short then runs alone."""
    encoder, may_encode, threads, encode = ClipEncoder(model), threading.Event(), [], model.network.encode
    monkeypatch.setattr(engine, "_encoder", encoder)

    def note(clips, layouts):
        threads.append(threading.current_thread().name.partition("_")[0])
        if len(threads) == 2:
            may_encode.wait(STEP_SECONDS)
        if len(threads) == 3:
            raise torch.OutOfMemoryError
        return encode(clips, layouts)

    monkeypatch.setattr(model.network, "encode", note)
    long, recorders = Sampling(max_new_tokens=100), [EventRecorder() for _ in range(3)]
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=long), on_event=recorders[0])
    make_steps(model, 3)
    engine.submit(CaptionRequest(videos[1], sampling=SHORT), on_event=recorders[1])
    wait_until(lambda: engine.num_waiting == 1)
    make_steps(model, 5)
    wait_until(lambda: len(threads) == 2)
    assert model.batches == [1]
    may_encode.set()
    wait_until(lambda: all(future.done() for _, future in encoder._started.values()))
    make_steps(model, 2)
    assert model.batches == [1, 1] and threads == ["encode"] * 2
    engine.submit(CaptionRequest(videos[2], sampling=SHORT), on_event=recorders[2])
    wait_until(lambda: engine.num_waiting == 1)
    make_steps(model, 5)
    wait_until(lambda: len(threads) == 3)
    assert model.batches == [1, 1]
    model.gate.set()
    wait_until(lambda: all(recorder.texts() for recorder in recorders))
    assert threads == ["encode"] * 3 + ["model"] and model.batches == [1, 1, 1]
    monkeypatch.setattr(model.network, "encode", encode)
    for video, recorder, sampling in zip(videos, recorders, (long, SHORT, SHORT), strict=False):
        assert recorder.texts() == {0: model.caption(video, sampling=sampling).text}
    assert encoder.reserved_bytes > 0 and engine._scheduler.limits.reserved_bytes == encoder.reserved_bytes
    encoder.close()


def test_long_prompts_are_prefilled_one_at_a_time(engine, model, videos, monkeypatch):
    """Decode steps happen in between; in the end all are in one batch."""
    monkeypatch.setattr(model.network, "prefill_chunk_tokens", 1)
    model.gate.clear()
    recorders = [EventRecorder() for _ in range(4)]
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=recorders[0])
    wait_until(lambda: model.batches == [1])
    for video, recorder in zip(videos[1:4], recorders[1:], strict=True):
        engine.submit(CaptionRequest(video, sampling=SHORT), on_event=recorder)
    wait_until(lambda: engine.num_waiting == 3)
    model.gate.set()
    wait_until(lambda: all(recorder.texts() for recorder in recorders))
    assert model.batches == [1, 1, 1, 1] and model.largest_batch == 4
    assert [recorder.texts()[0] for recorder in recorders] == [
        expected_text(model, CaptionRequest(video, sampling=SHORT)) for video in videos[:4]
    ]


def test_samples_of_a_request_are_admitted_together(engine, model, videos, monkeypatch):
    """One of 4 rows is occupied: 4 samples wait until it is free, since they share their prefix."""
    scheduler = engine._scheduler
    monkeypatch.setattr(scheduler, "limits", replace(scheduler.limits, num_rows=4))
    recorders = [EventRecorder(), EventRecorder()]
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=FREE), on_event=recorders[0])
    make_steps(model, 3)
    engine.submit(CaptionRequest(videos[1], sampling=FREE, num_samples=4), on_event=recorders[1])
    wait_until(lambda: engine.num_waiting == 4)
    model.gate.set()
    wait_until(lambda: len(recorders[1].texts()) == 4)
    assert model.batches == [1, 4]
    engine.submit(CaptionRequest(videos[2], sampling=FREE, num_samples=6), on_event=recorders[1])
    wait_until(lambda: not engine.num_active)
    assert model.batches == [1, 4, 4, 2]


def test_samples_share_the_file_and_have_their_own_seeds(engine, model, videos):
    recorder = EventRecorder()
    handle = engine.submit(CaptionRequest(videos[2], sampling=FREE, seed=3, num_samples=3), on_event=recorder)
    assert engine.num_active == 3
    wait_until(lambda: len(recorder.texts()) == 3)
    assert model.batches == [3]
    requests = [CaptionRequest(videos[2], sampling=FREE, seed=3 + sample) for sample in range(3)]
    texts = {sample: expected_text(model, request) for sample, request in enumerate(requests)}
    assert recorder.texts() == texts and len(set(texts.values())) > 1
    # Prompt and clip tokens count once; an unfinished answer has the maximum number of tokens.
    prompt = PromptRow(0, model.default_prompt())
    rows = model.processor.collate([prompt], [model.processor.read(videos[2])])
    assert handle.num_prompt_tokens == rows.input_ids.shape[1]
    num_unfinished = [delta.completion.finished for _, delta in recorder if delta.completion].count(False)
    assert 12 * num_unfinished <= handle.num_completion_tokens <= 3 * 12


def test_tokens_are_counted(engine, model, videos):
    recorder = EventRecorder()
    handle = engine.submit(CaptionRequest(videos[0], sampling=Sampling(max_new_tokens=5)), on_event=recorder)
    wait_until(recorder.texts)
    assert not recorder[-1][1].completion.finished and handle.num_completion_tokens == 5
    assert 0 < handle.reading_seconds < 20


def test_tokens_are_counted_when_samples_end_one_by_one(engine, model, videos, monkeypatch):
    """A fifth of all tokens are stop tokens, so the samples of a batch end at different steps."""
    monkeypatch.setattr(model.processor, "stop_ids", list(range(1, 400, 5)))
    recorder = EventRecorder()
    handle = engine.submit(CaptionRequest(videos[0], sampling=FREE, seed=1, num_samples=4), on_event=recorder)
    wait_until(lambda: len(recorder.texts()) == 4)
    row = PromptRow(0, model.default_prompt())
    inputs = model.processor.collate([row] * 4, [model.processor.read(videos[0])])
    answers = generate(model.network, inputs, sampling=FREE, stop_ids=model.processor.stop_ids, seeds=[1, 2, 3, 4])
    lengths = [len(answer) for answer in answers]
    assert len(set(lengths)) > 1 and handle.num_completion_tokens == sum(lengths)


def test_a_cancelled_batch_ends(engine, model, videos):
    """Without cancellation it would take 500 steps."""
    recorder = EventRecorder()
    handle = engine.submit(CaptionRequest(videos[0], sampling=Sampling(max_new_tokens=500)), on_event=recorder)
    wait_until(lambda: recorder)
    handle.cancel()
    assert stream_text(engine, CaptionRequest(videos[1], sampling=SHORT))
    assert model.num_steps < 250


def test_cancelled_requests_end_and_the_batch_continues(engine, model, videos):
    model.gate.clear()
    num_cancelled, num_answered = engine.num_cancelled, engine.num_answered
    recorders = [EventRecorder(), EventRecorder()]
    # The first request blocks the model until the others are queued.
    first = engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=EventRecorder())
    wait_until(lambda: model.batches == [1])
    running = engine.submit(CaptionRequest(videos[1], sampling=SHORT), on_event=recorders[0])
    engine.submit(CaptionRequest(videos[2], sampling=SHORT), on_event=recorders[1])
    unread = engine.submit(CaptionRequest(videos[3], sampling=SHORT), on_event=EventRecorder())
    wait_until(lambda: engine.num_waiting == 3)
    first.cancel()
    unread.cancel()
    assert engine.num_cancelled == num_cancelled + 2 and engine.num_active == 2
    model.gate.set()
    wait_until(lambda: recorders[0])
    running.cancel()
    num_events = len(recorders[0])
    wait_until(recorders[1].texts)
    assert recorders[1].texts() == {0: expected_text(model, CaptionRequest(videos[2], sampling=SHORT))}
    assert len(recorders[0]) <= num_events + 1  # one event may have been in progress
    if not recorders[0].texts():  # otherwise it ended before it was cancelled
        assert engine.num_cancelled == num_cancelled + 3 and engine.num_answered == num_answered + 1


def test_cancelling_stops_reading(own_engine, videos, monkeypatch):
    """The only worker becomes available again."""
    request = CaptionRequest(videos[0], sampling=SHORT)
    read_spec = own_engine.captioner.read_spec
    slow = SlowReadSpec(**vars(read_spec(request)))
    monkeypatch.setattr(own_engine.captioner, "read_spec", lambda request: slow)
    handle = own_engine.submit(request, on_event=EventRecorder())
    wait_until(lambda: [task for task in own_engine.reader._running.values() if task.worker])
    monkeypatch.setattr(own_engine.captioner, "read_spec", read_spec)
    started = time.monotonic()
    handle.cancel()
    wait_until(lambda: not own_engine.num_active)
    assert stream_text(own_engine, request) and time.monotonic() - started < 300 and own_engine.num_failed == 0


def test_closing_a_stream_cancels_its_request(engine, videos):
    num_cancelled = engine.num_cancelled
    with closing(engine.stream(CaptionRequest(videos[0], sampling=SHORT))) as deltas:
        next(deltas)
    assert engine.num_cancelled == num_cancelled + 1


def test_submit_does_not_hold_the_lock_while_it_calls_the_reader(own_engine, videos, monkeypatch):
    """It would deadlock if another engine closed the shared reader, which calls back."""
    submit = own_engine.reader.submit

    def submit_checked(*args):
        num_active: list[int] = []
        other = threading.Thread(target=lambda: num_active.append(own_engine.num_active), daemon=True)
        other.start()
        other.join(STEP_SECONDS)
        assert num_active == [1]
        return submit(*args)

    monkeypatch.setattr(own_engine.reader, "submit", submit_checked)
    assert stream_text(own_engine, CaptionRequest(videos[0], sampling=SHORT))


def test_a_reader_closed_by_another_engine(own_engine, videos):
    own_engine.reader.close()
    with pytest.raises(Overloaded, match="shutting down"):
        own_engine.submit(CaptionRequest(videos[0]), on_event=EventRecorder())
    assert not own_engine.num_active


def submit_three(engine, model, videos):
    """Submit three requests: the model is blocked in the first; the others are queued or being read."""
    model.gate.clear()
    recorders = [EventRecorder() for _ in range(3)]
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=recorders[0])
    wait_until(lambda: model.batches == [1])
    for video, recorder in zip(videos[1:3], recorders[1:], strict=True):
        engine.submit(CaptionRequest(video, sampling=SHORT), on_event=recorder)
    return recorders


def test_closing_finishes_active_requests(own_engine, model, videos):
    """One is decoding, one is queued and one is being read."""
    recorders = submit_three(own_engine, model, videos)
    closer = threading.Thread(target=own_engine.close, kwargs={"grace_seconds": 20})
    closer.start()
    with pytest.raises(Overloaded, match="shutting down"):
        wait_until(lambda: own_engine.submit(CaptionRequest(videos[0]), on_event=EventRecorder()) and False)
    model.gate.set()
    closer.join(STEP_SECONDS)
    assert not closer.is_alive()
    for video, recorder in zip(videos, recorders, strict=False):
        assert recorder.texts() == {0: expected_text(model, CaptionRequest(video, sampling=SHORT))}


def test_closing_waits_for_reading(own_engine, model, videos):
    recorders = [EventRecorder() for _ in videos]
    for video, recorder in zip(videos, recorders, strict=True):
        own_engine.submit(CaptionRequest(video, sampling=SHORT), on_event=recorder)
    own_engine.close(grace_seconds=20)
    for video, recorder in zip(videos, recorders, strict=True):
        assert recorder.texts() == {0: expected_text(model, CaptionRequest(video, sampling=SHORT))}


def test_closing_without_grace_fails_active_requests(own_engine, model, videos, monkeypatch):
    """Closing waits for the model's current step, but not until the step's timeout."""
    monkeypatch.setattr("salmonn.caption.engine._ABORT_SECONDS", 600.0)
    recorders = submit_three(own_engine, model, videos)
    closer = threading.Thread(target=own_engine.close, kwargs={"grace_seconds": 0})
    closer.start()
    wait_until(own_engine._is_aborted.is_set)
    model.gate.set()  # the current step ends
    closer.join(STEP_SECONDS)
    assert not closer.is_alive()
    assert not own_engine.num_active
    for recorder in recorders:
        wait_until(lambda recorder=recorder: recorder)
        assert isinstance(recorder[-1][1], Overloaded)
