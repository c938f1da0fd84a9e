"""`salmonn export`: captions of all shards as tables and as subtitles."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.batch.ledger_files import append_records
from salmonn.files import read_records
from salmonn.records import Caption


def halves(text: str) -> list[Caption]:
    """Return captions of the two halves of a video of two seconds."""
    return [Caption("b.mp4", f"{text} {start}", start_seconds=start, end_seconds=start + 1) for start in (0.0, 1.0)]


@pytest.fixture
def captions(tmp_path, monkeypatch):
    """Captions files of two shards, the second one written last, and a list of failures."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        Path(name).touch()
    append_records(Path("captions-1-of-2.jsonl"), [Caption("a.mp4", "old", end_seconds=2.0)])
    append_records(Path("captions-1-of-2.jsonl"), halves("at"))
    append_records(Path("captions.jsonl"), [Caption("a.mp4", "new", end_seconds=2.0)])
    os.utime("captions-1-of-2.jsonl", ns=(0, 0))
    Path("captions-1-of-2.failed.jsonl").write_text('{"video": "c.mp4", "reason": "broken"}\n')
    return sorted(tmp_path.glob("captions*.jsonl"))


def test_tables(call, captions, tmp_path):
    """All files of a glob are read; the later caption of a.mp4 counts, whatever the files' names."""
    code, _, err = call("export", *captions, "--to", "all.csv", "all.parquet", "new/all.jsonl")
    assert code == 0 and "3 captions written to all.csv" in err and "3 captions written to new/all.jsonl" in err
    assert [one.text for one in read_records("new/all.jsonl", Caption)] == ["at 0.0", "at 1.0", "new"]
    with Path("all.csv").open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["at 0.0", "at 1.0", "new"]
    assert Path("all.parquet").read_bytes()[:4] == b"PAR1"


def test_files_beside_the_captions_are_no_captions(call, captions):
    """A glob also matches the shots, and the fused captions, which would be one more segment; alone these count."""
    append_records(Path("captions.jsonl"), halves("again"))
    Path("captions.shots.jsonl").write_text('{"video": "b.mp4", "bounds": [1.0]}\n')
    append_records(Path("captions.fused.jsonl"), [Caption("b.mp4", "fused", end_seconds=2.0)])
    code, _, err = call("export", *Path().glob("captions*.jsonl"), "--to", "all.jsonl")
    assert code == 0, err
    assert sorted(one.text for one in read_records("all.jsonl", Caption)) == ["again 0.0", "again 1.0", "new"]
    assert call("export", "captions.fused.jsonl", "--to", "all.jsonl")[0] == 0
    assert [one.text for one in read_records("all.jsonl", Caption)] == ["fused"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subtitle-dir", "subs"], "--subtitle-dir subs is for subtitles, which --to all.csv does not write"),
        (["--replace-subtitles"], "--replace-subtitles is for subtitles, which --to all.csv does not write"),
        (["--rows", "trl", "--replace-subtitles"], "--replace-subtitles is for subtitles, which --to all.csv does not"),
    ],
)
def test_options_of_subtitles_without_subtitles_are_refused(call, captions, flags, message):
    code, _, err = call("export", *captions, "--to", "all.csv", *flags)
    assert code == 2 and message in err and not Path("all.csv").exists()


def test_texts_beside_the_videos(call, captions):
    Path("a.srt").write_text("mine")
    code, _, err = call("export", *captions, "--to", "srt", "txt")
    assert code == 1 and Path("a.srt").read_text() == "mine" and "--replace-subtitles" in err
    assert "txt, srt files written for 2 videos, 1 file failed" in err
    assert Path("b.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:01,000\nat 0.0\n\n2\n00:00:01,000 --> 00:00:02,000\nat 1.0\n"
    )
    assert Path("a.txt").read_text() == "new\n"
    # What it wrote itself it replaces.
    append_records(Path("captions.jsonl"), halves("again"))
    Path("a.srt").unlink()
    captions = sorted(Path().glob("captions*.jsonl"))  # with the log of subtitle files
    assert call("export", "captions.jsonl", "--to", "srt")[0] == 0
    assert "again 1.0" in Path("b.srt").read_text() and "new" in Path("a.srt").read_text()
    assert call("export", *captions, "--to", "vtt", "--subtitle-dir", "subs")[0] == 0
    assert Path("subs/a.vtt").read_text() == "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\nnew\n"


def test_unnamed_files_of_the_same_run_are_reported(call, captions, tmp_path):
    """A run with full files has only a part of its captions in the last file; all of them can be given."""
    append_records(Path("captions.00001.jsonl"), [Caption("c.mp4", "full", end_seconds=2.0)])
    Path("other.jsonl").write_bytes(Path("captions.jsonl").read_bytes())
    code, _, err = call("export", "captions.jsonl", "--to", "all.csv")
    assert code == 0 and "1 caption written to all.csv" in err
    assert (
        "2 more files of the same run, such as captions-1-of-2.jsonl, not exported" in err
        and "name captions*.jsonl" in err
    )
    for names in (["other.jsonl"], Path().glob("captions*.jsonl")):
        code, _, err = call("export", *names, "--to", "all.csv")
        assert code == 0 and "not exported" not in err
    assert "4 captions written to all.csv" in err


def test_full_files_count_in_the_order_of_their_numbers(call, captions):
    """The file without a number is the last, whatever the modification times."""
    append_records(Path("captions.00001.jsonl"), [Caption("a.mp4", "older", end_seconds=2.0)])
    os.utime("captions.jsonl", ns=(1, 1))
    assert call("export", "captions.jsonl", "captions.00001.jsonl", "--to", "all.jsonl")[0] == 0
    assert [one.text for one in read_records("all.jsonl", Caption)] == ["new"]


def test_subtitles_of_captions_without_ends(call, videos, captions):
    """A worker process reads the durations of the videos."""
    append_records(Path("open.jsonl"), [Caption(str(videos[0]), "words")])
    assert call("export", "open.jsonl", "--to", "srt", "--subtitle-dir", "subs")[0] == 0
    (path,) = Path("subs").rglob("*.srt")
    assert "00:00:00,000 --> 00:00:0" in path.read_text() and "words" in path.read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["captions.jsonl", "--to", "all.xlsx"], ".csv, .parquet, .jsonl"),
        (["captions.jsonl", "--to", "doc"], "txt, srt, vtt"),
        (["captions.jsonl"], "to"),
        (["none.jsonl", "--to", "all.csv"], "none.jsonl: there is no such file"),
        (["captions.jsonl", "--to", "captions.jsonl"], "one of the captions files"),
        (["captions-1-of-2.failed.jsonl", "--to", "all.csv"], "contains no captions"),
        (["a.txt", "--to", "all.csv"], "a line is not valid JSON"),
    ],
)
def test_invalid_arguments(call, captions, args, message):
    Path("a.txt").write_text("text\n")
    before = Path("captions.jsonl").read_bytes()
    code, _, err = call("export", *args)
    assert code == 2 and message in err and "Traceback" not in err
    assert Path("captions.jsonl").read_bytes() == before and not Path("all.csv").exists()


def test_a_list_for_a_trainer(call, tmp_path, monkeypatch):
    """The captions of all shards in the columns of a preset."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    append_records(Path("captions-1-of-2.jsonl"), [Caption("clips/a.mp4", 'A "dog".', captions={"short": "Dog."})])
    append_records(Path("captions-2-of-2.jsonl"), [Caption("clips/b/c.mp4", "Ein Hund, grün.")])
    files = sorted(Path().glob("captions*.jsonl"))
    code, _, err = call("export", *files, "--preset", "ltx2", "--to", "clips/dataset.json")
    assert code == 0 and err == "2 clips listed in clips/dataset.json\n"
    rows = [{"caption": 'A "dog".', "video": "a.mp4"}, {"caption": "Ein Hund, grün.", "video": "b/c.mp4"}]
    assert json.loads(Path("clips/dataset.json").read_text(encoding="utf-8")) == rows
    Path("mine.yaml").write_text(
        "dataset: {file: a.csv, columns: {file: '{folder}/{name}', text: 'x, {caption}', brief: '{short}'}}\n"
    )
    assert call("export", files[0], "--preset", "mine.yaml", "--to", "all.csv")[0] == 0
    assert Path("all.csv").read_text() == 'file,text,brief\nclips/a,"x, A ""dog"".",Dog.\n'
    assert call("export", *files, "--preset", "ltx2", "--to", "all.jsonl")[0] == 0
    assert [json.loads(line)["video"] for line in Path("all.jsonl").read_text().splitlines()] == [
        "clips/a.mp4", "clips/b/c.mp4",
    ]  # fmt: skip
    append_records(files[0], [replace(one, segment=n, num_segments=2) for n, one in enumerate(halves("in"))])
    for args, message in {
        (*files, "--preset", "mine.yaml", "--to", "all.csv"): "clips/b/c.mp4 has no caption named 'short'",
        (files[0], "--preset", "ltx2", "--to", "all.json"): "b.mp4 was captioned in segments",
        (files[1], "--preset", "ltx2", "--to", "clips/b/c/d.json"): "lies outside",
        (*files, "--preset", "plain", "--to", "all.json"): "--preset plain has no file that lists videos",
        (*files, "--preset", "ltx2", "--to", "all.xml"): "--to names one file that ends in .json, .jsonl, .csv",
    }.items():
        code, _, err = call("export", *args)
        assert code == 2 and message in err.splitlines()[-1], err
    assert not Path("all.json").exists() and not list(Path().glob(".*"))


def test_a_list_for_a_trainer_replaces_only_what_export_wrote(call, tmp_path, monkeypatch):
    """Neither the captions themselves, nor what lies beside them, nor what somebody else wrote or changed."""
    monkeypatch.chdir(tmp_path)
    append_records(Path("captions.jsonl"), [Caption("a.mp4", "A dog.")])
    Path("captions.failed.jsonl").write_text('{"video": "c.mp4", "reason": "broken"}\n')
    before = {path: path.read_bytes() for path in Path().iterdir()}
    args = ("export", "captions.jsonl", "--preset", "ltx2", "--to")
    for name in ("captions.jsonl", "captions.failed.jsonl", "captions.fused.jsonl", tmp_path / "captions.job.json"):
        code, _, err = call(*args, name)
        assert code == 2 and "is one of the captions files, or of the files next to them" in err
    code, _, err = call(*args, "dataset.json", "--subtitle-dir", "subs")
    assert code == 2 and "--subtitle-dir is for subtitles" in err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    assert call(*args, "dataset.json")[0] == call(*args, "dataset.json")[0] == 0
    Path("dataset.json").write_text("mine")
    code, _, err = call(*args, "dataset.json")
    assert code == 2 and "dataset.json exists and was not written by this run, or has been changed since" in err
    assert Path("dataset.json").read_text() == "mine"
    assert call(*args, "dataset.json", "--replace-subtitles")[0] == 0
    assert json.loads(Path("dataset.json").read_text()) == [{"caption": "A dog.", "video": "a.mp4"}]
