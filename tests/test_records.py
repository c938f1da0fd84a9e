"""Round trips of records; mistakes in a file are reported with file, line and field."""

import json
import os

import pytest

from salmonn.files import append_record, atomic_folder, read_records, write_json, write_records, write_text
from salmonn.records import Caption, Comparison, Event, JudgeInfo, Mention, Question, Reference, Score, Unscored

REFERENCE = Reference(
    "videos/a.mp4",
    events=(Event("a red circle appears", "visual", 0.5, 2.0), Event("ein Ton, „hoch“", "audio")),
    caption="line one\nline two\u2028end",
    questions=(Question("How many?", "two", "count"),),
    duration_seconds=7.5,
)


@pytest.mark.parametrize(
    "record",
    [
        REFERENCE,
        Reference("bare.mp4"),
        Caption("a.mp4", "text", prompt="Tell.", model="m", sample=3, finished=False),
        Caption("a.mp4", "text", complete=False, modality="visual", warnings=("lost 0.1 s of audio at 2.0 s", "é")),
        Score(
            "a.mp4",
            4,
            1,
            1,
            0,
            9,
            3,
            2,
            False,
            ("x",),
            (Mention(Event("y"), "Y", False), Mention(Event("z", "speech"))),
            (),
        ),
        Unscored("a.mp4", "the server refused it", sample=1),
        JudgeInfo("rule", "abc", "salmonn", "2026-11-22T10:00:00+00:00", "0.1.0", (1, 2), (0.5, 0.25), 1),
        Comparison("a.mp4", "Tell.", "good", "bad", "true", margin=0.25, rejected_finished=False),
    ],
)
def test_round_trip(tmp_path, record):
    path = tmp_path / "new" / "folder" / "records.jsonl"
    write_records(path, [record, record])
    append_record(path, record)
    assert read_records(path, type(record)) == [record] * 3
    assert path.read_text(encoding="utf-8").count("\n") == 3


def test_captions_without_the_latest_fields_can_be_read(tmp_path):
    (tmp_path / "old.jsonl").write_text('{"video": "a.mp4", "text": "words", "finished": true}\n')
    assert read_records(tmp_path / "old.jsonl", Caption) == [
        Caption("a.mp4", "words", complete=True, modality=None, warnings=())
    ]


def test_score_rates():
    # 1 missing, 2 incorrect, 1 hallucinated of 8 events; 3 of 12 words repeated.
    score = Score("a.mp4", 8, 1, 2, 1, num_words=12, num_repeated_words=3)
    assert (score.total, score.repetition) == (0.5, 0.25)
    # No events and no words, but two hallucinations.
    assert (Score("a.mp4", 0, 0, 0, 2).total, Score("a.mp4", 0, 0, 0, 2).repetition) == (2.0, 0.0)


def test_bytes_of_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"video": "caf\u00e9.mp4"}\n'.encode())
    assert read_records(path, Reference) == [Reference("caf\u00e9.mp4")]
    path.write_bytes('{"video": "caf\u00e9.mp4"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1: not UTF-8 text: save the file as UTF-8"):
        read_records(path, Reference)


def test_integers_become_floats_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"video": "a.mp4", "duration_seconds": 2}\n\n{"video": "b.mp4"}\n')
    first, second = read_records(path, Reference)
    assert isinstance(first.duration_seconds, float) and first.duration_seconds == 2.0
    assert second == Reference("b.mp4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2"),
        ("[1]", "Caption must be a JSON object, got [1]; write one object per line, not a list"),
        ('{"video": "a.mp4"}', "Caption.text is missing"),
        ('{"video": "a.mp4", "text": "t', "invalid JSON at column 29: EOF while parsing a string (cut off?)"),
        ('{"video": "a.mp4", "text": "t", "txt": 1}', "unknown field txt in Caption; it has video, text"),
        ('{"video": "a.mp4", "caption": "t"}', "These are references: is it the right file?"),
        ('{"judge_info": {}}', "This is a score file"),
        ('{"video": "a.mp4", "text": 5}', "Caption.text must be a valid string, got 5"),
        ('{"video": "a.mp4", "text": null}', "Caption.text must be a valid string, got None"),
        ('{"video": "a.mp4", "text": "t", "sample": true}', "Caption.sample must be a valid integer, got True"),
        ('{"video": "a.mp4", "text": "t", "sample": 1.5}', "Caption.sample must be a valid integer, got 1.5"),
        ('{"video": "a.mp4", "text": "t", "finished": 1}', "Caption.finished must be a valid boolean, got 1"),
        ('{"video": "a.mp4", "text": "t", "end_seconds": NaN}', "Caption.end_seconds must be a finite number, got nan"),
        ('{"video": "a.mp4", "text": "t", "sample": "1"}', "Caption.sample must be a valid integer, got '1'"),
        ('{"video": "a.mp4", "text": "t", "sample": 1.0}', "Caption.sample must be a valid integer, got 1.0"),
        (
            '{"video": "a.mp4", "text": "t", "end_seconds": 1e999}',
            "Caption.end_seconds must be a finite number, got inf",
        ),
        ('{"video": "a.mp4", "text": "t\\ud83d"}', "(half of a Unicode character, which cannot be written)"),
    ],
)
def test_errors_have_file_and_line(tmp_path, line, message):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"video": "a.mp4", "text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        read_records(path, Caption)
    assert f"{path}, line 2: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("events", {"text": "x"}, "Reference.events must be a valid array"),
        (
            "events",
            [{"text": "x", "modality": "smell"}],
            "Reference.events[0].modality must be 'visual', 'audio' or 'speech', got 'smell'",
        ),
        ("events", [{"modality": "audio"}], "Reference.events[0].text is missing"),
        (
            "events",
            [{"text": "x", "start_seconds": "2"}],
            "Reference.events[0].start_seconds must be a valid number, got '2'",
        ),
        ("events", [3], "Reference.events[0] must be a JSON object, got 3"),
        ("events", [{"text": "x", "start_seconds": True}], "start_seconds must be a valid number, got True"),
        ("duration_seconds", float("inf"), "Reference.duration_seconds must be a finite number, got inf"),
        ("questions", [{"question": "x", "reply": "y"}], "unknown field reply in Reference.questions[0]"),
    ],
)
def test_errors_within_nested_records(tmp_path, field, value, message):
    path = tmp_path / "references.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", field: value}) + "\n")
    with pytest.raises(ValueError) as caught:
        read_records(path, Reference)
    assert f"{path}, line 1: " in str(caught.value) and message in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl.*Caption records"):
        read_records(tmp_path / "none.jsonl", Caption)


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "captions.jsonl"
    write_records(path, [Caption("a.mp4", "old")])

    def break_off():
        yield Caption("a.mp4", "new")
        raise RuntimeError("the second caption fails")

    with pytest.raises(RuntimeError):
        write_records(path, break_off())
    assert read_records(path, Caption) == [Caption("a.mp4", "old")]

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_records(path, [Caption("a.mp4", "new")])
    assert read_records(path, Caption) == [Caption("a.mp4", "old")]


def test_a_file_and_a_folder_with_names_of_255_bytes(tmp_path):
    """The temporary name beside them must not be longer."""
    name = "é" * 126 + "abc"
    write_text(tmp_path / name, "words")
    assert (tmp_path / name).read_text() == "words"
    with atomic_folder(tmp_path / name.replace("abc", "xyz")) as folder:
        (folder / "a").touch()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": list(range(100))})
    write_json(path, {"ü": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    write_text(path, "short")
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]
    assert path.read_text() == "short"


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(RuntimeError), atomic_folder(path) as folder:
        (folder / "half").write_text("half")
        assert not path.exists()
        raise RuntimeError("the other half fails")
    assert not list(tmp_path.iterdir())
    path.mkdir()  # an empty one is no hindrance
    with atomic_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        assert not list(path.iterdir())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (path / "inner" / "file").read_text() == "content"


def test_an_existing_folder_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{path} exists and is not empty"), atomic_folder(path):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
