"""Sampling in batches: equal for any batches, and resumable."""

import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.records import Caption, read_records
from salmonn.train import sampling as train_sampling
from salmonn.train.batches import make_batches
from salmonn.train.data import ClipSet
from salmonn.train.evaluate import cache_features
from salmonn.train.sampling import SampleConfig, sample_captions

SAMPLING = SampleConfig(temperature=1.0, top_p=0.9, max_new_tokens=12, num_samples=2, batch_size=4)
SEED = 7


def test_batches_have_similar_lengths():
    assert make_batches([3, 9, 9, 1, 5], size=2) == [[1], [2, 4], [0, 3]]
    assert make_batches([3, 9], size=0) == [[1], [0]]  # more samples of one clip than the batch size
    assert make_batches([], size=4) == []


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


@pytest.mark.parametrize("temperatures", [(), (1.0, 0.0), (1.0, 0.7, 0.5), (-1.0, 0.7)])
def test_impossible_shares(temperatures):
    with pytest.raises(ValueError, match="temperature"):
        SampleConfig(num_samples=8, temperatures=temperatures)


class Killed(Exception):
    """Raised where the process would be killed."""


@pytest.fixture
def costs(monkeypatch):
    """The costs of the items that were last distributed; all go to this process."""
    last_costs = []

    def balance(item_costs):
        last_costs[:] = item_costs
        return [list(range(len(item_costs)))]

    monkeypatch.setattr(dist, "balance", balance)
    return last_costs


@pytest.fixture
def calls(monkeypatch):
    """Count the generated batches; the process is killed at batch number `fatal`."""
    counts = Counter(answered=0, fatal=1000)
    generate = Captioner.generate

    def generate_counted(*args, **kwargs):
        if counts["answered"] == counts["fatal"]:
            raise Killed
        counts["answered"] += 1
        return generate(*args, **kwargs)

    monkeypatch.setattr(Captioner, "generate", generate_counted)
    return counts


def test_killed_sampling_resumes_from_its_finished_batches(
    captioner, clips, calls, costs, tmp_path, monkeypatch, caplog
):
    (clips,) = cache_features(captioner, clips, name="clips")
    folder = tmp_path / "round_1"
    partial = folder / "captions.parts"

    def sample(**options) -> list[Caption]:
        return sample_captions(captioner, clips, SAMPLING, name="sampling", **{"seed": SEED} | options)

    expected = sample()
    assert calls["answered"] == 3  # 5 clips with 2 captions each, in batches of 4
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
    # Finished batches have no cost; the last one has the two shortest clips, two captions of 12 tokens of each.
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
        patch.setattr(train_sampling, "_batch_size", lambda *_: 2)  # less memory is free: the batches stay the same
        assert sample(folder=folder) == expected and calls["answered"] == 1
    assert [path.name for path in folder.iterdir()] == ["captions.jsonl"]

    (folder / "captions.jsonl").unlink()
    shutil.copytree(saved, partial)  # batches with another seed are sampled again
    other = sample(folder=folder, seed=8)
    assert other != expected and calls["answered"] == 4
    assert "sampling again" in caplog.text
    shutil.copytree(saved, partial)  # killed just after the complete file was written
    assert sample(folder=folder, seed=8) == other and calls["answered"] == 4 and not partial.exists()


def test_batches_have_different_seeds(captioner, clips):
    """The same clip several times: with equal seeds, two batches would have equal captions."""
    (clips,) = cache_features(captioner, clips.head(1), name="clips")
    (features,) = clips.features.values()
    references = [replace(clips.references[0], video=f"{number}.mp4") for number in range(3)]
    copies = replace(
        clips, references=references, features={clips.source(reference): features for reference in references}
    )
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


def test_the_batch_fits_the_free_memory_of_a_gpu(captioner, monkeypatch):
    """The longest clip and its prompt are 1,512 tokens, a caption 100; PyTorch has reserved some for reuse."""
    config = SampleConfig(num_samples=4, batch_size=64, max_new_tokens=100)
    assert train_sampling._batch_size(captioner, [1000, 10], config) == 64  # no limit on a CPU
    network = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, lm=captioner.network.lm)
    text = captioner.network.lm.config.get_text_config()
    token = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    needed = (16 * 1512 + 64 * 100) * token / 0.6
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: needed / 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: needed / 4)
    for free, expected in ((0.76, 64), (0.74, 32)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * needed, 0))
        assert train_sampling._batch_size(SimpleNamespace(network=network), [1000, 10], config) == expected
