"""Comparisons are read from every source, and grouped so that one pass scores all answers about a clip."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.files import write_records
from salmonn.preference.comparisons import compare_ratings, group_comparisons, read_preferences
from salmonn.preference.feedback import Candidate, Feedback
from salmonn.preference.rating import Rating
from salmonn.records import Caption, Comparison, Event, JudgeInfo, Mention, Score
from salmonn.score.formats import write_scores

INFO = JudgeInfo("rule", "1", "salmonn", "2026-01-01", "0.1")


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two empty video files."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def rated(video: str, values: list[float]) -> tuple[list[Caption], list[Rating]]:
    captions = [Caption(video, f"text {number}", "Tell.", sample=number) for number in range(len(values))]
    ratings = [Rating(video, {"total": value}, {"total": -1.0}, number) for number, value in enumerate(values)]
    return captions, ratings


def test_all_ordered_pairs_of_a_clip():
    """Totals 0.5, 0.4, 0.1 and 0.1: all pairs differ by at least 0.1, save the last two."""
    captions, ratings = rated("a.mp4", [0.5, 0.4, 0.1, 0.1])
    comparisons = compare_ratings(captions, ratings, min_gap=0.1, source="rule")
    found = {(one.chosen[-1], one.rejected[-1], round(one.margin, 6)) for one in comparisons}
    assert found == {("1", "0", 0.1), ("2", "0", 0.4), ("3", "0", 0.4), ("2", "1", 0.3), ("3", "1", 0.3)}
    assert len(compare_ratings(captions, ratings, min_gap=0.35, source="rule")) == 2
    assert len(compare_ratings(captions, ratings[:2], min_gap=0.1, source="rule")) == 1  # two are unscored


def test_groups_score_each_answer_once():
    comparisons = [
        Comparison("b.mp4", "Tell.", "x", "y", margin=0.2),
        Comparison("a.mp4", "Tell.", "p", "q"),
        Comparison("b.mp4", "Tell.", "x", "z", rater="ann"),
        Comparison("b.mp4", "Tell.", "y", "z", rejected_finished=False),
        Comparison("b.mp4", "Sounds?", "x", "y"),
    ]
    first, second, third = group_comparisons(comparisons)
    assert (first.example.video, second.example.prompt) == ("a.mp4", "Sounds?")
    # The unfinished z is another answer than the finished one.
    assert third.answers == (("x", True), ("y", True), ("z", True), ("z", False))
    assert third.pairs == ((0, 1), (0, 2), (1, 3)) and third.margins == (0.2, None, None)
    assert third.raters == ("", "ann", "")
    pairwise = second.to_pairwise()
    assert pairwise.answers == (("A: x B: y", True), ("A: y B: x", True)) and pairwise.pairs == ((0, 1),)


def test_judged_captions_of_parts_and_modalities(folder):
    """Captions are compared with those of the same part and modality alone, each with its own score."""
    spans, shares = ((0.0, 5.0), (5.0, 9.0)), {0: 0, 1: 2}
    captions = [
        Caption("a.mp4", f"{start} {sample}", "Tell.", sample=sample, start_seconds=start, end_seconds=end)
        for start, end in spans
        for sample in (0, 1)
    ]
    scores = [  # the first caption is the better one in the first part, the second one in the second
        Score("a.mp4", 4, shares[sample if start == 0 else 1 - sample], 0, 0, sample=sample, start_seconds=start,
              end_seconds=end)
        for start, end in spans
        for sample in (0, 1)
    ]  # fmt: skip
    captions += [Caption("b.mp4", f"b {sample}", "Tell.", sample=sample, modality="visual") for sample in (0, 1)]
    scores += [Score("b.mp4", 4, shares[sample], 0, 0, sample=sample) for sample in (0, 1)]
    write_records(folder / "captions.jsonl", captions)
    write_scores(folder / "scores.jsonl", INFO, scores)
    found = [
        (one.chosen, one.rejected, one.start_seconds, one.modality) for one in read_preferences(folder).comparisons
    ]
    assert found == [
        ("0.0 0", "0.0 1", 0.0, "both"),
        ("5.0 1", "5.0 0", 5.0, "both"),
        ("b 0", "b 1", None, "visual"),
    ]


def test_judged_captions_of_a_round(folder):
    write_records(folder / "captions.jsonl", rated("a.mp4", [0, 0, 0])[0])
    event = Mention(Event("x"))
    scores = [
        Score("a.mp4", 4, 1, 0, 0, num_words=10, sample=0, mentions=(event,)),  # 0.25
        Score("a.mp4", 4, 1, 0, 0, num_words=10, num_repeated_words=5, sample=1),  # 0.25 + weight * 0.5
        Score("a.mp4", 4, 2, 0, 0, num_words=10, sample=2),  # 0.5
    ]
    write_scores(folder / "scores.jsonl", INFO, scores)
    read = read_preferences(folder, min_gap=0.3, repetition_weight=2.0)
    assert [(one.chosen, one.rejected, one.source) for one in read.comparisons] == [
        ("text 0", "text 1", "rule"),
        ("text 2", "text 1", "rule"),
    ]
    assert [one.margin for one in read.comparisons] == pytest.approx([1.0, 0.75])
    assert read.describe() == "2 comparisons of captions of 1 videos"


def test_captions_that_ratings_cannot_tell_apart(folder):
    """A video in two modalities, both sample 0: the last rating would count for both."""
    captions, ratings = rated("a.mp4", [0.5, 0.4])
    write_records(folder / "captions.jsonl", [*captions, replace(captions[0], modality="visual")])
    write_records(folder / "ratings.jsonl", ratings)
    with pytest.raises(ValueError, match=r"captions that cannot be distinguished: 2 of a\.mp4 have sample 0; number"):
        read_preferences(folder)
    write_records(folder / "captions.jsonl", captions)
    write_records(folder / "ratings.jsonl", [*ratings, ratings[1]])
    with pytest.raises(ValueError, match=r"ratings that cannot be distinguished: 2 of a\.mp4 have sample 1"):
        read_preferences(folder)


def test_what_cannot_be_used_is_counted(folder):
    rows = [
        Comparison("a.mp4", "Tell.", "x", "y"),
        Comparison("a.mp4", "Tell.", "x  z", "x z"),
        Comparison("c.mp4", "Tell.", "x", "y"),
        Comparison("", "Tell.", "x", "y"),
    ]
    write_records(folder / "pairs.jsonl", rows)
    read = read_preferences(folder / "pairs.jsonl")
    assert read.describe() == ("1 comparisons of captions of 1 videos; left out: equal answers (1), no video (2)")
    write_records(folder / "pairs.jsonl", rows[1:])
    with pytest.raises(ValueError, match=r"no comparisons that can be used: .*no video \(2\); paths of videos start"):
        read_preferences(folder / "pairs.jsonl")


def test_raters_are_counted(folder):
    """Of what people compared; a judge has no rater."""
    pair = Comparison("a.mp4", "Tell.", "x", "y", source="rule")
    votes = [replace(pair, source="vote", rater=rater) for rater in ("ann", "bob", "ann", "")]
    write_records(folder / "pairs.jsonl", [pair, *votes])
    assert read_preferences(folder / "pairs.jsonl").describe() == (
        "5 comparisons of captions of 1 videos; by people: 2 raters, 1 comparisons without a rater's id"
    )
    write_records(folder / "pairs.jsonl", [pair, votes[-1]])
    assert "by people: 0 raters, 1 comparisons without" in read_preferences(folder / "pairs.jsonl").describe()


def test_votes(folder):
    (folder / "videos").mkdir()
    (folder / "videos" / "v.mp4").touch()
    first, second = Candidate("m", "one", "Tell."), Candidate("n", "two", "Tell.")
    votes = [
        Feedback("d", "vote", "v", first, second, choice, kept_video=video, rater="ann")
        for choice, video in (("second", "v.mp4"), ("tie", "v.mp4"), ("both bad", ""), ("first", "w.mp4"))
    ]
    write_records(folder / "feedback.jsonl", votes)
    for path in (folder, folder / "feedback.jsonl"):
        read = read_preferences(path)
        assert read.comparisons == [Comparison("videos/v.mp4", "Tell.", "two", "one", source="vote", rater="ann")]
        assert read.left_out == {
            "neither caption was preferred": 1, "the video was not kept": 1, "no video": 1,
        }  # fmt: skip


def test_published_conversations(folder):
    turns = [{"from": "human", "value": "<video>\nTell."}, {"from": "chosen", "value": "x"}]
    turns += [{"from": "reject", "value": "y"}, {"from": "gpt", "value": "z"}]
    (folder / "dpo.json").write_text(json.dumps([{"video": "b.mp4", "conversations": turns}]))
    (comparison,) = read_preferences(folder / "dpo.json").comparisons
    assert (comparison.chosen, comparison.rejected, comparison.source) == ("x", "y", "published")


def test_rows_of_trl_and_reward_bench(folder):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Tell."}]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "More?"},
    ]
    answers = {name: [*messages, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = [
        {"video": "a.mp4", "prompt": "Tell.", "chosen": "x", "rejected": "y", "chosen_model": "", "id": 3},
        {"video": "b.mp4", "prompt": messages, **answers},
        {"video": "b.mp4", "question": "Tell.", "chosen": ["x"], "rejected": ["y", "z"], "num_correct": 1},
        {"prompt": "No video.", "chosen": "x", "reject": "y"},
        {"video": "a.mp4"} | answers,
    ]
    read = read_preferences(write_lines(folder / "rows.jsonl", rows))
    found = [(one.video, one.prompt, one.chosen, one.rejected) for one in read.comparisons]
    assert found == [
        ("a.mp4", "Tell.", "x", "y"),
        ("b.mp4", "More?", "chosen", "rejected"),
        ("b.mp4", "Tell.", "x", "y"),
        ("b.mp4", "Tell.", "x", "z"),
        ("a.mp4", "More?", "chosen", "rejected"),
    ]
    assert read.comparisons[1].history == read.comparisons[4].history == (("Tell.", "a"),) and read.left_out == {
        "no video": 1
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "x", "extra": 1}, "rejected missing: expected"),
        ({"chosen": "x", "rejected": "y"}, "prompt missing: expected"),
        (
            {"prompt": "x", "chosen": [], "rejected": "y"},
            "chosen must be a text, a list of texts or a list of messages",
        ),
        ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "x", "rejected": "y"}, "must alternate"),
        ({"prompt": "x", "chosen": [{"role": "user"}], "rejected": "y"}, "a message has no text"),
        ({"prompt": "x", "chosen": "x", "rejected": "y", "video": 3, "id": 1}, "video must be"),
        ({"prompt": "x", "chosen": "x", "rejected": "y", "videos": ["a", "b"]}, "videos must be a list of one path"),
    ],
)
def test_rows_that_are_refused(folder, row, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 1: .*{message}"):
        read_preferences(write_lines(folder / "rows.jsonl", [row]))


def test_files_of_rows_that_are_no_json_lines(folder):
    """A JSON list as rows.py reads it, of which one row has no better answer; and a binary file."""
    rows = [{"video": "a.mp4", "prompt": "Tell.", "chosen": text, "rejected": "y"} for text in ("x", "")]
    (folder / "rows.json").write_text(json.dumps(rows))
    read = read_preferences(folder / "rows.json")
    assert [one.chosen for one in read.comparisons] == ["x"] and read.left_out == {"an empty better answer": 1}
    assert read_preferences(write_lines(folder / "rows.jsonl", rows)).left_out == read.left_out
    (folder / "rows.parquet").write_bytes(b"PAR1\xff\xfe")
    with pytest.raises(ValueError, match="is a Parquet file: convert it to JSON lines"):
        read_preferences(folder / "rows.parquet")


def test_texts_are_checked_and_files_must_exist(folder):
    write_records(folder / "pairs.jsonl", [Comparison("a.mp4", "Tell.", "x", "y")])

    def check(comparison: Comparison) -> None:
        raise ValueError(f"cannot read {comparison.chosen}")

    with pytest.raises(ValueError, match=r"pairs.jsonl, comparison 1: cannot read x"):
        read_preferences(folder / "pairs.jsonl", check=check)
    with pytest.raises(FileNotFoundError, match=r"holds no preferences: expected captions\.jsonl"):
        read_preferences(folder)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        read_preferences(folder / "none.jsonl")
