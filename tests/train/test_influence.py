"""Influence of drafts on a student: the inner product of two gradients, and what is chosen by it."""

from dataclasses import replace

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.model import network as network_module
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.preference.rating import Rating
from salmonn.records import Caption
from salmonn.train.influence import (
    INFLUENCE_NAME,
    best_captions,
    compute_influences,
    rate_by_influence,
    shuffle_ratings,
    split_clips,
)
from salmonn.train.parallel import trainable_parameters


@pytest.fixture
def student(captioner):
    attach_lora(captioner.network, LoraConfig(rank=2, dropout=0.5), seed=0)
    return captioner


@pytest.fixture
def encoded(student, media, clips):
    features = dict(zip(map(clips.source, clips.references), student.encode(media), strict=False))
    references = [one for one in clips.references if clips.source(one) in features]
    return replace(clips, references=references, features=features)


@pytest.fixture
def drafts(encoded):
    videos = [reference.video for reference in encoded.references[:2]]
    texts = [("a red star appears", videos[0]), ("a tone", videos[0]), ("a low tone is heard", videos[1])]
    return [Caption(video, text, sample=number) for number, (text, video) in enumerate(texts)]


def gradient(student, clips, text_of):
    """Gradient of the mean cross-entropy over the tokens of texts about clips, as one vector."""
    student.network.zero_grad()
    rows = [PromptRow(index, student.default_prompt(), text) for index, text in enumerate(text_of.values())]
    inputs = student.processor.collate(rows, [clips.features_of(clips.by_video[video]) for video in text_of])
    (-student.network(inputs).sum() / (inputs.labels[:, 1:] != -100).sum()).backward()
    return torch.cat([one.grad.flatten().double() for _, one in trainable_parameters(student.network)])


def test_influence_is_the_inner_product_of_gradients(student, encoded, drafts, monkeypatch):
    drafts.append(replace(drafts[0], text="", sample=3, finished=False))  # cut off before its first word
    *others, preferred = encoded.references
    preference = replace(encoded, references=[preferred, others[-1]])
    student.network.eval()
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    wanted = gradient(student, encoded, {one.video: one.caption for one in preference.references})
    expected = [float(wanted @ gradient(student, encoded, {draft.video: draft.text})) for draft in drafts[:3]] + [0.0]
    student.network.train()  # its dropout must not count
    calls, checkpoint = [], network_module.checkpoint
    monkeypatch.setattr(
        network_module, "checkpoint", lambda *args, **options: calls.append(1) or checkpoint(*args, **options)
    )
    student.network.checkpoint_layers(True)
    computed = compute_influences(drafts, encoded, preference, student, batch_size=1)
    assert [(one.video, one.sample) for one in computed] == [(draft.video, draft.sample) for draft in drafts]
    # Curvature and rounding are up to two percent of the largest.
    assert [one.value for one in computed] == pytest.approx(expected, abs=2e-2 * max(map(abs, expected)))
    assert calls and not student.network.training
    assert len({round(value, 6) for value in expected}) == 4 and computed[3].value == 0
    after = student.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_ratings_are_standardized_and_kept(student, encoded, drafts, tmp_path, monkeypatch):
    options = {"batch_size": 2, "folder": tmp_path}
    rated = rate_by_influence(drafts, encoded, encoded, student, **options)
    values = torch.tensor([one.value for one in rated])
    assert values.mean().item() == pytest.approx(0, abs=1e-6) and values.std(correction=0).item() == pytest.approx(1)
    assert len((tmp_path / INFLUENCE_NAME).read_text().splitlines()) == 3
    assert rate_by_influence(drafts, encoded, encoded, None, **options) == rated  # no student is asked again


def test_best_captions():
    drafts = [Caption(video, f"{video}{sample}", sample=sample) for video in "ab" for sample in range(3)]
    ratings = [
        Rating(draft.video, {"influence": value}, {"influence": 1.0}, draft.sample)
        for draft, value in zip(drafts, (0.1, 0.3, 0.2, 0.5, 0.4, 0.5), strict=True)
    ]
    assert [one.text for one in best_captions(drafts, ratings)] == ["a1", "b0"]
    # A draft that was cut off, or is empty, is only learned where there is no other.
    drafts[1], drafts[4] = replace(drafts[1], finished=False), replace(drafts[4], text=" ")
    drafts[3], drafts[5] = replace(drafts[3], finished=False), replace(drafts[5], text="", finished=False)
    assert [one.text for one in best_captions(drafts, ratings)] == ["a2", "b0"]
    for seed in range(9):
        shuffled = shuffle_ratings(ratings, seed=seed)
        assert [(one.video, one.sample) for one in shuffled] == [(one.video, one.sample) for one in ratings]
        for part in (slice(0, 3), slice(3, 6)):  # of a clip
            assert sorted(one.value for one in shuffled[part]) == sorted(one.value for one in ratings[part])
        assert shuffled == shuffle_ratings(ratings, seed=seed)
    assert len({tuple(one.value for one in shuffle_ratings(ratings, seed=seed)) for seed in range(9)}) > 1


def test_preference_clips_are_not_learned_from(clips):
    preference, others = split_clips(clips, 0.4, seed=0)
    assert len(preference.references) == 2 and len(others.references) == 3
    assert {one.video for one in clips.references} == {
        one.video for one in (*preference.references, *others.references)
    }
    splits = [split_clips(clips, 0.4, seed=seed)[0].references for seed in range(9)]
    assert any(one != preference.references for one in splits) and splits[0] == preference.references
    with pytest.raises(ValueError, match=r"rebirth.preference_fraction 0.05 of 5 clips leaves 0"):
        split_clips(clips, 0.05, seed=0)
