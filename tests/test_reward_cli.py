"""`salmonn reward`: ratings of captions, and the best caption of each video."""

import json
from dataclasses import replace

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.cli.reward import find_untested
from salmonn.files import read_records, write_records
from salmonn.model.fingerprint import hash_model
from salmonn.preference.heads import ScalarHead
from salmonn.preference.rating import Rating, best_captions
from salmonn.preference.reward_model import RewardInfo, head_width, save_reward_model
from salmonn.records import Caption


@pytest.fixture(scope="module")
def reward_folder(random_model, tmp_path_factory):
    """A reward model with a random head on the random captioner."""
    captioner = Captioner.load(random_model)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("reward")
    info = RewardInfo("bradley-terry", "rich", str(random_model), hash_model(captioner.network))
    save_reward_model(folder, ScalarHead(head_width(captioner, "rich")), info)
    return folder


def test_ratings_and_the_best_of_each_video(call, reward_folder, clips, tmp_path):
    texts = ("A red circle blinks.", "A low tone is heard.", "")
    captions = [
        Caption(reference.video, text, sample=sample, modality="visual")
        for reference in clips.references[:2]
        for sample, text in enumerate(texts)
    ]
    write_records(tmp_path / "captions.jsonl", [*captions, Caption("missing.mp4", "A star.")])
    args = ["reward", tmp_path / "captions.jsonl", "--model", reward_folder, "--root", clips.root]
    code, out, err = call(*args, "--best", tmp_path / "best.jsonl")
    assert code == 1 and "1 video could not be read" in err  # the others are rated
    assert f"{reward_folder} was trained on captions of both: rewards of visual are untested" in err
    ratings = [json.loads(line) for line in out.splitlines()]
    assert [(one["video"], one["sample"]) for one in ratings] == [(one.video, one.sample) for one in captions]
    best = read_records(tmp_path / "best.jsonl", Caption)
    for caption, group in zip(best, (ratings[:2], ratings[3:5]), strict=True):  # never the empty one
        values = [one["parts"]["reward"] for one in group]
        assert caption.sample == values.index(max(values)) and len(set(values)) == 2
    code, out, _ = call(*args, "--out", tmp_path / "ratings.jsonl")
    assert out == "" and [one.value for one in read_records(tmp_path / "ratings.jsonl", Rating)] == pytest.approx(
        [one["parts"]["reward"] for one in ratings]
    )


def test_requests_that_a_gate_does_not_know_are_named():
    info = RewardInfo("objectives", "rich", "base", "hash", requests=("Look.", "Listen."))
    captions = [Caption("a", "x", prompt, modality="both") for prompt in ("Look.", "", "Tell.", "Say.")]
    assert find_untested(info, captions[:2]) == []
    assert find_untested(info, captions) == [
        'learned weights of objectives for 2 requests: those for others, such as "Say.", are untested'
    ]
    assert find_untested(replace(info, requests=()), captions) == []  # all requests have the same weights


def test_the_best_caption_is_chosen_by_prompt():
    captions = [Caption("a", text, prompt) for text, prompt in (("x", "p"), ("y", "p"), ("z", "q"), ("u", "q"))]
    ratings = [Rating("a", {"reward": value}, {"reward": 1.0}) for value in (1.0, 2.0, 3.0)]
    assert [one.text for one in best_captions(captions, [*ratings, None])] == ["y", "z"]


def test_mistakes(call, reward_folder, tmp_path, monkeypatch):
    captions = tmp_path / "captions.jsonl"
    write_records(captions, [])
    assert call("reward", captions, "--model", reward_folder)[2] == f"error: {captions} holds no captions\n"
    write_records(captions, [Caption("a.mp4", "x")])
    code, _, err = call("reward", captions, "--model", tmp_path)
    assert code == 2 and "is not a reward model: it has no reward.json; recipes/reward.py trains one" in err
    code, _, err = call("reward", captions, "--model", reward_folder, "--caution", 1)
    assert code == 2 and f"which {reward_folder} has not: train with --ensemble 5" in err
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: pytest.fail("the base must not be loaded"))
    for flags, message in (
        (("--caution", -1), "--caution must be at least 0, got -1"),
        (("--objectives",), "is a bradley-terry reward model: --objectives needs one of that kind"),
        (("--votes", captions), "has one reward for all: --votes needs a model of the kind ideal-point"),
    ):
        code, _, err = call("reward", captions, "--model", reward_folder, *flags)
        assert code == 2 and message in err
    assert "must be different files" in call("reward", captions, "--model", reward_folder, "--out", captions)[2]
