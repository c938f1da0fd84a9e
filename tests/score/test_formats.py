"""Score files and published files: round trips and error messages."""

import json

import pytest

from salmonn.files import write_records
from salmonn.records import Caption, Event, JudgeInfo, Mention, Reference, Score, Unscored
from salmonn.score.formats import match_video_names, read_captions, read_references, read_scores, write_scores

DATE = "2026-11-22T10:00:00+00:00"
JUDGE_INFO = JudgeInfo("m at OpenAI", "0123456789ab", "published", DATE, "0.1.0", (1, 2), (0.5, 0.4), 1)
RESULTS = [
    Score(
        "a", 3, 1, 1, 1, missed=("x\u2028y\x85z",), mentions=(Mention(Event("e", "speech", 1.0), "q", False),), sample=2
    ),
    Unscored("b", "the server refuses it", 1),
    Score("c", 0, 0, 0, 0, finished=False),
]


def test_round_trip(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, JUDGE_INFO, RESULTS)
    read = read_scores(path)
    assert (read.judge_info, read.scores, read.unscored) == (JUDGE_INFO, [RESULTS[0], RESULTS[2]], [RESULTS[1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1"),
        ('{"video": "a"}\n', "line 1: a score file starts with"),
        ('{"judge_info": {"judge": "rule"}}\n', "line 1: score file of format None, but this version of salmonn reads"),
        (
            '{"format": 9, "judge_info": {"judge": "rule"}}\n',
            "line 1: score file of format 9, .* score the captions again",
        ),
        ('{"format": 1, "judge_info": {"judge": "rule"}}\n', "line 1: JudgeInfo.prompt_hash is missing"),
        ("JUDGE_INFO\n[]\n", "line 2: Score must be a JSON object"),
        ("JUDGE_INFO\n5\n", "line 2: Score must be a JSON object"),
        ('JUDGE_INFO\n{"video": "a", "num_events": "3"}\n', "line 2: Score"),
    ],
)
def test_rejects_other_files_as_score_file(tmp_path, text, message):
    path = tmp_path / "scores.jsonl"
    write_scores(path, JUDGE_INFO, [])
    path.write_text(text.replace("JUDGE_INFO", path.read_text().strip()))
    with pytest.raises(ValueError, match=message):
        read_scores(path)
    with pytest.raises(FileNotFoundError, match="salmonn score --out"):
        read_scores(tmp_path / "none")


def test_references_of_both_formats(tmp_path):
    items = [{"video": "0.mp4", "events": ["a dog runs"], "caption": "A dog runs.", "more": 1}]
    (tmp_path / "r.json").write_text(json.dumps(items))
    expected = {"0.mp4": Reference("0.mp4", (Event("a dog runs"),), "A dog runs.")}
    assert read_references(tmp_path / "r.json") == expected
    write_records(tmp_path / "r.jsonl", expected.values())
    assert read_references(tmp_path / "r.jsonl") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "JSON list of objects"),
        ('["a"]', "item 1: expected a JSON object, got str"),
        ("[", "Expecting value"),
        ('[{"video": "a"}]', "item 1: expected"),
        ('[{"video": "a", "events": ["x"]}, {"video": "b", "events": "x"}]', "item 2: expected"),
        ('[{"video": "a", "events": []}, {"video": "a", "events": []}]', "two references of a"),
    ],
)
def test_rejects_invalid_references(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_references(tmp_path / "r.json")
    with pytest.raises(FileNotFoundError):
        read_references(tmp_path / "none.json")


def test_predictions(tmp_path, caplog):
    items = [
        {"id": ["0.mp4"], "pred": "old"},
        {"id": ["0.mp4"], "pred": "new<|im_end|>"},
        {"id": "1.mp4", "pred": ["cut o"]},
    ]
    (tmp_path / "p.json").write_text(json.dumps(items))
    assert read_captions(tmp_path / "p.json") == [Caption("0.mp4", "new"), Caption("1.mp4", "cut o", finished=False)]
    assert "1 videos are predicted more than once" in caplog.text
    (tmp_path / "p.json").write_text(json.dumps(items[2:]))
    read_captions(tmp_path / "p.json")
    assert "all count as cut off" in caplog.text
    (tmp_path / "p.json").write_text('[{"id": [], "pred": "x"}]')
    with pytest.raises(ValueError, match="item 1: expected"):
        read_captions(tmp_path / "p.json")


def test_matches_video_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    references = {"clips/a.mp4": Reference("clips/a.mp4")}
    captions = [Caption("clips/a.mp4", "1"), Caption("data/clips/a.mp4", "2"), Caption("b.mp4", "3")]
    matched = match_video_names(captions, references, tmp_path / "data" / "refs.jsonl")
    assert [caption.video for caption in matched] == ["clips/a.mp4", "clips/a.mp4", "b.mp4"]
