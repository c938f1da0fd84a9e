"""Reading benchmark items from our files and from files in the published formats."""

import json
from pathlib import Path

import pytest

from salmonn.preference.benchmark_items import BenchmarkItem, SyntheticClip, read_items
from salmonn.records import Event
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import SynthConfig

PAIR = {"prompt": "Tell.", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def read(tmp_path):
    """Write rows to a file of this name, and read them."""

    def read(*rows, name="file.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_items([tmp_path / name])

    return read


def test_rewardbench(read):
    row = PAIR | {"chosen_model": "x", "rejected_model": "y", "subset": "mt-bench-easy", "id": 30}
    assert read(row) == [BenchmarkItem("30", "mt-bench-easy", "Tell.", ("good",), ("bad",), "Chat")]


def test_a_preference_set_of_conversations(read):
    """As in RewardBench's further sets: chosen and rejected are conversations, the prompt a list of messages."""
    question, reply = {"role": "user", "content": "Tell."}, {"role": "assistant", "content": "What?"}
    prompt = [question, reply, {"role": "user", "content": "All."}]
    row = {"prompt": prompt, "chosen": [*prompt, {"role": "assistant", "content": "good"}], "rejected": "bad"}
    (item,) = read(row)
    assert item.prompt == "user: Tell.\n\nassistant: What?\n\nuser: All." and item.chosen == ("good",)
    assert read(row | {"prompt": [question]})[0].prompt == "Tell."
    assert (item.id, item.subset, item.scenario) == ("1", "file", "file")  # without an id and a subset


def test_rewardbench_2(read):
    """An unknown subset is its own scenario; a JSON list is read, too."""
    row = {"id": "tied:3", "prompt": "Name a colour.", "chosen": ["red", "blue"], "rejected": ["dog"], "num_correct": 2}
    row |= {"num_incorrect": 1, "total_completions": 3, "models": ["a", "b", "c"], "subset": "Ties"}
    row |= {"additional_metadata": {"category": None, "seed": None}}
    expected = [BenchmarkItem("tied:3", "Ties", "Name a colour.", ("red", "blue"), ("dog",), "Ties")]
    assert read(row) == expected
    assert read([row], name="list.json") == expected


def test_rag_rewardbench(read):
    """Its files have "reject", and their names are the subsets."""
    row = {"prompt": "Documents: ... Question: Who?", "question": "Who?", "chosen": "A.", "reject": "B."}
    row |= {"chosen_model": "x", "reject_model": "y", "subset": "musique"}
    (item,) = read(row, name="reason.jsonl")
    assert (item.prompt, item.rejected, item.subset, item.scenario) == (row["prompt"], ("B.",), "reason", "Helpful")
    assert read(row, name="conflict.jsonl")[0].scenario == "Harmless"


def test_a_video(read, tmp_path):
    (item,) = read(PAIR | {"video": "videos/a.mp4", "use": "visual"})
    assert (item.clip, item.use, item.events) == (tmp_path / "videos" / "a.mp4", "visual", ())
    assert read(PAIR | {"question": "Q?", "video_path": "b.mp4"})[0].clip == tmp_path / "b.mp4"


def test_a_synthetic_clip_has_its_events_as_far_as_they_can_be_perceived(read):
    _, reference = sample_clip(SynthConfig(seed=4), index=7)
    row = PAIR | {"seed": 4, "index": 7, "subset": "colour"}
    (item,) = read(row)
    assert item.clip == SyntheticClip(4, 7) and item.events == reference.events and item.scenario == "helpful"
    visual = tuple(event for event in reference.events if event.modality == "visual")
    assert 0 < len(visual) < len(reference.events) and read(row | {"use": "visual"})[0].events == visual
    # events of the row replace them, and RewardBench 2's metadata name a clip, too
    given = [{"text": "three beeps are heard", "modality": "audio"}]
    assert read(row | {"events": given})[0].events == (Event("three beeps are heard", "audio"),)
    assert read(PAIR | {"additional_metadata": {"seed": 4, "index": 7}})[0].clip == SyntheticClip(4, 7)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: rejected missing: expected"),
        ({"chosen": "b", "reject": "c"}, "line 2: prompt missing"),
        (PAIR | {"chosen": 3}, "line 2: chosen must be a text, a list of texts or a list of messages, got 3"),
        (PAIR | {"rejected": []}, r"line 2: rejected must be .* got \[\]"),
        (PAIR | {"chosen": " "}, "line 2: an answer is empty"),
        (PAIR | {"prompt": [1]}, r"line 2: prompt must be a text or a list of messages, got \[1\]"),
        (PAIR | {"subset": 3}, "line 2: subset must be a text, got 3"),
        (PAIR | {"use": "touch"}, "line 2: use must be one of both, visual, audio, got 'touch'"),
        (PAIR | {"seed": 1}, "line 2: seed and index must be whole numbers of at least 0, got 1 and None"),
        (PAIR | {"events": [{"txt": "a"}]}, "line 2: unknown field txt in Event"),
        ([], "line 2: expected a JSON object, got list"),
    ],
)
def test_bad_rows(read, row, message):
    with pytest.raises(ValueError, match=rf"file\.jsonl, {message}"):
        read(PAIR, row)


def test_bad_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not JSON at column"):
        read_items([tmp_path / "a.jsonl"])
    (tmp_path / "a.json").write_text('[{"prompt": ')
    with pytest.raises(ValueError, match=r"a\.json, line 1: not JSON"):
        read_items([tmp_path / "a.json"])
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"b\.jsonl has no items: expected lines such as"):
        read_items([tmp_path / "b.jsonl"])
    with pytest.raises(ValueError, match=r"c\.parquet is a Parquet file: convert it to JSON lines"):
        read_items([Path("c.parquet")])
    with pytest.raises(FileNotFoundError):
        read_items([tmp_path / "absent.jsonl"])
