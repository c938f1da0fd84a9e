"""Exported tables and subtitles: which lines count, what the files contain, and how much memory it takes."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet
import pytest

from salmonn.batch.dataset import DatasetWriter
from salmonn.batch.export import LatestCaptions, export_subtitles, export_table
from salmonn.batch.ledger_files import LedgerError, LedgerFiles, append_records
from salmonn.batch.subtitles import SubtitleWriter
from salmonn.caption.presets import DatasetLayout
from salmonn.files import read_records
from salmonn.records import Caption, Shaping
from tests.launch import forked

ODD = 'Two "lines",\nof text; 漢字 & <b>'


LOST = ("lost 0.5 s of audio at 2.0 s", 'no "end" is declared, so it was guessed')


def caption(video, text, *, start=None, end=None, size=5) -> Caption:
    return Caption(video, text, "Say.", "toy", 0, False, start, end, size_bytes=size, modified_ns=7)


def segments(video, text, *starts, size=5) -> list[Caption]:
    """Captions of the 2 s segments that start at these times."""
    made = (caption(video, f"{text} {start}", start=start, end=start + 2, size=size) for start in starts)
    return [replace(one, segment=number, num_segments=len(starts)) for number, one in enumerate(made)]


@pytest.fixture
def ledger(tmp_path):
    """Captions of three videos; b changed and has fewer segments since, c was retried."""
    path = tmp_path / "captions.jsonl"
    named = dict(captions={"short": ODD, "long": "Ä."}, shaping={"short": Shaping("cut", unwanted_words=("x",))})
    append_records(path, [replace(caption("a.mp4", ODD), **named)])
    append_records(path, segments("b.mp4", "old", 0.0, 2.0, 4.0))
    append_records(path, [caption("c.mp4", "first", start=0.0, end=2.0)])
    append_records(path, segments("b.mp4", "new", 0.0, 2.0, size=6))
    damaged = dict(complete=False, modality="visual", warnings=LOST)
    append_records(path, [replace(one, **damaged) for one in segments("c.mp4", "then", 0.0, 2.0)])
    return path


LATEST = [ODD, "new 0.0", "new 2.0", "then 0.0", "then 2.0"]


def test_only_the_latest_captions_count(ledger):
    latest = LatestCaptions([ledger])
    assert [one.text for one in latest] == LATEST and len(latest) == 5
    assert [[one.text for one in group] for group in latest.by_video()] == [LATEST[:1], LATEST[1:3], LATEST[3:]]
    assert list(LatestCaptions([])) == [] == list(LatestCaptions([]).by_video())


def test_the_latest_captions_of_several_files(ledger, tmp_path):
    """In the order given: a.mp4 was captioned again in the second file."""
    append_records(tmp_path / "captions-1-of-2.jsonl", [caption("a.mp4", "again")])
    assert [one.text for one in LatestCaptions([ledger, tmp_path / "captions-1-of-2.jsonl"])] == [*LATEST[1:], "again"]


def test_an_unfinished_video_is_left_out_and_reported(ledger, caplog):
    os.truncate(ledger, ledger.stat().st_size - 20)
    # The later captions of c are incomplete, so the earlier one counts.
    assert [one.text for one in LatestCaptions([ledger])] == [LATEST[0], "first", *LATEST[1:3]]
    assert "skipping the last video" in caplog.text and caplog.text.count("captions.jsonl") == 1


def test_tables(ledger, tmp_path):
    latest = LatestCaptions([ledger])
    expected = [asdict(one) for one in latest]
    for name in ("all.csv", "all.parquet", "new/all.jsonl"):
        export_table(latest, tmp_path / name)
    rows = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pylist()
    in_table = [
        row | {"captions": "", "shaping": "", "fusion": "", "structure": ""} for row in expected
    ]  # JSON, where there is something
    in_table[0]["captions"] = json.dumps({"short": ODD, "long": "Ä."}, ensure_ascii=False)
    in_table[0]["shaping"] = (
        '{"short": {"length": "cut", "missing_words": [], "unwanted_words": ["x"], "num_answers": 1, "language": null, '
        '"draft": null, "bare": null}}'
    )
    assert [row | {"warnings": tuple(row["warnings"])} for row in rows] == in_table
    assert [asdict(one) for one in read_records(tmp_path / "new" / "all.jsonl", Caption)] == expected
    with (tmp_path / "all.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in in_table:
        row["warnings"] = "\n".join(row["warnings"])  # one per line
    assert rows == [{name: "" if value is None else str(value) for name, value in row.items()} for row in in_table]
    assert [row["complete"] for row in rows] == ["True"] * 3 + ["False"] * 2
    assert rows[-1]["warnings"] == "\n".join(LOST) and rows[0]["warnings"] == ""
    kinds = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(tmp_path / "all.parquet")}
    assert kinds["sample"] == kinds["size_bytes"] == kinds["modified_ns"] == "int64"
    assert kinds["start_seconds"] == "double" and kinds["finished"] == "bool" and kinds["text"] == "string"
    assert kinds["complete"] == "bool" and kinds["modality"] == "string" and kinds["warnings"].startswith("list<")
    assert kinds["captions"] == kinds["shaping"] == "string"
    assert not list(tmp_path.glob(".*"))


def test_a_table_without_rows(tmp_path):
    for name in ("all.csv", "all.parquet", "all.jsonl"):
        export_table(LatestCaptions([]), tmp_path / name)
    assert pyarrow.parquet.read_table(tmp_path / "all.parquet").num_rows == 0
    assert (tmp_path / "all.csv").read_text().startswith("video,text,prompt,model,sample,finished,start_seconds,")


def test_errors_of_tables(ledger, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.csv, \.parquet, \.jsonl"):
        export_table(LatestCaptions([ledger]), tmp_path / "all.xlsx")
    with pytest.raises(ValueError, match="one of the captions files"):
        export_table(LatestCaptions([ledger]), tmp_path / "." / "captions.jsonl")
    ledger.write_text(json.dumps(asdict(caption("a.mp4", "words")) | {"size_bytes": "5"}) + "\n")
    (tmp_path / "all.csv").write_text("precious")
    with pytest.raises(LedgerError, match=r"captions\.jsonl: Caption\.size_bytes must be a valid integer"):
        export_table(LatestCaptions([ledger]), tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_text() == "precious" and not list(tmp_path.glob(".*"))


def test_subtitles_of_each_video(ledger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subtitles = SubtitleWriter(["txt"], log=tmp_path / "captions.subtitles.jsonl")
    assert export_subtitles(LatestCaptions([ledger]), subtitles) == (3, [])
    assert Path("b.txt").read_text() == "[00:00:00.000] new 0.0\n[00:00:02.000] new 2.0\n"


def test_captions_that_are_not_consecutive_are_gathered(ledger, tmp_path, monkeypatch):
    """For example after two retries that each added a segment."""
    monkeypatch.chdir(tmp_path)
    append_records(ledger, [caption("d.mp4", "d")])
    append_records(ledger, [caption("c.mp4", "at last", start=4.0, end=5.0)])
    append_records(ledger, [caption("e.mp4", "e")])
    append_records(ledger, [caption("c.mp4", "once more", start=0.0, end=2.0)])
    groups = [[one.text for one in group] for group in LatestCaptions([ledger]).by_video()]
    assert groups == [LATEST[:1], LATEST[1:3], ["d"], ["e"], ["once more", "then 2.0", "at last"]]
    assert export_subtitles(LatestCaptions([ledger]), SubtitleWriter(["txt"], log=tmp_path / "log.jsonl")) == (5, [])
    assert Path("c.txt").read_text().count("\n") == 3


def test_a_file_that_is_renamed_between_the_passes(ledger, tmp_path):
    """The same file is read again, even if another one has its name by now."""
    latest = LatestCaptions([ledger])
    append_records(ledger, [caption("f.mp4", "later")])
    ledger.rename(tmp_path / "captions.00001.jsonl")
    append_records(ledger, [caption("g.mp4", "another file")])
    for _ in range(2):
        assert [one.text for one in latest] == LATEST


def test_full_files_are_not_held_open(tmp_path):
    """There may be more than a process may open."""
    paths = [tmp_path / f"captions.{number:05d}.jsonl" for number in range(200)]
    for number, path in enumerate(paths):
        append_records(path, [caption(f"{number}.mp4", "words")])
    before = len(list(Path("/proc/self/fd").iterdir()))
    latest = LatestCaptions(paths)
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 100 and len(list(latest)) == 200


MANY = """
import sys
from pathlib import Path
import pyarrow.parquet
from salmonn.batch import export
from salmonn.batch.export import LatestCaptions, export_table
export.ROW_GROUP_SIZE = 100
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
latest = LatestCaptions([Path(sys.argv[1])])
export_table(latest, Path(sys.argv[2]))
print(len(latest), peak() - before)
"""


@pytest.mark.parametrize(("name", "limit"), [("all.csv", 25e6), ("all.parquet", 45e6)])
def test_many_captions_take_little_memory(tmp_path, name, limit):
    """The 4,000 captions of 10,000 characters would take 40 MB, and a row group of Parquet has 100 of them."""
    path, count = tmp_path / "captions.jsonl", 4000
    line = json.dumps(asdict(caption("NUMBER", "A red circle moves. " * 500)))
    with path.open("w") as file:
        file.writelines(line.replace("NUMBER", f"/data/{number % count:07d}.mp4") + "\n" for number in range(5000))
    command = forked(sys.executable, "-c", MANY, path, tmp_path / name)
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    exported, more = map(int, result.stdout.split())
    assert exported == count and more < limit


def test_samples_of_one_video_all_count(tmp_path):
    path = tmp_path / "captions.jsonl"
    append_records(path, [replace(caption("a.mp4", f"sample {number}"), sample=number) for number in range(3)])
    assert len(LatestCaptions([path])) == 3


def test_a_dataset_that_is_edited_during_a_run_is_kept(tmp_path):
    files, path = LedgerFiles(tmp_path / "captions.jsonl"), tmp_path / "dataset.json"
    append_records(files.captions, [caption(str(tmp_path / "a.mp4"), "A dog.")])
    layout = DatasetLayout("dataset.json", {"video": "{path}"})
    assert DatasetWriter(path, layout, files=files).write() == 1
    writer = DatasetWriter(path, layout, files=files)  # as a run that starts now
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"dataset.json exists and was not .*changed since.*captions are saved"):
        writer.write()
    assert path.read_text() == "mine" and not list(tmp_path.glob(".*"))
    assert DatasetWriter(path, layout, files=files, replace=True).write() == 1
