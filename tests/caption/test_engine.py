"""The engine: continuous batching, cancellation, out of memory, shutdown and counters."""

import threading
import time
import weakref
from contextlib import closing

import av
import pytest
import torch

from salmonn.caption.engine import Engine, ModelFailedError, OutOfMemoryDuringBatch, Overloaded
from salmonn.caption.generate import generate
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.loader import ClipReader, ReadSpec
from salmonn.caption.processor import PromptRow
from salmonn.caption.streaming import TextDelta
from salmonn.media.container import ClipError, declared_seconds
from salmonn.serve.errors import to_api_error
from tests.serve.running import wait_until

SHORT = Sampling(max_new_tokens=12)
FREE = Sampling(temperature=1.0, max_new_tokens=12)


class Slow(ReadSpec):
    """What it reads takes ten minutes."""

    def read(self, path):
        time.sleep(600)


def say(engine, query):
    return "".join(piece.text for piece in engine.stream(query))


def make_steps(model, count):
    """Let the blocked model run a number of steps."""
    model.stops_after = model.num_steps + count
    model.gate.set()
    wait_until(lambda: not model.gate.is_set())


class Told(list):
    """Collects the events of a request."""

    def __call__(self, sample, piece):
        self.append((sample, piece))

    def texts(self):
        return {
            sample: piece.completion.text for sample, piece in self if isinstance(piece, TextDelta) and piece.completion
        }


def test_stream_equals_caption(engine, model, videos):
    query = CaptionRequest(videos[0], sampling=SHORT)
    *pieces, last = engine.stream(query)
    caption = model.caption(videos[0], sampling=SHORT)
    assert last.completion.text == caption.text and last.completion.finished == caption.finished
    assert "".join(piece.text for piece in [*pieces, last]) == caption.text
    span = Span(1.0, 3.0)
    named = dict(prompt="What is heard?", sampling=FREE, span=span, modality="audio", seed=7)
    assert say(engine, CaptionRequest(videos[1], **named)) == model.caption(videos[1], **named).text


def test_queued_requests_are_batched(engine, model, videos, monkeypatch):
    """While one is prefilled, eight are queued, two with other sampling: prefills of 1, 6 and 2, batch of 9."""
    monkeypatch.setattr(model.network, "prefill_chunk_tokens", 8192)
    model.gate.clear()
    begun, told = engine.num_prefills, [Told() for _ in range(9)]
    queries = [
        CaptionRequest(videos[place % 5], sampling=FREE if place in (4, 6) else SHORT, seed=place) for place in range(9)
    ]
    engine.submit(queries[0], on_event=told[0])
    wait_until(lambda: model.batches == [1])
    engine.submit(queries[1], on_event=told[1])
    wait_until(lambda: engine.num_waiting == 1)
    for query, listener in zip(queries[2:], told[2:], strict=True):
        engine.submit(query, on_event=listener)
    wait_until(lambda: engine.num_waiting == 8)
    model.gate.set()
    wait_until(lambda: not engine.num_active)
    assert model.batches == [1, 6, 2] and engine.num_prefills - begun == 3 and model.most == 9
    for query, listener in zip(queries, told, strict=True):
        expected = model.caption(query.path, sampling=query.sampling, seed=query.seed)
        wait_until(listener.texts)
        assert listener.texts() == {0: expected.text}


def test_a_new_request_joins_the_running_batch(engine, model, videos):
    """A short answer ends before a long one that started earlier; both equal what they are alone."""
    long = Sampling(max_new_tokens=100)
    first, second = Told(), Told()
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=long), on_event=first)
    make_steps(model, 3)
    engine.submit(CaptionRequest(videos[1], sampling=FREE, seed=4), on_event=second)
    wait_until(lambda: engine.num_waiting == 1)
    make_steps(model, 13)  # one before it joins
    wait_until(second.texts)
    assert not first.texts() and model.batches == [1, 1] and model.most == 2
    model.gate.set()
    wait_until(first.texts)
    assert first.texts() == {0: model.caption(videos[0], sampling=long).text}
    assert second.texts() == {0: model.caption(videos[1], sampling=FREE, seed=4).text}


def test_long_prompts_are_prefilled_one_at_a_time(engine, model, videos, monkeypatch):
    """Decode steps happen in between; in the end all are in one batch."""
    monkeypatch.setattr(model.network, "prefill_chunk_tokens", 1)
    model.gate.clear()
    told = [Told() for _ in range(4)]
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=told[0])
    wait_until(lambda: model.batches == [1])
    for video, listener in zip(videos[1:4], told[1:], strict=True):
        engine.submit(CaptionRequest(video, sampling=SHORT), on_event=listener)
    wait_until(lambda: engine.num_waiting == 3)
    model.gate.set()
    wait_until(lambda: all(listener.texts() for listener in told))
    assert model.batches == [1, 1, 1, 1] and model.most == 4
    assert [listener.texts()[0] for listener in told] == [
        model.caption(video, sampling=SHORT).text for video in videos[:4]
    ]


def test_a_failing_prefill_does_not_affect_the_batch(engine, model, videos):
    model.fail_to_read = lambda size: IndexError("out of range") if size > 1 else None
    long = Sampling(max_new_tokens=100)
    told, failed = Told(), Told()
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=long), on_event=told)
    make_steps(model, 3)
    engine.submit(CaptionRequest(videos[1], sampling=SHORT), on_event=failed)
    wait_until(lambda: engine.num_waiting == 1)
    make_steps(model, 2)
    assert isinstance(failed[0][1], ModelFailedError) and "IndexError" in str(failed[0][1])
    assert not told.texts() and engine.failure == "IndexError"  # requests that continue do not clear it
    model.gate.set()
    wait_until(told.texts)
    assert told.texts() == {0: model.caption(videos[0], sampling=long).text} and engine.failure == "IndexError"


def test_a_prefill_out_of_memory_is_retried_when_the_batch_is_empty(engine, model, videos):
    """The second request runs alone since it did not fit; the third follows it, although it might fit."""
    refused = []

    def fail(size):
        if size == 1 or refused:
            return None
        refused.append(size)
        return torch.OutOfMemoryError("CUDA out of memory")

    model.fail_to_read = fail
    told = [Told() for _ in range(3)]
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=told[0])
    make_steps(model, 3)
    for video, listener in zip(videos[1:], told[1:], strict=False):
        engine.submit(CaptionRequest(video, sampling=SHORT), on_event=listener)
        wait_until(lambda listener=listener: engine.num_waiting == told.index(listener))
    model.gate.set()
    wait_until(lambda: all(listener.texts() for listener in told))
    assert [listener.texts()[0] for listener in told] == [
        model.caption(video, sampling=SHORT).text for video in videos[:3]
    ]
    assert refused == [2] and model.batches == [1, 1, 1, 1] and model.most == 1
    model.fail_to_read = lambda size: torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="does not fit into GPU memory"):
        say(engine, CaptionRequest(videos[0]))


def test_requests_without_delivered_text_are_retried_after_out_of_memory(engine, model, videos):
    """A second clip joins a running answer, and its first decode step runs out of memory."""
    first, second = Told(), Told()
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=first)
    make_steps(model, 3)
    answering = engine.submit(CaptionRequest(videos[1], sampling=SHORT), on_event=second)
    wait_until(lambda: engine.num_waiting == 1)
    model.fail = lambda size: torch.OutOfMemoryError("CUDA out of memory") if size == 2 else None
    model.gate.set()
    wait_until(second.texts)
    assert isinstance(first[-1][1], OutOfMemoryDuringBatch) and not first.texts()
    assert second.texts() == {0: model.caption(videos[1], sampling=SHORT).text}
    assert answering.num_completion_tokens == 12 and model.batches == [1, 1, 1]


def test_samples_of_a_request_are_admitted_together(engine, model, videos, monkeypatch):
    """One of 4 places is taken: 4 samples wait until it is free, since they share their prefix."""
    monkeypatch.setattr(engine, "batch_size", 4)
    told = [Told(), Told()]
    model.gate.clear()
    engine.submit(CaptionRequest(videos[0], sampling=FREE), on_event=told[0])
    make_steps(model, 3)
    engine.submit(CaptionRequest(videos[1], sampling=FREE, num_samples=4), on_event=told[1])
    wait_until(lambda: engine.num_waiting == 4)
    model.gate.set()
    wait_until(lambda: len(told[1].texts()) == 4)
    assert model.batches == [1, 4]
    engine.submit(CaptionRequest(videos[2], sampling=FREE, num_samples=6), on_event=told[1])
    wait_until(lambda: not engine.num_active)
    assert model.batches == [1, 4, 4, 2]


def test_samples_share_the_file_and_have_their_own_seeds(engine, model, videos):
    told = Told()
    answering = engine.submit(CaptionRequest(videos[2], sampling=FREE, seed=3, num_samples=3), on_event=told)
    assert engine.num_active == 3
    wait_until(lambda: len(told.texts()) == 3)
    assert model.batches == [3]
    texts = {sample: model.caption(videos[2], sampling=FREE, seed=3 + sample).text for sample in range(3)}
    assert told.texts() == texts and len(set(texts.values())) > 1
    # The words of the prompt and the clip count once; an answer that is not finished has all tokens that it may.
    prompt = PromptRow(0, model.default_prompt())
    rows = model.processor.collate([prompt], [model.processor.read(videos[2])])
    assert answering.num_prompt_tokens == rows.input_ids.shape[1]
    longest = [piece.completion.finished for _, piece in told if piece.completion].count(False) * 12
    assert longest <= answering.num_completion_tokens <= 3 * 12


def test_tokens_are_counted(engine, model, videos):
    told = Told()
    answering = engine.submit(CaptionRequest(videos[0], sampling=Sampling(max_new_tokens=5)), on_event=told)
    wait_until(told.texts)
    assert not told[-1][1].completion.finished and answering.num_completion_tokens == 5
    assert 0 < answering.reading_seconds < 20


def test_tokens_are_counted_when_samples_end_one_by_one(engine, model, videos, monkeypatch):
    """A fifth of all tokens are stop tokens, so the samples of a batch end at different steps."""
    monkeypatch.setattr(model.processor, "stop_ids", list(range(1, 400, 5)))
    told = Told()
    answering = engine.submit(CaptionRequest(videos[0], sampling=FREE, seed=1, num_samples=4), on_event=told)
    wait_until(lambda: len(told.texts()) == 4)
    row = PromptRow(0, model.default_prompt())
    inputs = model.processor.collate([row] * 4, [model.processor.read(videos[0])])
    answers = generate(model.network, inputs, sampling=FREE, stop_ids=model.processor.stop_ids, seeds=[1, 2, 3, 4])
    lengths = [len(answer) for answer in answers]
    assert len(set(lengths)) > 1 and answering.num_completion_tokens == sum(lengths)


def test_a_cancelled_batch_ends(engine, model, videos):
    """It would take 500 steps otherwise."""
    told = Told()
    answering = engine.submit(CaptionRequest(videos[0], sampling=Sampling(max_new_tokens=500)), on_event=told)
    wait_until(lambda: told)
    answering.cancel()
    assert say(engine, CaptionRequest(videos[1], sampling=SHORT))
    assert model.num_steps < 250


def test_too_many_requests_are_rejected(engine, model, videos):
    """The limit is 12."""
    model.gate.clear()
    told = Told()
    engine.submit(CaptionRequest(videos[0], sampling=FREE, num_samples=11), on_event=told)
    with pytest.raises(Overloaded, match="11 answers are queued"):
        engine.submit(CaptionRequest(videos[0], num_samples=2), on_event=told)
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=told)
    with pytest.raises(Overloaded, match="12 answers"):
        next(engine.stream(CaptionRequest(videos[0])))
    model.gate.set()
    wait_until(lambda: not engine.num_active)
    assert say(engine, CaptionRequest(videos[0], sampling=SHORT))


def test_bad_files_and_prompts_do_not_affect_others(engine, videos, tmp_path):
    failed = engine.num_failed
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(ClipError, match=r"broken\.mp4: is not a video"):
        say(engine, CaptionRequest(tmp_path / "broken.mp4"))
    with pytest.raises(ValueError, match="special token"):
        say(engine, CaptionRequest(videos[0], prompt="<|im_end|>"))
    assert engine.num_failed == failed + 1 and not engine.num_active  # the prompt was refused before it was a query
    assert say(engine, CaptionRequest(videos[0], sampling=SHORT))


def test_cancelled_requests_end_and_the_batch_continues(engine, model, videos):
    model.gate.clear()
    dropped, answered = engine.num_cancelled, engine.num_answered
    told = [Told(), Told()]
    first = engine.submit(
        CaptionRequest(videos[0], sampling=SHORT), on_event=Told()
    )  # has the model while the others come
    wait_until(lambda: model.batches == [1])
    going = engine.submit(CaptionRequest(videos[1], sampling=SHORT), on_event=told[0])
    engine.submit(CaptionRequest(videos[2], sampling=SHORT), on_event=told[1])
    unread = engine.submit(CaptionRequest(videos[3], sampling=SHORT), on_event=Told())
    wait_until(lambda: engine.num_waiting == 3)
    first.cancel()
    unread.cancel()
    assert engine.num_cancelled == dropped + 2 and engine.num_active == 2
    model.gate.set()
    wait_until(lambda: told[0])
    going.cancel()
    heard = len(told[0])
    wait_until(told[1].texts)
    assert told[1].texts() == {0: model.caption(videos[2], sampling=SHORT).text}
    assert len(told[0]) <= heard + 1  # a piece may have been on its way
    if not told[0].texts():  # unless it ended before it was dropped
        assert engine.num_cancelled == dropped + 3 and engine.num_answered == answered + 1


def test_cancelling_stops_reading(own_engine, videos, monkeypatch):
    """The only worker becomes free."""
    query = CaptionRequest(videos[0], sampling=SHORT)
    read_spec = own_engine._limit_duration
    monkeypatch.setattr(own_engine, "_limit_duration", lambda read_spec: Slow(**vars(read_spec)))
    answering = own_engine.submit(query, on_event=Told())
    wait_until(lambda: [task for task in own_engine.reader._running.values() if task.worker])
    monkeypatch.setattr(own_engine, "_limit_duration", read_spec)
    begun = time.monotonic()
    answering.cancel()
    wait_until(lambda: not own_engine.num_active)
    assert say(own_engine, query) and time.monotonic() - begun < 300 and own_engine.num_failed == 0


def test_closing_a_stream_cancels_its_request(engine, videos):
    dropped = engine.num_cancelled
    with closing(engine.stream(CaptionRequest(videos[0], sampling=SHORT))) as pieces:
        next(pieces)
    assert engine.num_cancelled == dropped + 1


def test_a_failing_model_is_reported_and_may_recover(engine, model, videos, caplog):
    model.fail = lambda size: IndexError("out of range")
    with pytest.raises(ModelFailedError, match=r"^the model failed \(IndexError\); see the server's log$"):
        say(engine, CaptionRequest(videos[0], sampling=SHORT))
    assert engine.failure == "IndexError"
    assert "Traceback" in caplog.text and "out of range" in caplog.text
    model.fail = lambda size: None
    assert say(engine, CaptionRequest(videos[0], sampling=SHORT)) and engine.failure is None


def test_out_of_memory_is_retried_one_by_one(engine, model, videos):
    model.fail = lambda size: torch.OutOfMemoryError("CUDA out of memory") if size > 1 else None
    told = Told()
    engine.submit(CaptionRequest(videos[0], sampling=FREE, seed=5, num_samples=3), on_event=told)
    wait_until(lambda: not engine.num_active)
    assert model.batches == [3, 1, 1, 1]
    wait_until(lambda: len(told.texts()) == 3)
    assert told.texts()[2] == model.caption(videos[0], sampling=FREE, seed=7).text
    model.fail = lambda size: torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="does not fit into GPU memory") as caught:
        say(engine, CaptionRequest(videos[0]))
    assert "CUDA" not in str(caught.value)


def test_memory_is_freed_before_the_retry(engine, model, videos):
    """The traceback of the error holds tensors."""
    kept: list[bool] = []
    held: weakref.ref[Sampling]

    def fail(size):
        nonlocal held
        if size == 1:
            kept.append(held() is not None)
            return None
        tensors = Sampling()  # stands for them
        held = weakref.ref(tensors)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.fail = fail
    told = Told()
    engine.submit(CaptionRequest(videos[0], sampling=FREE, num_samples=2), on_event=told)
    wait_until(lambda: len(told.texts()) == 2)
    assert kept and not any(kept)


def test_out_of_memory_after_delivery_is_a_retryable_error(engine, model, videos):
    """The clip is not to blame, and delivered text cannot be taken back."""
    told = Told()
    answering = engine.submit(CaptionRequest(videos[0], sampling=FREE, num_samples=2), on_event=told)
    steps = iter([None, None, None])
    model.fail = lambda size: next(steps, torch.OutOfMemoryError("CUDA out of memory"))
    wait_until(lambda: told and isinstance(told[-1][1], Exception))
    assert isinstance(told[-1][1], OutOfMemoryDuringBatch) and "the GPU ran out of memory" in str(told[-1][1])
    assert model.batches == [2] and answering.num_completion_tokens == 6
    refusal = to_api_error(told[-1][1], seconds=1)
    assert refusal.status == 503 and refusal.may_retry


def test_preparation_errors_reveal_no_details(engine, model, videos, monkeypatch, caplog):
    def fail(clip):
        raise RuntimeError("a secret of this machine")

    monkeypatch.setattr(model.processor, "clip_inputs", fail)
    with pytest.raises(
        ModelFailedError, match=r"^the file could not be prepared \(RuntimeError\); see the server's log"
    ):
        say(engine, CaptionRequest(videos[0]))
    assert "a secret of this machine" in caplog.text


def test_submit_does_not_hold_the_lock_while_it_calls_the_reader(own_engine, videos, monkeypatch):
    """It would deadlock if another engine closed the shared reader, which calls back."""
    submit = own_engine.reader.submit

    def submit_(*asked):
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(own_engine.num_active), daemon=True)
        other.start()
        other.join(5)
        assert seen == [1]
        return submit(*asked)

    monkeypatch.setattr(own_engine.reader, "submit", submit_)
    assert say(own_engine, CaptionRequest(videos[0], sampling=SHORT))


def test_a_reader_closed_by_another_engine(own_engine, videos):
    own_engine.reader.close()
    with pytest.raises(Overloaded, match="shutting down"):
        own_engine.submit(CaptionRequest(videos[0]), on_event=Told())
    assert not own_engine.num_active


@pytest.fixture
def short_engine(model):
    """An engine that takes 2 s."""
    with ClipReader(workers=1) as reader:
        engine = Engine(model, reader, max_seconds=2)
        yield engine
        engine.close(grace_seconds=1)


def test_long_clips_are_rejected(short_engine, model, videos):
    """The clips are longer than 4 s."""
    for span in (Span(), Span(None, 80.0), Span(1.0, None), Span(1.0, 3.5)):
        with pytest.raises(ClipError, match=r"and the maximum is 2 s: choose a part of it with start and"):
            say(short_engine, CaptionRequest(videos[0], span=span))
    with pytest.raises(ClipError, match=f"has {declared_seconds(videos[0]):.0f} s or more"):  # it is not read at all
        say(short_engine, CaptionRequest(videos[0]))
    query = CaptionRequest(videos[0], span=Span(1.0, 3.0), sampling=SHORT)
    assert say(short_engine, query) == model.caption(videos[0], span=Span(1.0, 3.0), sampling=SHORT).text


def test_long_clips_of_undeclared_length_are_rejected(short_engine, videos, tmp_path):
    """The file of a live stream states no length."""
    live = tmp_path / "live.mkv"
    with av.open(str(videos[0])) as source, av.open(str(live), "w", options={"live": "1"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    assert declared_seconds(live) == 0
    with pytest.raises(ClipError, match=r"has 3 s or more"):  # a second more than is allowed is read
        say(short_engine, CaptionRequest(live))
    assert say(short_engine, CaptionRequest(live, span=Span(1.0, 3.0), sampling=SHORT))


def test_playlists_are_rejected(engine, videos, tmp_path):
    """They may refer to files that a client must not see."""
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{videos[0]}\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat").write_text("ffconcat version 1.0\nfile near.mp4\n")
    (tmp_path / "near.mp4").symlink_to(videos[0])
    for name in ("list.m3u8", "concat"):
        with pytest.raises(ClipError, match="is a playlist"):
            say(engine, CaptionRequest(tmp_path / name))


def begin_three(engine, model, videos):
    """One has the model, whose gate is closed; the others wait or are being read."""
    model.gate.clear()
    told = [Told() for _ in range(3)]
    engine.submit(CaptionRequest(videos[0], sampling=SHORT), on_event=told[0])
    wait_until(lambda: model.batches == [1])
    for video, listener in zip(videos[1:3], told[1:], strict=True):
        engine.submit(CaptionRequest(video, sampling=SHORT), on_event=listener)
    return told


def test_closing_finishes_active_requests(own_engine, model, videos):
    """One is decoding, one is queued and one is being read."""
    told = begin_three(own_engine, model, videos)
    closer = threading.Thread(target=own_engine.close, kwargs={"grace_seconds": 20})
    closer.start()
    with pytest.raises(Overloaded, match="shutting down"):
        wait_until(lambda: own_engine.submit(CaptionRequest(videos[0]), on_event=Told()) and False)
    model.gate.set()
    closer.join(120)
    assert not closer.is_alive()
    for video, listener in zip(videos, told, strict=False):
        assert listener.texts() == {0: model.caption(video, sampling=SHORT).text}


def test_closing_waits_for_reading(own_engine, model, videos):
    told = [Told() for _ in videos]
    for video, listener in zip(videos, told, strict=True):
        own_engine.submit(CaptionRequest(video, sampling=SHORT), on_event=listener)
    own_engine.close(grace_seconds=20)
    for video, listener in zip(videos, told, strict=True):
        assert listener.texts() == {0: model.caption(video, sampling=SHORT).text}


def test_closing_without_grace_fails_active_requests(own_engine, model, videos, monkeypatch):
    """It waits for the current step of the model, and not for the time limit of that step."""
    monkeypatch.setattr("salmonn.caption.engine._ABORT_SECONDS", 600.0)
    told = begin_three(own_engine, model, videos)
    closer = threading.Thread(target=own_engine.close, kwargs={"grace_seconds": 0})
    closer.start()
    wait_until(own_engine._is_aborted.is_set)
    model.gate.set()  # the step that the model is at comes to its end
    closer.join(120)
    assert not closer.is_alive()
    assert not own_engine.num_active
    for listener in told:
        wait_until(lambda listener=listener: listener)
        assert isinstance(listener[-1][1], Overloaded)
