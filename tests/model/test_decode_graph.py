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


class Recorder:
    """Records steps as a CUDA graph does.

    Attributes:
        num_recorded, num_replayed: numbers of steps.
    """

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, run):
        """Record; the step is run meanwhile, so that it is undone."""
        cache = run.__closure__[0].cell_contents
        counters = (cache._columns, cache._positions)
        before = [one.clone() for one in counters]
        with Tape() as tape:
            recorded = run()
        for counter, old in zip(counters, before, strict=True):
            counter.copy_(old)
        self.num_recorded += 1
        result = recorded.clone()

        def replay() -> None:
            self.num_replayed += 1
            result.copy_(tape.replay(recorded))

        return replay, result


def generate(captioner, media, *, record, is_static=True, stop_ids=(-1,)):
    """Generate for two clips, and from the fourth step on for a third; returns the tokens, and the largest logits."""
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Say.")]
    batch, found, logits = DecodeBatch(captioner.network, stop_ids=stop_ids, is_ahead=True), {}, []
    batch.decoder = GraphDecoder(captioner.network, record=record)
    batch.add(captioner.processor.collate(rows, media[:2]), sampling=HOT, num_samples=4, seeds=[1, 2])
    batch._cache.is_static = is_static
    while batch:
        if len(logits) == 3:
            inputs = captioner.processor.collate(rows[:1], media[2:3])
            batch.add(inputs, sampling=HOT, num_samples=2, seeds=[3])
        for row, token in batch.step().items():
            found.setdefault(row, []).append(token.id)
        logits.append(max(float(group.logits.max()) for group in batch._groups) if batch else 0.0)
    return found, logits


def test_replayed_steps_equal_others(captioner, media, monkeypatch):
    """Rows join and are evicted, and the cache grows: each time another step is recorded."""
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE_RECORDING", 1)
    monkeypatch.setattr(kv_cache, "GROWTH_STATIC", 5)
    monkeypatch.setattr(kv_cache, "PAGE_LENGTH", 64)
    plain, _ = generate(captioner, media, record=None, is_static=False)
    stop_ids = [plain[0][5], plain[2][6], plain[9][7]]
    expected, expected_logits = generate(captioner, media, record=None, is_static=False, stop_ids=stop_ids)
    recorder = Recorder()
    found, logits = generate(captioner, media, record=recorder, stop_ids=stop_ids)
    assert found == expected and logits == pytest.approx(expected_logits, rel=1e-5)
    assert recorder.num_recorded >= 3 and recorder.num_replayed >= 6


def test_steps_that_cannot_be_recorded(captioner, media, monkeypatch, caplog):
    """They are run; the log has one sentence."""
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE_RECORDING", 1)

    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    found, _ = generate(captioner, media, record=fail)
    assert {len(tokens) for tokens in found.values()} == {HOT.max_new_tokens}
    assert caplog.text.count("cannot be recorded as a CUDA graph (operation not permitted") == 1
