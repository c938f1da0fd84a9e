"""Reward models: loss and fits by hand, folders, and ratings that swapping, batching and packing do not change."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.files import read_json, write_json
from salmonn.model.fingerprint import hash_model
from salmonn.model.lora import LoraConfig, attach_lora, save_adapter
from salmonn.model.pooling import AnswerStates
from salmonn.preference.heads import ScalarHead, fit_scalar_head, fit_temperature
from salmonn.preference.losses import bradley_terry_loss
from salmonn.preference.reward_model import (
    ModelReward,
    RewardInfo,
    RewardModel,
    hash_reward_model,
    head_width,
    save_reward_model,
)
from salmonn.records import Caption, Reference
from salmonn.score.judge import ScoringTask

ROWS = [PromptRow(0, "Tell.", text) for text in ("A red circle blinks.", "A low tone.", "A star leaves.")]


def test_bradley_terry_by_hand():
    # r+ - r- = 2: log(1 + e^-2) = 0.1269280; (0.5 - 1.5)^2 = 1, times 0.01
    output = bradley_terry_loss(torch.tensor([0.5, 0.0]), torch.tensor([-1.5, 0.0]))
    assert output.loss.tolist() == pytest.approx([0.1269280 + 0.01, math.log(2)], abs=1e-6)
    assert output.parts["margin"].tolist() == [2.0, 0.0] and output.parts["accuracy"].tolist() == [1.0, 0.0]
    assert bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0]), center_weight=0).loss.item() == pytest.approx(
        0.3132617
    )


def test_the_fit_of_a_head_solves_its_equation():
    """States -1 and 1 have a standard deviation of sqrt(2), so standardized the pair differs by sqrt(2).

    Without centring the optimum w fulfils sqrt(2) * sigmoid(-sqrt(2) w) = 2 * l2 * w.
    """
    states = torch.tensor([[1.0, 5.0], [-1.0, 5.0]])  # the second figure is constant
    fitted = fit_scalar_head(states, [(0, 1)], torch.ones(1), l2=0.1, center_weight=0.0)
    weight = fitted[0].item() * math.sqrt(2)
    assert math.sqrt(2) / (1 + math.exp(math.sqrt(2) * weight)) == pytest.approx(0.2 * weight, abs=1e-6)
    assert fitted[1].item() == 0


def test_temperature_by_hand():
    """Three of four equal margins are right: sigmoid(2 / T) = 3 / 4, so T = 2 / log 3."""
    margins = torch.tensor([2.0, 2.0, 2.0, -2.0])
    assert fit_temperature(margins) == pytest.approx(2 / math.log(3), rel=0.01)
    # Whatever the unit: margins of 2000 have T = 2000 / log 3, far above 20.
    assert fit_temperature(1000 * margins) == pytest.approx(2000 / math.log(3), rel=0.01)
    assert fit_temperature(torch.zeros(3)) == 1


@pytest.fixture
def make_model(captioner):
    """Make a reward model with a random head on the random captioner."""

    def make(kind="bradley-terry", pooling="rich") -> RewardModel:
        torch.manual_seed(3)
        head = ScalarHead(head_width(captioner, pooling))
        info = RewardInfo(kind, pooling, captioner.name, hash_model(captioner.network), mean=0.2, std=2.0)
        return RewardModel(captioner, head, info, name="made")

    return make


@pytest.mark.parametrize("kind", ["bradley-terry", "pairwise"])
def test_swapping_captions_swaps_their_probabilities(make_model, media, kind):
    model = make_model(kind)
    for one, other in ((0, 1), (1, 2)):
        first, second = (model.compare(ROWS[a], ROWS[b], media) for a, b in ((one, other), (other, one)))
        assert first + second == pytest.approx(1, abs=1e-12) and abs(first - 0.5) > 1e-3
    assert model.compare(ROWS[0], ROWS[0], media) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("kind", ["bradley-terry", "pairwise"])
def test_rewards_do_not_depend_on_other_clips_or_the_order(make_model, media, kind):
    model = make_model(kind)
    expected = model.rewards(ROWS, media)
    assert len({round(value, 4) for value in expected}) == 3
    others = [PromptRow(1, "Tell.", "beeps"), PromptRow(1, "Tell.", "noise")]
    mixed = model.rewards([ROWS[2], others[0], ROWS[0], others[1], ROWS[1]], media)
    assert [mixed[2], mixed[4], mixed[0]] == pytest.approx(expected, abs=1e-4)
    assert model.rewards([], []) == []  # of a process that gets no clip


def test_a_reward_and_its_probability(make_model, media):
    """The reward is standardized by mean 0.2 and deviation 2, and the probability undoes it."""
    model = make_model()
    rewards = model.rewards(ROWS[:2], media)
    raw = [reward * 2.0 + 0.2 for reward in rewards]
    assert model.compare(*ROWS[:2], media) == pytest.approx(1 / (1 + math.exp(raw[1] - raw[0])), abs=1e-6)
    margin = rewards[0] - rewards[1]
    assert model.info.margin(model.info.probability(margin)) == pytest.approx(margin)
    assert model.info.probability(margin) == pytest.approx(model.compare(*ROWS[:2], media), abs=1e-6)


def test_save_and_load(make_model, media, tmp_path, fill_adapter):
    """A loaded model gives the same rewards, also with an adapter; keys are those of Hugging Face's models."""
    model = make_model()
    expected = model.rewards(ROWS, media)
    save_reward_model(tmp_path / "frozen", model.head, model.info)
    loaded = RewardModel.load(tmp_path / "frozen")
    assert loaded.rewards(ROWS, media) == pytest.approx(expected, abs=1e-6)
    assert list(ScalarHead(3).state_dict()) == ["score.weight"]
    attach_lora(model.captioner.network, LoraConfig(rank=2, alpha=4, dropout=0.0), seed=0)
    fill_adapter(model.captioner.network)
    save_adapter(model.captioner.network, tmp_path / "adapted" / "adapter")
    adapted = model.rewards(ROWS, media)
    save_reward_model(tmp_path / "adapted", model.head, model.info)
    again = RewardModel.load(tmp_path / "adapted").rewards(ROWS, media)
    # Merged, float32 sums round differently, in proportion to the largest reward, which is over 100 here.
    assert again == pytest.approx(adapted, abs=2e-5 * max(map(abs, adapted))) and abs(adapted[0] - expected[0]) > 1


def test_frames_of_the_training(make_model, tmp_path, videos, captioner):
    """Trained on frames at 1 per second, the model reads clips so, and a captioner that samples 2 is refused."""
    model = make_model()
    frames = captioner.processor.frames | {"frames_per_second": 1.0}
    save_reward_model(tmp_path, model.head, replace(model.info, frames=frames, reader="pyav"))
    loaded = RewardModel.load(tmp_path)
    assert loaded.captioner.processor.frames == frames
    counts = [one.processor.read(videos[0]).num_frames for one in (loaded.captioner, captioner)]
    assert counts[1] == 2 * counts[0]
    with pytest.raises(
        ValueError, match=r"sampled with frames_per_second 1.0, but they are sampled with frames_per_second 2.0: "
    ):
        RewardModel.load(tmp_path, captioner=captioner)
    captioner.processor.set_frames({"frames_per_second": 1.0})
    assert RewardModel.load(tmp_path, captioner=captioner).info == loaded.info


def test_a_reward_model_is_recognised_by_its_content(make_model, tmp_path):
    model = make_model()
    save_reward_model(tmp_path / "a", model.head, model.info)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert hash_reward_model(tmp_path / "a") == hash_reward_model(tmp_path / "b")
    with torch.no_grad():
        model.head.score.weight[0, 0] += 1
    save_reward_model(tmp_path / "b", model.head, model.info)
    assert hash_reward_model(tmp_path / "a") != hash_reward_model(tmp_path / "b")


def test_folders_that_are_refused(make_model, tmp_path, random_plus):
    with pytest.raises(ValueError, match="is not a reward model"):
        RewardModel.load(tmp_path)
    model = make_model()
    save_reward_model(tmp_path / "good", model.head, model.info)
    with pytest.raises(ValueError, match="is a bradley-terry reward model, but a pairwise one is needed"):
        RewardModel.load(tmp_path / "good", kind="pairwise")
    with pytest.raises(ValueError, match="with other weights than those of"):
        RewardModel.load(tmp_path / "good", base=str(random_plus))
    values = read_json(tmp_path / "good" / "reward.json")
    write_json(tmp_path / "good" / "reward.json", values | {"format": 2})  # its gate read other states
    with pytest.raises(ValueError, match=r"has format 2, but this version of salmonn reads 3; train it again"):
        RewardModel.load(tmp_path / "good")
    write_json(tmp_path / "good" / "reward.json", values | {"pooling": "last"})
    with pytest.raises(ValueError, match=r"does not fit its reward\.json"):
        RewardModel.load(tmp_path / "good")
    (tmp_path / "good" / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no head\.safetensors: without the trained head its rewards"):
        RewardModel.load(tmp_path / "good")


def test_a_reward_of_a_recipe(make_model, media, tmp_path):
    """Captions are rated in their order, whatever their clip, and longer ones less with a length penalty."""
    model = make_model()
    tone = "A tone is heard. A tone is heard."  # half of its words repeat a clause
    texts = [
        ("a.mp4", 0, "A red circle blinks."),
        ("b.mp4", 0, "beeps"),
        ("a.mp4", 1, "A low tone."),
        ("a.mp4", 2, tone),
    ]
    captions = [Caption(video, text, "Tell.", sample=sample, finished=True) for video, sample, text in texts]
    clips = {"a.mp4": media[0], "b.mp4": media[1]}
    reward = ModelReward(model, lambda caption: clips[caption.video], length_penalty=0.01, repetition_weight=4)
    ratings = reward.rate([ScoringTask(Reference(caption.video), caption) for caption in captions])
    first = model.rewards([ROWS[0], ROWS[1]], media)
    assert [rating.main for rating in (ratings[0], ratings[2])] == pytest.approx(first, abs=1e-5)
    assert ratings[0].value == pytest.approx(first[0] - 0.01 * len("A red circle blinks."), abs=1e-5)
    assert ratings[3].value == pytest.approx(ratings[3].main - 0.01 * len(tone) - 4 * 0.5, abs=1e-5)
    assert [(rating.video, rating.sample) for rating in ratings] == [(video, sample) for video, sample, _ in texts]
    reward.save(tmp_path / "ratings.jsonl", ratings)
    assert reward.load(tmp_path / "ratings.jsonl") == ratings


def test_caution_subtracts_the_disagreement_of_the_ensemble(make_model, media, tmp_path):
    """Two further heads that are the head itself and its negative differ by 2 r: the spread is sqrt(2) |r|."""
    model = make_model()
    assert model.rate([Caption("a.mp4", "A tone.")], lambda _: media[0])[0].parts.keys() == {"reward"}
    head = ScalarHead(model.head.score.in_features, ensemble=2).double()
    with torch.no_grad():
        head.score.weight.copy_(model.head.score.weight)
        head.ensemble.weight.copy_(torch.cat([model.head.score.weight, -model.head.score.weight]))
        head.ensemble.bias.zero_()
    save_reward_model(tmp_path, head, replace(model.info, ensemble=2))
    loaded, captions = RewardModel.load(tmp_path), [Caption("a.mp4", row.answer, row.prompt) for row in ROWS]
    ratings = loaded.rate(captions, lambda _: media[0], caution=0.5)
    for rating, expected in zip(ratings, model.rewards(ROWS, media), strict=True):
        raw = expected * 2.0 + 0.2
        assert rating.parts["spread"] == pytest.approx(math.sqrt(2) * abs(raw), rel=1e-4)
        assert rating.main == pytest.approx(expected, abs=1e-4)
        assert rating.value == pytest.approx(rating.main - 0.5 * rating.parts["spread"])


def test_the_head_ignores_autocast():
    """In bfloat16, whose step is 0.03 at 5, two rewards that differ by 0.01 would be equal."""
    head = ScalarHead(1)
    with torch.no_grad():
        head.score.weight.fill_(1.0)
    states = torch.tensor([[5.0], [5.01]])
    with torch.autocast("cpu", torch.bfloat16):
        one, other = head(AnswerStates(states, states))
    assert other > one
