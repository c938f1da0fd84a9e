"""Sampling in batches: equal for any batches, and resumable."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CachedGenerator
from salmonn.caption.limits import BatchLimits
from salmonn.caption.scheduler import Scheduler
from salmonn.files import read_records
from salmonn.model import decode_graph
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.records import Caption
from salmonn.train import sampling as train_sampling
from salmonn.train.batches import make_batches, make_parts
from salmonn.train.data import ClipSet
from salmonn.train.encoding import cache_features
from salmonn.train.sampling import SampleConfig, sample_captions
from tests.replay import record

SAMPLING = SampleConfig(temperature=1.0, top_p=0.9, max_new_tokens=12, num_samples=2, batch_size=4)
SEED = 7


def test_batches_have_similar_lengths():
    assert make_batches([3, 9, 9, 1, 5], size=2) == [[1], [2, 4], [0, 3]]
    assert make_batches([3, 9], size=0) == [[1], [0]]  # more samples of one clip than the batch size
    assert make_batches([], size=4) == []


@pytest.mark.parametrize(
    ("num_items", "size", "num_parts", "largest"),
    [(10_000, 8, 160, 63), (320, 8, 8, 40), (248, 8, 31, 8), (3, 0, 3, 1)],
)
def test_parts_divide_evenly(num_items, size, num_parts, largest):
    """A multiple of 8 parts of 4 to 8 batches, with long and short items in each, or else single batches."""
    parts = make_parts(list(range(num_items)), size=size)
    assert sorted(index for part in parts for index in part) == list(range(num_items))
    assert len(parts) == num_parts and max(map(len, parts)) == largest
    if largest > size > 0:
        sums = [sum(part) for part in parts]
        assert max(sums) - min(sums) <= num_items and all(part == sorted(part, reverse=True) for part in parts)


def test_shares_of_samples_have_their_own_temperature(captioner, clips):
    """Half of the samples equal those at the first temperature alone; the other half is drawn at the second one."""
    (clips,) = cache_features(captioner, ClipSet(clips.references[:2], clips.root), name="clips")

    def texts(**changes):
        sampling = replace(SAMPLING, num_samples=4, **changes)
        captions = sample_captions(captioner, clips, sampling, name="test", seed=SEED)
        assert [one.sample for one in captions] == [0, 1, 2, 3] * 2
        return [[one.text for one in captions[start : start + 4]] for start in (0, 4)]

    hot = texts()
    mixed = texts(temperatures=(1.0, 0.01))
    for own, half in zip(hot, mixed, strict=True):
        assert half[:2] == own[:2] and half[2] == half[3] != half[0]  # at 0.01 both are the most likely caption
    assert SampleConfig(temperatures=(1.0, 0.7)).greedy() == SampleConfig(temperature=0.0, num_samples=1)


def test_parts_do_not_depend_on_those_before(captioner, clips, monkeypatch):
    """To the last bit: a GPU replays decode steps that were recorded in earlier parts, with other numbers of rows."""
    monkeypatch.setattr(decode_graph, "is_on_one_gpu", lambda _: True)
    monkeypatch.setattr(decode_graph, "CudaGraphRecorder", lambda: record)
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE_RECORDING", 2)
    (clips,) = cache_features(captioner, clips, name="clips")
    config, parts = replace(SAMPLING, logprobs=0), ([3], [0, 1, 2], [4])

    def make() -> CachedGenerator:
        return train_sampling._make_generator(captioner, clips, limits=BatchLimits(6))

    def sample(generator, part) -> list[Caption]:
        return train_sampling._sample_part(generator, clips, part, config, seed=SEED)

    expected = [sample(make(), part) for part in parts]
    for order in ((0, 1, 2), (1, 2, 0)):
        generator = make()
        for number in order:
            assert sample(generator, parts[number]) == expected[number]
        decoder = generator._scheduler._batch._batch.decoder
        assert decoder.num_replayed > decoder.num_recorded > 0
        count = decoder.num_recorded
        assert sample(generator, parts[order[-1]]) == expected[order[-1]] and decoder.num_recorded == count


@pytest.mark.parametrize("temperatures", [(), (1.0, 0.0), (1.0, 0.7, 0.5), (-1.0, 0.7)])
def test_impossible_shares(temperatures):
    with pytest.raises(ValueError, match="temperature"):
        SampleConfig(num_samples=8, temperatures=temperatures)


class Killed(Exception):
    """Raised where the process would be killed."""


@pytest.fixture
def calls(monkeypatch):
    """Count the generated parts; the process is killed at part number `fatal`."""
    counts = Counter(answered=0, fatal=1000)
    generate = Captioner.generate

    def generate_counted(*args, **kwargs):
        if counts["answered"] == counts["fatal"]:
            raise Killed
        counts["answered"] += 1
        return generate(*args, **kwargs)

    monkeypatch.setattr(Captioner, "generate", generate_counted)
    return counts


def test_killed_sampling_resumes_from_its_finished_parts(captioner, clips, calls, costs, tmp_path, monkeypatch, caplog):
    (clips,) = cache_features(captioner, clips, name="clips")
    folder = tmp_path / "round_1"
    partial = folder / "captions.parts"

    def sample(**options) -> list[Caption]:
        return sample_captions(captioner, clips, SAMPLING, name="sampling", **{"seed": SEED} | options)

    expected = sample()
    assert calls["answered"] == 3  # 5 clips with 2 captions each, in parts of 4
    calls["fatal"] = 5
    with pytest.raises(Killed):
        sample(folder=folder)
    assert sorted(path.name for path in partial.iterdir()) == ["part_00000.jsonl", "part_00001.jsonl", "parts.json"]
    calls.update(answered=-5, fatal=1000)

    def raise_killed(path, records):
        raise Killed

    with monkeypatch.context() as patch:  # killed before the complete file is written
        patch.setattr("salmonn.train.run_folder.write_records", raise_killed)
        with pytest.raises(Killed):
            sample(folder=folder)
    assert calls["answered"] == 1
    # Finished parts have no cost; the last one has the two shortest clips, two captions of 12 tokens of each.
    lengths = sorted(len(features) for features in clips.features.values())
    assert costs == [0, 0, sum(lengths[:2]) + 2 * 24]
    paths = [partial / f"part_{number:05d}.jsonl" for number in range(3)]
    assert (
        sorted((caption for path in paths for caption in read_records(path, Caption)), key=expected.index) == expected
    )
    assert not caplog.records
    saved = tmp_path / "saved"
    shutil.copytree(partial, saved)
    with monkeypatch.context() as patch:
        # Less memory is free: the parts stay the same.
        patch.setattr(train_sampling, "_limits", lambda *_: BatchLimits(2, 1000))
        assert sample(folder=folder) == expected and calls["answered"] == 1
    assert [path.name for path in folder.iterdir()] == ["captions.jsonl"]

    (folder / "captions.jsonl").unlink()
    shutil.copytree(saved, partial)  # batches with another seed are sampled again
    other = sample(folder=folder, seed=8)
    assert other != expected and calls["answered"] == 4
    assert "sampling again" in caplog.text
    shutil.copytree(saved, partial)  # killed just after the complete file was written
    assert sample(folder=folder, seed=8) == other and calls["answered"] == 4 and not partial.exists()


def copy_clip(captioner, clips, *, number) -> ClipSet:
    """Return a set of the same clip a number of times."""
    (clips,) = cache_features(captioner, clips.head(1), name="clips")
    (features,) = clips.features.values()
    references = [replace(clips.references[0], video=f"{index}.mp4") for index in range(number)]
    return replace(
        clips, references=references, features={clips.source(reference): replace(features) for reference in references}
    )


def test_parts_in_any_order_and_after_a_kill(captioner, clips, calls, tmp_path, monkeypatch):
    """32 batches of 2 clips are 8 parts, in which others join: each is the same whatever was sampled before."""
    sampling = replace(SAMPLING, num_samples=1, batch_size=2)
    copies, prefills = copy_clip(captioner, clips, number=64), []
    prefill = Scheduler.prefill
    monkeypatch.setattr(Scheduler, "prefill", lambda self, admitted: prefills.append(1) or prefill(self, admitted))
    monkeypatch.setattr(captioner.processor, "stop_ids", list(range(1, 400, 5)))  # so that lengths differ

    def sample(folder: Path) -> bytes:
        sample_captions(captioner, copies, sampling, name="sampling", seed=SEED, folder=folder)
        return (folder / "captions.jsonl").read_bytes()

    expected = sample(tmp_path / "one")
    assert calls["answered"] == 8 and len(prefills) > 8 * 4
    calls["fatal"] = 11
    with pytest.raises(Killed):
        sample(tmp_path / "killed")
    calls["fatal"] = 1000
    with monkeypatch.context() as patch:
        patch.setattr(dist, "balance", lambda costs: [list(range(len(costs)))[::-1]])
        assert sample(tmp_path / "killed") == expected and calls["answered"] == 8 + 8


def test_batches_have_different_seeds(captioner, clips):
    """The same clip several times: with equal seeds, two batches would have equal captions."""
    copies = copy_clip(captioner, clips, number=3)
    captions = sample_captions(captioner, copies, replace(SAMPLING, batch_size=2), name="sampling", seed=SEED)
    texts = [caption.text for caption in captions]
    assert len({tuple(texts[:2]), tuple(texts[2:4]), tuple(texts[4:])}) == 3


@torch.no_grad()
def test_captions_of_clips(captioner, clips, media):
    (clips,) = cache_features(captioner, clips, name="clips")
    for reference, expected in zip(clips.references, captioner.encode(media), strict=True):
        assert torch.allclose(clips.features_of(reference).tokens, expected.tokens, atol=1e-5)
    config = replace(SAMPLING, max_new_tokens=6)
    captions = sample_captions(captioner, clips, config, name="sampling", seed=1)
    assert [(caption.video, caption.sample) for caption in captions] == [
        (reference.video, sample) for reference in clips.references for sample in (0, 1)
    ]
    assert {caption.prompt for caption in captions} == {PLAIN_PROMPTS["both"]}
    assert {caption.model for caption in captions} == {captioner.name}
    assert not any(
        caption.finished and len(captioner.processor.tokenizer.encode(caption.text)) > 6 for caption in captions
    )
