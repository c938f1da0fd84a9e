"""Both sides give the same captions, with the expected number of tokens, and differing ones are detected."""

import json
import sys
from dataclasses import replace

import pytest

from tests.tools.benches import load


@pytest.fixture(scope="module")
def sampling():
    return load("sampling")


@pytest.fixture(scope="module")
def small(sampling):
    """The smallest sizes of the first family."""
    return sampling.BenchConfig(shape="small", repeats=1)


@pytest.fixture(scope="module")
def bench(sampling, small):
    return sampling.SamplingBench(small)


@pytest.mark.parametrize("family", ["salmonn2", "salmonn2-plus"])
def test_greedy_answers_are_the_same(sampling, small, family):
    sampling.check(sampling.SamplingBench(replace(small, family=family)), exact=True)


def test_number_and_length_of_the_answers(sampling, bench):
    for side in (bench.ours, bench.other):
        answers = side(num_clips=2)
        assert [len(ids) for ids in answers] == [5] * 8  # 4 answers for each of 2 clips, of 5 tokens
        assert len({tuple(ids) for ids in answers}) > 4  # sampled, so not all are equal
        assert all(7 <= token < 512 for ids in answers for token in ids)  # text tokens follow 7 special tokens


def test_differing_answers_are_detected(sampling, bench, monkeypatch):
    right = bench.ours(num_clips=2, num_samples=1, temperature=0)
    wrong = [right[0], [*right[1][:-1], 7]]
    monkeypatch.setattr(bench, "other", lambda **_: wrong)
    with pytest.raises(ValueError, match="greedy answers differ"):
        sampling.check(bench, exact=True)
    short = [right[0], right[1][:-1]]
    monkeypatch.setattr(bench, "other", lambda **_: short)
    with pytest.raises(ValueError, match=r"ended early, after \[4, 5"):
        sampling.check(bench, exact=False)


def test_the_naive_side_encodes_the_clip_for_each_answer(bench):
    calls = {"vision": 0, "prefixes": 0}
    network = bench.captioner.network

    def count_vision(*_):
        calls["vision"] += 1

    def count_prefixes(module, args, kwargs, output):
        calls["prefixes"] += kwargs["inputs_embeds"].shape[1] > 100 if kwargs.get("inputs_embeds") is not None else 0

    handles = [
        network.vision.register_forward_hook(count_vision),
        network.lm.get_decoder().register_forward_hook(count_prefixes, with_kwargs=True),
    ]
    bench.other(num_clips=1)
    for handle in handles:
        handle.remove()
    assert calls == {"vision": 4, "prefixes": 4}


def test_rows(sampling, monkeypatch, tmp_path):
    measured = []

    def run_isolated(script, *, shape, memory_of, num_clips, **others):
        measured.append((shape, memory_of, num_clips))
        return {"step_mib": 10 if memory_of == "ours" else 30}

    monkeypatch.setattr(sampling, "run_isolated", run_isolated)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--quick", f"--out={out}"])
    sampling.main()
    one, several = json.loads(out.read_text())
    assert one["name"] == "4 captions of one clip" and several["name"] == "4 captions of each of 2 clips"
    assert (one["ours_mib"], one["other_mib"]) == (10, 30)
    assert measured == [("small", side, count) for count in (1, 2) for side in ("ours", "other")]
    assert one["note"] == "against 4 generate() calls" and several["note"] == "against 8 generate() calls"
    # Rounded to 4 digits; there are two clips.
    assert several["ours_seconds_per_clip"] == pytest.approx(several["ours_seconds"] / 2, abs=1e-3)
