"""Preferences as rows of TRL, whose columns are those that it documents, and judged captions as rows of HelpSteer."""

import json

import av
import pytest

from salmonn.files import write_records
from salmonn.preference.comparisons import read_preferences
from salmonn.preference.rating import Rating
from salmonn.records import Caption, Comparison, Event, JudgeInfo, Mention, Reference, Score
from salmonn.score.formats import write_scores

HISTORY = (("Hello?", "Yes."),)


@pytest.fixture
def pairs(tmp_path):
    """Comparisons, three of which no row of TRL can hold."""
    (tmp_path / "a.mp4").touch()
    comparisons = [
        Comparison("a.mp4", "Tell.", "x", "y", margin=0.25, history=HISTORY),
        Comparison("a.mp4", "Tell.", "p", "q", margin=0.5),
        Comparison("a.mp4", "Tell.", "x", "y", rejected_finished=False),
        Comparison("a.mp4", "Tell.", "x", "y", modality="audio"),
        Comparison("none.mp4", "Tell.", "x", "y"),
    ]
    write_records(tmp_path / "pairs.jsonl", comparisons)
    return tmp_path / "pairs.jsonl"


def write_silent(path):
    """Write a video of one frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 16
        container.mux([*stream.encode(av.VideoFrame(16, 16, "yuv420p")), *stream.encode()])


def test_rows_of_trl(pairs, call, tmp_path):
    """A conversational preference dataset with explicit prompts; reading the rows gives the comparisons again."""
    out = tmp_path / "rows.jsonl"
    code, _, err = call("export", pairs, "--rows", "trl", "--to", out)
    assert code == 0 and err == (
        f"2 rows written to {out}; left out: no video (1); left out: answers that are cut off (1); left out: a part of "
        "the clip, one modality or a separate audio track (1)\n"
    )
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first == {
        "prompt": [
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Tell."},
        ],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
        "videos": [str(tmp_path / "a.mp4")],
    }
    read = read_preferences(out).comparisons
    assert [(one.prompt, one.chosen, one.rejected, one.history) for one in read] == [
        ("Tell.", "x", "y", HISTORY),
        ("Tell.", "p", "q", ()),
    ]
    code, _, err = call("export", pairs, "--rows", "trl", "--to", out, "--margin")
    assert code == 0 and [json.loads(line)["margin"] for line in out.read_text().splitlines()] == [0.25, 0.5]
    trl = pytest.importorskip("trl.data_utils", reason="TRL is not installed (extra bench)")
    assert trl.is_conversational(first) and trl.maybe_extract_prompt(dict(second)) == second


def test_rows_from_a_reward_model(call, tmp_path):
    """Ratings beside the captions are preferences, too: gaps of 0.5 and 0.2, and a caption that has no rating."""
    (tmp_path / "a.mp4").touch()
    write_records(
        tmp_path / "captions.jsonl", [Caption("a.mp4", text, "Tell.", sample=n) for n, text in enumerate("abcd")]
    )
    ratings = [Rating("a.mp4", {"reward": value}, {"reward": 1.0}, n) for n, value in enumerate((0.5, 0.0, 0.3))]
    write_records(tmp_path / "ratings.jsonl", ratings)
    flags = ("--rows", "trl", "--to", tmp_path / "rows.jsonl", "--margin", "--min-gap", 0.25)
    code, _, err = call("export", tmp_path, *flags)
    assert code == 0, err
    assert "2 rows written" in err and "left out: captions without a rating (1)" in err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["margin"]) for row in rows]
    assert found == [("a", "b", 0.5), ("c", "b", 0.3)]


def test_rows_of_helpsteer(call, tmp_path):
    """Grades 0 to 4: all of one visual event and no error, and half of both kinds with a hallucination."""
    seen, heard = Event("a star", "visual"), Event("a tone", "audio")
    captions = [Caption("a.mp4", "a star", "Tell."), Caption("a.mp4", "a bird", "Tell.", sample=1, finished=False)]
    write_silent(tmp_path / "silent.mkv")  # has one modality, and is whole; the other file cannot be opened
    captions.append(Caption("none.mkv", "a star", "Tell.", modality="visual"))
    captions.append(Caption("silent.mkv", "a star", "Tell.", modality="visual"))
    scores = [
        Score("silent.mkv", 2, 1, 0, 4, num_words=30, mentions=(Mention(seen),)),
        Score("a.mp4", 2, 1, 0, 0, num_words=30, mentions=(Mention(seen),)),
        Score("a.mp4", 2, 2, 0, 1, num_words=2, sample=1),
        Score("none.mkv", 2, 1, 0, 4, mentions=(Mention(seen),)),
    ]
    write_records(tmp_path / "captions.jsonl", captions)
    write_scores(tmp_path / "scores.jsonl", JudgeInfo("rule", "1", "salmonn", "2026-01-01", "0.1"), scores)
    write_records(
        tmp_path / "events.jsonl", [Reference(name, (seen, heard)) for name in ("a.mp4", "silent.mkv", "none.mkv")]
    )
    out = tmp_path / "rows.jsonl"
    flags = ("--rows", "helpsteer", "--to", out, "--references", tmp_path / "events.jsonl")
    code, _, err = call("export", tmp_path, *flags)
    assert code == 0 and "2 rows written" in err and "answers that are cut off (1)" in err
    assert "a part of the clip, one modality or a separate audio track (1)" in err
    grades = {"seen": 4, "heard": 0, "correctness": 4, "faithful": 4, "ordered": None, "unrepeated": 4, "verbosity": 2}
    row = {"prompt": "Tell.", "response": "a star", "videos": [str(tmp_path / "a.mp4")]}
    silent, first = map(json.loads, out.read_text().splitlines())
    assert first == row | grades
    # One of five claims is right: 1 - 4 / 5 is rounded to less than 1 / 5, but is grade 1.
    assert silent["faithful"] == 1 and silent["videos"] == [str(tmp_path / "silent.mkv")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rows", "helpsteer", "--to", "rows.jsonl"), "rows of helpsteer need --references"),
        (("--rows", "trl", "--to", "rows.csv"), "--to names one file that ends in .jsonl"),
        (("--rows", "trl", "--to", "rows.jsonl", "--margin"), "has no margin, since its source says only which"),
    ],
)
def test_rows_that_cannot_be_written(call, tmp_path, flags, message):
    (tmp_path / "a.mp4").touch()
    write_records(tmp_path / "pairs.jsonl", [Comparison("a.mp4", "Tell.", "x", "y")])
    flags = [tmp_path / flag if flag.startswith("rows.") else flag for flag in flags]
    code, _, err = call("export", tmp_path / "pairs.jsonl", *flags)
    assert code == 2 and message in err and not list(tmp_path.glob("rows.*"))
