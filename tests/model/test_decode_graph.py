"""Recorded decode steps equal those that are run."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from salmonn.caption.generate import DecodeBatch
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow
from salmonn.model import decode_graph, kv_cache, kv_tables, transfer
from salmonn.model.decode_graph import CudaGraphRecorder, GraphDecoder
from salmonn.model.kv_cache import KVCache
from tests.replay import record

HOT = Sampling(temperature=5.0, max_new_tokens=12)


def generate(captioner, media, *, make_recorder=None, stop_ids=(-1,), joining=((2, 4),), batch=None, sampling=HOT):
    """Generate 4 samples of each of two clips, and of a third from the given step on.

    Returns:
        The tokens, the largest logits of each step, and the decoder.
    """
    rows, found, logits = [PromptRow(0, "Tell."), PromptRow(1, "Say.")], {}, []
    if batch is None:
        batch = start(captioner, make_recorder=make_recorder, stop_ids=stop_ids)
    first_row = batch._num_added
    batch.add(captioner.processor.collate(rows, media[:2]), sampling=sampling, num_samples=4, seeds=[1, 2])
    joining = dict(joining)
    while batch:
        if num_samples := joining.pop(len(logits), 0):
            inputs = captioner.processor.collate(rows[:1], media[2:3])
            batch.add(inputs, sampling=sampling, num_samples=num_samples, seeds=[3])
        for row, token in batch.step().items():
            found.setdefault(row - first_row, []).append(token.id)
        logits.append(max(float(group.logits.max()) for group in batch._groups) if batch else 0.0)
    return found, logits, batch.decoder


def start(captioner, *, make_recorder, stop_ids=(-1,)):
    """Return an empty batch."""
    batch = DecodeBatch(captioner.network, stop_ids=stop_ids, is_ahead=True)
    batch.decoder = GraphDecoder(captioner.network, make_recorder=make_recorder)
    return batch


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE_RECORDING", 1)
    monkeypatch.setattr(kv_cache, "PAGE_LENGTH", 64)
    monkeypatch.setattr(kv_tables, "FIRST_COLUMNS", 2)


def test_replayed_steps_equal_others(captioner, media, monkeypatch):
    """Rows end and others join, for which padding makes room; with the number of their tokens, the shape changes."""
    monkeypatch.setattr(kv_cache, "GROWTH_STATIC", 6)
    plain, *_ = generate(captioner, media, make_recorder=None)
    stop_ids = [plain[0][5], plain[2][6], plain[9][7]]
    expected, expected_logits, decoder = generate(captioner, media, make_recorder=None, stop_ids=stop_ids)
    assert decoder.num_replayed == 0
    replayed, step = [], GraphDecoder.step

    def note(decoder, tokens, cache, **options):
        before = decoder.num_replayed
        logits = step(decoder, tokens, cache, **options)
        assert len(logits) == len(tokens)  # no token is sampled for padding
        if decoder.num_replayed > before:
            replayed.append((cache.shape, len(cache)))
        return logits

    monkeypatch.setattr(GraphDecoder, "step", note)
    found, logits, decoder = generate(captioner, media, make_recorder=lambda: record, stop_ids=stop_ids)
    assert found == expected and logits == pytest.approx(expected_logits, rel=1e-5)
    assert decoder.num_recorded >= 3 and decoder.num_replayed >= 6
    counts = [{count for shape, count in replayed if shape == one} for one, _ in replayed]
    assert max(map(len, counts)) >= 2  # replayed with other rows than those it was recorded with


def test_later_batches_replay_the_steps_of_earlier_ones(captioner, media, monkeypatch):
    """Once there is room for all rows, nothing is recorded again, until a batch has more of them, and longer ones.

    What ran before changes no bit, and neither what a step computes with: on a GPU, that might change bits.
    """
    monkeypatch.setattr(kv_cache, "GROWTH_STATIC", 6)
    batches = [dict(media=media)] * 6
    batches[3] = dict(media=media[1:], joining=((1, 9), (2, 3)), sampling=replace(HOT, max_new_tokens=30))
    count_step, shapes = KVCache.count_step, []

    def note(cache, **options):
        shapes.append((cache.shape, cache.num_columns))
        count_step(cache, **options)

    monkeypatch.setattr(KVCache, "count_step", note)
    expected = [generate(captioner, **one)[0] for one in (batches[0], batches[3])]
    batch, logits, recorded, replayed = start(captioner, make_recorder=lambda: record), [], [], []
    of_batches = []
    for number, one in enumerate(batches):
        batch.decoder.restart()
        shapes.clear()
        tokens, found, decoder = generate(captioner, **one, batch=batch)
        assert tokens == expected[number == 3]
        logits.append(found)
        recorded.append(decoder.num_recorded)
        replayed.append(decoder.num_replayed)
        of_batches.append(list(shapes))
    assert of_batches.count(of_batches[0]) == 5 and len({columns for _, columns in of_batches[0]}) > 1
    assert 2 < recorded[1] == recorded[2] < recorded[3] < recorded[4] == recorded[5]
    assert logits.count(logits[0]) == 5 and replayed[5] - replayed[4] > 3


def test_all_recordings_use_one_stream(monkeypatch):
    """PyTorch hands out 32 streams in turn: with one for each recording, that of the encoders would be used, too."""
    created, used, graphs = [], [], []

    def create(device):
        created.append(device)
        return MagicMock()

    monkeypatch.setattr(torch.cuda, "Stream", create)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(MagicMock()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    transfer.own_stream.cache_clear()
    other, recorder = transfer.own_stream(torch.device("cuda", 0), "encoders"), CudaGraphRecorder()
    results = [recorder(lambda number=number: number)[1] for number in range(40)]
    transfer.own_stream.cache_clear()
    assert results == list(range(40)) and len(created) == 2
    assert {id(one) for one in used} == {id(used[0])} != {id(other)}
    pools = [graph.capture_begin.call_args.kwargs["pool"] for graph in graphs]
    assert pools == [None] + [graphs[0].pool()] * 39


def test_steps_that_cannot_be_recorded(captioner, media, caplog):
    """They are run; the log has one sentence."""

    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    found, *_ = generate(captioner, media, make_recorder=lambda: fail)
    assert {len(tokens) for tokens in found.values()} == {HOT.max_new_tokens}
    assert caplog.text.count("cannot be recorded as a CUDA graph (operation not permitted") == 1


@pytest.mark.parametrize("num_failures", [1, decode_graph.MAX_FAILED])
def test_a_recording_that_runs_out_of_memory(captioner, media, caplog, num_failures):
    """Memory may be short for a moment only, so recording is tried again, but not for ever."""
    attempts = []

    def record_later(run):
        attempts.append(run)
        if len(attempts) <= num_failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(run)

    expected, *_ = generate(captioner, media, make_recorder=None)
    found, _, decoder = generate(captioner, media, make_recorder=lambda: record_later)
    assert found == expected
    if num_failures == 1:
        assert decoder.num_recorded >= 1 and decoder.num_replayed >= 1 and not caplog.text
    else:
        assert len(attempts) == num_failures and not decoder.num_recorded
        assert caplog.text.count("cannot be recorded as a CUDA graph (CUDA out of memory)") == 1
