"""Recorded decode steps equal those that are run, on a CPU: operators are recorded with the tensors they change."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from salmonn.caption.generate import DecodeBatch
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow
from salmonn.model import decode_graph, kv_cache
from salmonn.model.decode_graph import GraphDecoder

HOT = Sampling(temperature=5.0, max_new_tokens=12)


class Tape(TorchDispatchMode):
    """Records operators with their arguments, whatever the host computed for them, and can run them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and record it."""
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self, wanted: torch.Tensor) -> torch.Tensor:
        """Run all operators again; tensors that they did not make are those of the recording."""
        made: dict[int, Any] = {}
        renew = partial(tree_map, lambda one: made.get(id(one), one))
        for func, args, kwargs, result in self.calls:
            again = func(*renew(args), **renew(kwargs))
            made |= {id(old): new for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True)}
        return made[id(wanted)]


def record(run):
    """Record a step as a CUDA graph does; the step is run meanwhile, so that it is undone."""
    cache = run.__closure__[0].cell_contents
    counters = (cache._columns, cache._positions)
    before = [one.clone() for one in counters]
    with Tape() as tape:
        recorded = run()
    for counter, old in zip(counters, before, strict=True):
        counter.copy_(old)
    result = recorded.clone()
    return lambda: result.copy_(tape.replay(recorded)), result


def generate(captioner, media, *, make_recorder, stop_ids=(-1,), joining=((2, 4),)):
    """Generate 4 samples of each of two clips, and of a third from the given step on.

    Returns:
        The tokens, the largest logits of each step, and the decoder.
    """
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Say.")]
    batch, found, logits = DecodeBatch(captioner.network, stop_ids=stop_ids, is_ahead=True), {}, []
    batch.decoder = GraphDecoder(captioner.network, make_recorder=make_recorder)
    batch.add(captioner.processor.collate(rows, media[:2]), sampling=HOT, num_samples=4, seeds=[1, 2])
    joining = dict(joining)
    while batch:
        if num_samples := joining.pop(len(logits), 0):
            inputs = captioner.processor.collate(rows[:1], media[2:3])
            batch.add(inputs, sampling=HOT, num_samples=num_samples, seeds=[3])
        for row, token in batch.step().items():
            found.setdefault(row, []).append(token.id)
        logits.append(max(float(group.logits.max()) for group in batch._groups) if batch else 0.0)
    return found, logits, batch.decoder


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE_RECORDING", 1)
    monkeypatch.setattr(kv_cache, "PAGE_LENGTH", 64)


def test_replayed_steps_equal_others(captioner, media, monkeypatch):
    """Rows end and others join, for which padding makes room, until the cache grows and its tensors are replaced."""
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
