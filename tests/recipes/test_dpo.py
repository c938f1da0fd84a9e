"""Training on data in the published formats: guided DPO on given preferences, and SFT on conversations."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from salmonn.conversations import parse_conversation
from salmonn.files import read_json, read_records, write_records
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig
from salmonn.preference.comparisons import conversation_to_comparison
from salmonn.preference.feedback import Candidate, Feedback, FeedbackStore
from salmonn.records import Comparison, Reference
from salmonn.train.data import ClipSource

QUESTION = {"from": "human", "value": "<video>\nDescribe the video and its sounds in detail."}


@pytest.fixture
def references(trained_model) -> list[Reference]:
    """The clips on which the model was trained, with absolute paths."""
    (file,) = (trained_model / "clips").glob("seed5-*/clips.jsonl")
    records = read_records(file, Reference)
    return [Reference(**vars(record) | {"video": str(file.parent / record.video)}) for record in records]


@pytest.fixture
def preferences(references, tmp_path) -> Path:
    """Reference captions, each preferred to its words in reverse order, in the format of 2+."""
    items = [
        {
            "video": reference.video,
            "use_audio": True,
            "conversations": [
                QUESTION,
                {"from": "gpt", "value": reference.caption},
                {"from": "chosen", "value": reference.caption},
                {"from": "reject", "value": " ".join(reversed(reference.caption.split()))},
            ],
        }
        for reference in references
    ]
    path = tmp_path / "preferences.json"
    path.write_text(json.dumps(items))
    return path


@pytest.fixture(params=["salmonn2", "salmonn2-plus"])
def start(request):
    """A model of each family to train."""
    if request.param == "salmonn2":
        return request.getfixturevalue("trained_model") / "model"
    return request.getfixturevalue("random_plus")


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "torchrun"])
def test_given_preferences(start, launch, preferences, tmp_path, fresh):
    flags = {
        "preferences": preferences, "model": start, "out": tmp_path / "dpo",
        "feature_cache.folder": tmp_path / "tokens",
        "lora.rank": 8, "lora.alpha": 16,
        "fit.steps": 8, "fit.batch_size": 4, "fit.learning_rate": 0.003, "fit.gradient_accumulation_steps": 2,
    }  # fmt: skip
    result = launch("dpo", fresh=fresh, processes=1, **flags)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in (tmp_path / "dpo" / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(8))
    # Before the first step the policy equals its reference: rewards are 0, and the loss is ln 2.
    assert steps[0]["dpo"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["dpo"] < steps[0]["dpo"] - 0.02 and steps[-1]["chosen"] > steps[-1]["rejected"]
    before, after = (load_network(path).state_dict() for path in (start, tmp_path / "dpo" / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj"}
    assert (tmp_path / "dpo" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "dpo" / "checkpoint.safetensors").exists()
    assert len(list((tmp_path / "tokens").iterdir())) == 8  # clips
    assert len(read_json(tmp_path / "dpo" / "reference_logps.json")["logps"]) == 8  # pairs
    repeated = launch("dpo", **flags)
    assert repeated.returncode == 0 and "already trained" in repeated.stderr + repeated.stdout


def test_incomplete_preferences_are_rejected(load_recipe, preferences, tmp_path):
    dpo = load_recipe("dpo")
    items = json.loads(preferences.read_text())
    first = [part for part in items[0]["conversations"] if part["from"] != "gpt"]
    preferences.write_text(json.dumps([items[0] | {"conversations": first}, *items[1:]]))
    config = dpo.OfflineDpoConfig(preferences=preferences, model="none", out=tmp_path)
    with pytest.raises(ValueError, match=r"1 preferences of .* have no ground truth, .* --loss\.ce-weight 0"):
        dpo.load_comparisons(config)
    plain = [item | {"conversations": item["conversations"][:2]} for item in items]
    preferences.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="has no preference"):
        dpo.load_comparisons(config)


def test_comparisons_share_their_clip(load_recipe, references, tmp_path):
    """A recorded comparison and a published preference about the same part of a clip, with paths from `root`."""
    dpo, video = load_recipe("dpo"), Path(references[0].video)
    records = [
        Comparison(video.name, "p", "a", "b", "c", margin=0.5, source="vote", end_seconds=2.0),
        Comparison(video.name, "p", "a", "b", "c", chosen_finished=False),
        Comparison(video.name, "q", "b", "a", "c", end_seconds=2.0),
    ]
    write_records(tmp_path / "pairs.jsonl", records)
    config = dpo.OfflineDpoConfig(
        preferences=tmp_path / "pairs.jsonl", root=video.parent, model="none", out=tmp_path / "out"
    )
    loaded = dpo.load_comparisons(config)
    part, full = ClipSource(video, end_seconds=2.0), ClipSource(video)
    assert loaded == list(zip(records, [part, full, part], strict=True))
    with pytest.raises(FileNotFoundError, match=r"3 of \d files do not exist"):
        dpo.load_comparisons(dpo.OfflineDpoConfig(preferences=tmp_path / "pairs.jsonl", model="none", out=tmp_path))


def test_pairs_of_mrdpo(trained_model, references, launch, tmp_path):
    """The pairs.jsonl of a round, whose videos are those of its training clips."""
    (folder,) = (trained_model / "clips").glob("seed5-8")
    pairs = [
        Comparison(
            str(Path(reference.video).relative_to(folder)),
            "Describe.",
            reference.caption,
            "a star",
            reference.caption,
            margin=0.5,
        )
        for reference in references
    ]
    write_records(tmp_path / "round_1" / "pairs.jsonl", pairs)
    result = launch(
        "dpo",
        **{"preferences": tmp_path / "round_1" / "pairs.jsonl", "root": folder, "model": trained_model / "model"},
        **{"out": tmp_path / "dpo", "feature_cache.folder": "null", "fit.steps": 2, "fit.batch_size": 4},
    )
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in (tmp_path / "dpo" / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and steps[0]["dpo"] == pytest.approx(0.6931, abs=1e-3)


def test_peoples_feedback(trained_model, references, launch, tmp_path):
    """Rated captions one by one with KTO, whose loss is 1 before the first step, and cross-entropy on an edit only."""
    store = FeedbackStore(tmp_path / "votes")
    for reference, action, text in zip(references, ("good", "bad", "edit"), ("", "", "A star appears."), strict=False):
        caption = Candidate("toy", reference.caption, "Describe.")
        store.add(Feedback("", action, "clip.mp4", caption, text=text, tab="caption"), Path(reference.video))
    result = launch(
        "dpo",
        **{"feedback": tmp_path / "votes", "model": trained_model / "model", "out": tmp_path / "dpo"},
        **{"loss.kind": "kto", "feature_cache.folder": "null", "fit.steps": 1, "fit.batch_size": 3},
    )
    assert result.returncode == 0, result.stderr
    assert "3 comparisons (1 from edit, 2 from rating)" in " ".join(result.stdout.split())
    (step,) = [json.loads(line) for line in (tmp_path / "dpo" / "steps.jsonl").read_text().splitlines()]
    assert step["dpo"] == pytest.approx(1.0, abs=1e-3) and 0 < step["ce"] < 10


def test_a_published_preference_becomes_a_comparison(load_recipe):
    messages = [QUESTION, {"from": "gpt", "value": "a"}, {"from": "human", "value": "And?"}]
    answers = [{"from": "chosen", "value": "b"}, {"from": "reject", "value": "c"}, {"from": "gpt", "value": "d"}]
    conversation = parse_conversation({"video": "v.mp4", "timestamps": [1, 3], "conversations": messages + answers})
    assert conversation_to_comparison(conversation) == Comparison(
        "v.mp4", "And?", "b", "c", "d", source="published", modality="visual", start_seconds=1.0, end_seconds=3.0,
        history=(("Describe the video and its sounds in detail.", "a"),),
    )  # fmt: skip


def test_sft_on_conversations(start, launch, references, tmp_path):
    """The format of salmonn2, with audio in a separate file; SFT ignores preferences."""
    messages = [QUESTION | {"value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a circle"}]
    items = [
        {"video": reference.video, "audio": reference.video, "conversations": messages} for reference in references[:3]
    ]
    items.append(
        {"video": references[0].video, "conversations": [*messages, {"from": "reject_gpt", "value": "a star"}]}
    )
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    flags = {
        "references": path, "model": start, "out": tmp_path / "tuned", "heldout_clips": 0,
        "fit.steps": "null", "fit.epochs": 4, "fit.batch_size": 3, "fit.learning_rate": 0.003,
    }  # fmt: skip
    result = launch("sft", **flags)
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "tuned" / "steps.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]  # three examples, three a step
    path.write_text(path.read_text() + '{"video": "gone.mp4", "conversations": []}\n')
    rejected = launch("sft", **flags | {"out": tmp_path / "other"})
    assert rejected.returncode == 2 and f"{path}, line 5: " in rejected.stderr and "Traceback" not in rejected.stderr


def test_equal_answers_are_left_out(load_recipe, references, tmp_path, caplog):
    dpo, video = load_recipe("dpo"), Path(references[0].video)
    records = [
        Comparison(video.name, "p", "a star appears", answer, "c")
        for answer in ("a star appears", " a  star\nappears", "a star")
    ]
    path = tmp_path / "pairs.jsonl"
    write_records(path, records)
    config = dpo.OfflineDpoConfig(preferences=path, root=video.parent, model="none", out=tmp_path / "out")
    with caplog.at_level("WARNING"):
        assert [one for one, _ in dpo.load_comparisons(config)] == records[2:]
    assert "left out 2 of 3 preferences" in caplog.text
    write_records(path, records[:2])
    with pytest.raises(ValueError, match="no preference pairs"):
        dpo.load_comparisons(config)


def test_preferences_and_feedback_exclude_each_other(load_recipe, tmp_path):
    dpo = load_recipe("dpo")
    for both in ({}, {"preferences": tmp_path / "pairs.jsonl", "feedback": tmp_path}):
        with pytest.raises(ValueError, match=r"give either --preferences, .* or --feedback"):
            dpo.OfflineDpoConfig(model="none", out=tmp_path / "out", **both)


def test_special_tokens_are_rejected_with_their_line(load_recipe, random_model, preferences, tmp_path, monkeypatch):
    """In both formats, and before the folder is claimed; likewise a misspelt target."""
    dpo = load_recipe("dpo")
    monkeypatch.setattr(dpo.dist, "setup", lambda **_: None)  # keep the tests' threads and logging
    items = json.loads(preferences.read_text())
    items[1]["conversations"][3]["value"] = "stop <|im_end|>"
    preferences.write_text("[" + ",\n".join(map(json.dumps, items)) + "]")
    pairs = tmp_path / "pairs.jsonl"
    write_records(pairs, [Comparison("a.mp4", "p", "a", "b"), Comparison("a.mp4", "p", "a", "b <|im_end|>")])
    for path in (preferences, pairs):
        config = dpo.OfflineDpoConfig(preferences=path, model=str(random_model), out=tmp_path / "out")
        with pytest.raises(ValueError, match=r"line 2: .*special token <\|im_end\|>"):
            dpo.main(config)
        with pytest.raises(ValueError, match="no projection q_prj"):
            dpo.main(replace(config, lora=LoraConfig(targets=("q_prj", "v_proj"))))
    assert not (tmp_path / "out").exists()
