"""Training of reward models in this process: what a killed run repeats."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import PromptRow
from salmonn.model.lora import LoraConfig
from salmonn.model.pooling import AnswerStates
from salmonn.preference.comparisons import AnswerGroup, group_comparisons
from salmonn.preference.reward_model import RewardModel
from salmonn.records import Comparison
from salmonn.train import reward
from salmonn.train.data import ClipSource
from salmonn.train.loop import FitConfig
from salmonn.train.reward import RewardTrainer, RewardTrainingConfig, split_groups
from salmonn.train.reward_heads import fit_ensemble, fit_head


@pytest.mark.parametrize("are_alike", [True, False])
def test_an_ensemble_disagrees_where_clips_do(are_alike):
    """Clips that all prefer the higher state fit the same head whichever are drawn; contradicting ones do not."""
    states = [AnswerStates(torch.zeros(2, 1), torch.tensor([[1.0, number / 5], [-1.0, 0.5]])) for number in range(6)]
    example = Comparison("a.mp4", "Tell.", "x", "y")
    pairs = [(0, 1) if are_alike or number % 3 else (1, 0) for number in range(6)]
    groups = [AnswerGroup(example, (("x", True), ("y", True)), (pair,), (None,)) for pair in pairs]
    if are_alike:  # also in their second figure, so that every sample of them is the same
        states = [states[0]] * 6
    answers = torch.cat([one.answer for one in states])
    fit = partial(fit_head, l2=0.1, center_weight=0.01)
    heads = fit_ensemble(states, groups, fit=fit, answers=answers.double(), count=4, seed=1)
    rewards = heads(answers)
    assert rewards.mean(0).tolist() == pytest.approx([0] * 4, abs=1e-5)
    assert rewards.std(0).tolist() == pytest.approx([1] * 4, abs=1e-5)
    spread = rewards.std(1).max().item()
    assert spread == pytest.approx(0, abs=1e-5) if are_alike else spread > 0.05


def test_a_killed_blind_twin_does_not_repeat_the_training(random_model, clips, captioner, tmp_path, monkeypatch):
    """Killed while the twin trains, a run trains the twin alone, and reads adapter and head of the model back."""
    videos = [reference.video for reference in clips.references[:2]]
    groups = group_comparisons([Comparison(video, "Tell.", "A red circle.", "A tone.") for video in videos])
    sources = [ClipSource(clips.root / video) for video in videos]
    encoded = captioner.encode([captioner.processor.read(one.video) for one in sources])
    features = dict(zip(sources, encoded, strict=True))
    optimization = FitConfig(learning_rate=1e-2, epochs=1.0, steps=None, batch_size=1, weight_decay=0.0)
    config = RewardTrainingConfig(
        pooling="last",
        lora=LoraConfig(rank=2, alpha=4, dropout=0.0, targets=("q_proj",)),
        fit=optimization,
        ensemble=2,
        heldout_fraction=0.5,
    )
    trained, fit = [], reward.fit

    def train(folder, *, kill_at=99):
        def counted(*args, context):
            trained.append(context.name)
            if len(trained) == kill_at:
                raise KeyboardInterrupt
            return fit(*args, context=context)

        monkeypatch.setattr(reward, "fit", counted)
        trained.clear()
        trainer = RewardTrainer(lambda: Captioner.load(random_model), config, folder)
        return trainer.train(groups, features, root=clips.root)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", kill_at=2)
    files = [tmp_path / "killed" / name for name in ("head.safetensors", "adapter/adapter_model.safetensors")]
    written = [load_file(path) for path in files]
    info = train(tmp_path / "killed")
    assert trained == ["blind: reward model"] and info.ensemble == 2
    for path, before in zip(files, written, strict=True):
        after = load_file(path)
        assert all(torch.equal(after[key], value) for key, value in before.items())
    (tmp_path / "killed" / "reward.json").unlink()  # as if killed before it was written, after the ensemble
    assert train(tmp_path / "killed") == info and trained == []
    # Rewards are standardized by what the adapted model gives the two answers of the only training clip.
    model, ((group,), _) = RewardModel.load(tmp_path / "killed"), split_groups(groups, fraction=0.5, seed=0)
    rows = [PromptRow(0, "Tell.", text) for text, _ in group.answers]
    rewards = model.rewards(rows, [features[ClipSource.of_comparison(group.example, root=clips.root)]])
    assert (
        model.head.ensemble is not None
        and sorted(rewards) == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3)
        and model.info == info
    )
