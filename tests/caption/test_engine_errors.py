"""The engine: rejected requests, failures of the model and out of memory."""

import weakref

import av
import pytest
import torch

from salmonn.caption.engine import Engine, ModelFailedError, OutOfMemoryDuringBatch, Overloaded
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.loader import ClipReader
from salmonn.media.container import ClipError, declared_seconds
from salmonn.serve.errors import to_api_error
from tests.caption.engine_client import EventRecorder, expected_text, make_steps, stream_text
from tests.limits import wait_until

SHORT = Sampling(max_new_tokens=12)
FREE = Sampling(temperature=1.0, max_new_tokens=12)


def test_a_failing_prefill_does_not_affect_the_batch(engine, model, videos):
    model.prefill_error = lambda size: IndexError("out of range") if size > 1 else None
    long = Sampling(max_new_tokens=20)
    running, failed = EventRecorder(), EventRecorder()
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=long), on_event=running)
    make_steps(model, 3)
    engine.submit(CaptionRequest(videos[1], sampling=SHORT), on_event=failed)
    wait_until(lambda: engine.num_waiting == 1)
    make_steps(model, 2)
    assert isinstance(failed[0][1], ModelFailedError) and "IndexError" in str(failed[0][1])
    assert not running.texts() and engine.failure == "IndexError"  # the running request does not clear it
    model.gate.set()
    wait_until(running.texts)
    assert (
        running.texts() == {0: expected_text(model, CaptionRequest(videos[0], sampling=long))}
        and engine.failure == "IndexError"
    )


def test_a_prefill_out_of_memory_is_retried_when_the_batch_is_empty(engine, model, videos):
    """The second request did not fit, so it runs alone; the third must wait for it, although it might fit."""
    failed_sizes = []

    def fail_first_batch(size):
        if size == 1 or failed_sizes:
            return None
        failed_sizes.append(size)
        return torch.OutOfMemoryError("CUDA out of memory")

    model.prefill_error = fail_first_batch
    recorders = [EventRecorder() for _ in range(3)]
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=recorders[0])
    make_steps(model, 3)
    for video, recorder in zip(videos[1:], recorders[1:], strict=False):
        engine.submit(CaptionRequest(video, sampling=SHORT), on_event=recorder)
        wait_until(lambda recorder=recorder: engine.num_waiting == recorders.index(recorder))
    model.gate.set()
    wait_until(lambda: all(recorder.texts() for recorder in recorders))
    assert [recorder.texts()[0] for recorder in recorders] == [
        expected_text(model, CaptionRequest(video, sampling=SHORT)) for video in videos[:3]
    ]
    assert failed_sizes == [2] and model.batches == [1, 1, 1, 1] and model.largest_batch == 1
    model.prefill_error = lambda size: torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="does not fit into GPU memory"):
        stream_text(engine, CaptionRequest(videos[0]))


def test_requests_without_delivered_text_are_retried_after_out_of_memory(engine, model, videos):
    """A second clip joins a running answer, and its first decode step runs out of memory."""
    first, second = EventRecorder(), EventRecorder()
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=first)
    make_steps(model, 3)
    handle = engine.submit(CaptionRequest(videos[1], sampling=SHORT), on_event=second)
    wait_until(lambda: engine.num_waiting == 1)
    model.step_error = lambda size: torch.OutOfMemoryError("CUDA out of memory") if size == 2 else None
    model.gate.set()
    wait_until(second.texts)
    assert isinstance(first[-1][1], OutOfMemoryDuringBatch) and not first.texts()
    assert second.texts() == {0: expected_text(model, CaptionRequest(videos[1], sampling=SHORT))}
    assert handle.num_completion_tokens == 12 and model.batches == [1, 1, 1]


def test_too_many_requests_are_rejected(engine, model, videos):
    """The limit is 12."""
    model.gate.clear()
    recorder = EventRecorder()
    engine.submit(CaptionRequest(videos[0], sampling=FREE, num_samples=11), on_event=recorder)
    with pytest.raises(Overloaded, match="11 answers are queued"):
        engine.submit(CaptionRequest(videos[0], num_samples=2), on_event=recorder)
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=recorder)
    with pytest.raises(Overloaded, match="12 answers"):
        next(engine.stream(CaptionRequest(videos[0])))
    model.gate.set()
    wait_until(lambda: not engine.num_active)
    assert stream_text(engine, CaptionRequest(videos[0], sampling=SHORT))


def test_bad_files_and_prompts_do_not_affect_others(engine, videos, tmp_path):
    num_failed = engine.num_failed
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(ClipError, match=r"broken\.mp4: is not a video"):
        stream_text(engine, CaptionRequest(tmp_path / "broken.mp4"))
    with pytest.raises(ValueError, match="special token"):
        stream_text(engine, CaptionRequest(videos[0], prompt="<|im_end|>"))
    # The prompt was rejected when it was submitted, so it does not count as failed.
    assert engine.num_failed == num_failed + 1 and not engine.num_active
    assert stream_text(engine, CaptionRequest(videos[0], sampling=SHORT))


def test_a_failing_model_is_reported_and_may_recover(engine, model, videos, caplog):
    model.step_error = lambda size: IndexError("out of range")
    with pytest.raises(ModelFailedError, match=r"^the model failed \(IndexError\); see the server's log$"):
        stream_text(engine, CaptionRequest(videos[0], sampling=SHORT))
    assert engine.failure == "IndexError"
    assert "Traceback" in caplog.text and "out of range" in caplog.text
    model.step_error = lambda size: None
    assert stream_text(engine, CaptionRequest(videos[0], sampling=SHORT)) and engine.failure is None


def test_out_of_memory_is_retried_one_by_one(engine, model, videos):
    model.step_error = lambda size: torch.OutOfMemoryError("CUDA out of memory") if size > 1 else None
    recorder = EventRecorder()
    engine.submit(CaptionRequest(videos[0], sampling=FREE, seed=5, num_samples=3), on_event=recorder)
    wait_until(lambda: not engine.num_active)
    assert model.batches == [3, 1, 1, 1]
    wait_until(lambda: len(recorder.texts()) == 3)
    assert recorder.texts()[2] == expected_text(model, CaptionRequest(videos[0], sampling=FREE, seed=7))
    model.step_error = lambda size: torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="does not fit into GPU memory") as caught:
        stream_text(engine, CaptionRequest(videos[0]))
    assert "CUDA" not in str(caught.value)


def test_memory_is_freed_before_the_retry(engine, model, videos):
    """The traceback of the error would keep the tensors of the failed step alive."""
    still_alive: list[bool] = []
    reference: weakref.ref[Sampling]

    def fail(size):
        nonlocal reference
        if size == 1:
            still_alive.append(reference() is not None)
            return None
        tensors = Sampling()  # in place of a tensor
        reference = weakref.ref(tensors)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.step_error = fail
    recorder = EventRecorder()
    engine.submit(CaptionRequest(videos[0], sampling=FREE, num_samples=2), on_event=recorder)
    wait_until(lambda: len(recorder.texts()) == 2)
    assert still_alive and not any(still_alive)


def test_out_of_memory_after_delivery_is_a_retryable_error(engine, model, videos):
    """The clip may well fit, but delivered text cannot be retracted."""
    recorder = EventRecorder()
    handle = engine.submit(CaptionRequest(videos[0], sampling=FREE, num_samples=2), on_event=recorder)
    steps = iter([None, None, None])
    model.step_error = lambda size: next(steps, torch.OutOfMemoryError("CUDA out of memory"))
    wait_until(lambda: recorder and isinstance(recorder[-1][1], Exception))
    assert isinstance(recorder[-1][1], OutOfMemoryDuringBatch) and "the GPU ran out of memory" in str(recorder[-1][1])
    assert model.batches == [2] and handle.num_completion_tokens == 6
    api_error = to_api_error(recorder[-1][1], seconds=1)
    assert api_error.status == 503 and api_error.may_retry


def test_preparation_errors_reveal_no_details(engine, model, videos, monkeypatch, caplog):
    def fail(clip):
        raise RuntimeError("a secret of this machine")

    monkeypatch.setattr(model.processor, "clip_inputs", fail)
    with pytest.raises(
        ModelFailedError, match=r"^the file could not be prepared \(RuntimeError\); see the server's log"
    ):
        stream_text(engine, CaptionRequest(videos[0]))
    assert "a secret of this machine" in caplog.text


@pytest.fixture
def short_engine(model):
    """An engine with a maximum duration of 2 s."""
    with ClipReader(workers=1) as reader:
        engine = Engine(model, reader, max_seconds=2)
        yield engine
        engine.close(grace_seconds=1)


def test_long_clips_are_rejected(short_engine, model, videos):
    """The clips are longer than 4 s."""
    for span in (Span(), Span(None, 80.0), Span(1.0, None), Span(1.0, 3.5)):
        with pytest.raises(ClipError, match=r"and the maximum is 2 s: choose a part of it with start and"):
            stream_text(short_engine, CaptionRequest(videos[0], span=span))
    # Rejected by its declared duration, without reading it.
    with pytest.raises(ClipError, match=f"has {declared_seconds(videos[0]):.0f} s or more"):
        stream_text(short_engine, CaptionRequest(videos[0]))
    request = CaptionRequest(videos[0], span=Span(1.0, 3.0), sampling=SHORT)
    assert stream_text(short_engine, request) == expected_text(
        model, CaptionRequest(videos[0], span=Span(1.0, 3.0), sampling=SHORT)
    )


def test_long_clips_of_undeclared_length_are_rejected(short_engine, videos, tmp_path):
    """The file of a live stream declares no length."""
    live = tmp_path / "live.mkv"
    with av.open(str(videos[0])) as source, av.open(str(live), "w", options={"live": "1"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    assert declared_seconds(live) == 0
    with pytest.raises(ClipError, match=r"has 3 s or more"):  # reading stops one second after the limit
        stream_text(short_engine, CaptionRequest(live))
    assert stream_text(short_engine, CaptionRequest(live, span=Span(1.0, 3.0), sampling=SHORT))


def test_playlists_are_rejected(engine, videos, tmp_path):
    """They may refer to files that a client must not see."""
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{videos[0]}\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat").write_text("ffconcat version 1.0\nfile near.mp4\n")
    (tmp_path / "near.mp4").symlink_to(videos[0])
    for name in ("list.m3u8", "concat"):
        with pytest.raises(ClipError, match="is a playlist"):
            stream_text(engine, CaptionRequest(tmp_path / name))
