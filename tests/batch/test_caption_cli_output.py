"""Output of `salmonn caption`: tables, stdout, subtitles and segments, and what is shown while it runs."""

import os
import re

import pytest

from salmonn.records import Caption, Failure, read_records
from tests.batch.ledger_records import EACH_ONCE, names
from tests.truncated import write_truncated


@pytest.mark.parametrize("segments", [False, True])
def test_captions_of_damaged_files_are_marked_and_counted(folder, caption, videos, tmp_path, segments):
    """A truncated file, whole or in segments; in segments, only the last one lacks a part."""
    write_truncated(videos[0], folder / "truncated.mkv")
    options = ["--segment-seconds", 2] if segments else []
    code, err = caption(folder, "--export", "csv", *options)
    assert code == 0 and "0 videos failed" in err and "\n1 caption of damaged or truncated files" in err
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    (damaged,) = [one for one in captions if not one.complete]
    assert damaged.video == str(folder / "truncated.mkv") and damaged.segment == damaged.num_segments - 1
    assert "truncated" in "".join(damaged.warnings) and {one.modality for one in captions} == {"both"}
    assert (tmp_path / "captions.csv").read_text().count("truncated: it ends") == 1


def test_names_of_255_bytes_with_subtitles(folder, caption, tmp_path):
    long = folder / f"{'x' * 251}.mp4"
    os.link(folder / "0.mp4", long)
    code, err = caption(long, "--export", "txt", "srt")
    assert code == 0 and "1 caption written" in err and "0 videos failed" in err
    assert long.with_suffix(".txt").exists() and long.with_suffix(".srt").exists()


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_out_may_name_a_table(folder, caption, tmp_path, name):
    """It is written at the end from the JSONL file beside it, from which the same command resumes."""
    code, err = caption(folder, out=f"captions.{name}")
    assert (
        code == 0 and f"wrote {tmp_path}/captions.{name}\n" in err and names(tmp_path / "captions.jsonl") == EACH_ONCE
    )
    table = (tmp_path / f"captions.{name}").read_bytes()
    assert table.startswith({"csv": b"video,text,", "parquet": b"PAR1"}[name])
    code, err = caption(folder, out=f"captions.{name}")
    assert code == 0 and "10 videos already done" in err and (tmp_path / f"captions.{name}").read_bytes() == table


def test_captions_on_stdout(folder, call, random_model, tmp_path, monkeypatch):
    """They are those of a file, and no file is left; failures are printed."""
    monkeypatch.chdir(tmp_path)
    (folder / "bad.mp4").write_bytes(b"12345")
    args = ("caption", folder, "--model", random_model, "--max-new-tokens", 6, "--workers", 1, "--quiet")
    code, out, err = call(*args, "--out", "-")
    assert code == 1 and err.startswith("failed: ") and err.count("\n") == 1 and "bad.mp4" in err
    assert list(tmp_path.iterdir()) == [folder]
    assert call(*args, "--out", "captions.jsonl")[1] == ""
    assert out == (tmp_path / "captions.jsonl").read_text() and out.count("\n") == 10


def test_quiet(folder, caption):
    assert caption(folder, "--quiet", "--export", "csv") == (0, "")


def test_limit(folder, caption, tmp_path):
    """Each run captions at most N more."""
    for expected in (4, 8, 10):
        assert caption(folder, "--limit", 4)[0] == 0
        assert len(names(tmp_path / "captions.jsonl")) == expected
    code, err = caption("--retry-failed", "--limit", 4)
    assert code == 2 and "without --limit" in err


def test_a_dry_run_counts_and_writes_nothing(folder, call, caption, tmp_path):
    (folder / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    args = ("caption", folder, "--out", tmp_path / "new" / "captions.jsonl", "--dry-run")
    code, out, err = call(*args)
    assert code == 0 and not err and sorted(tmp_path.rglob("*")) == before
    assert out == "would caption 10 videos (0.00 GiB) of 10\n1 file skipped because of the suffix: 1 .txt\n"
    assert call(*args, "--limit", 3)[1].startswith("would caption 3 videos")
    assert caption(folder, "--limit", 4)[0] == 0
    code, out, _ = call(
        "caption",
        folder,
        "--out",
        tmp_path / "captions.jsonl",
        "--dry-run",
        *caption.model,  # the same settings
    )
    assert code == 0 and "would caption 6 videos" in out and "of 10\n4 videos already done, skipped\n" in out
    os.truncate(tmp_path / "captions.jsonl", (tmp_path / "captions.jsonl").stat().st_size - 5)
    torn = (tmp_path / "captions.jsonl").read_bytes()
    out = call("caption", folder, "--out", tmp_path / "captions.jsonl", "--dry-run", *caption.model)[1]
    assert "would caption 7 videos" in out and (tmp_path / "captions.jsonl").read_bytes() == torn


def test_frames(folder, caption, tmp_path):
    """A change of them changes the captions, so a run with other ones does not resume."""
    assert caption(folder / "0.mp4")[0] == 0
    code, err = caption(folder / "0.mp4", "--frames", 2)
    assert code == 2 and "frames null (now 2)" in err
    assert caption(folder / "0.mp4", "--frames", 2, out="two.jsonl")[0] == 0
    (usual,), (two,) = (read_records(tmp_path / name, Caption) for name in ("captions.jsonl", "two.jsonl"))
    assert usual.text != two.text


def test_segments_with_subtitles_and_tables(folder, caption, tmp_path):
    """Each segment is a cue; the subtitle folder mirrors the folder of the videos."""
    code, _ = caption(folder / "0.mp4", "--segment-seconds", 2, "--export", "srt", "vtt", "txt", "csv", "parquet",
                      "--subtitle-dir", tmp_path / "subs")  # fmt: skip
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    assert code == 0 and len(captions) >= 2
    assert [one.start_seconds for one in captions] == [2.0 * number for number in range(len(captions))]
    srt = (tmp_path / "subs" / str(folder).lstrip("/") / "0.srt").read_text()
    times = [tuple(map(float, re.findall(r"(\d\d)[,\n]", line))) for line in srt.splitlines() if "-->" in line]
    assert srt.count(" --> ") == len(captions) and times
    assert "00:00:00,000 --> 00:00:02,000" in srt and captions[0].text.split()[0] in srt
    assert (tmp_path / "captions.csv").exists() and (tmp_path / "captions.parquet").exists()
    assert not list(folder.glob("*.srt"))


def test_subtitles_beside_the_videos(folder, caption, tmp_path):
    """Cues of whole videos have an end; a file of the user is not overwritten and counts as a failure."""
    (folder / "1.srt").write_text("mine")
    code, err = caption(folder, "--glob", "[01].mp4", "--export", "srt")
    assert code == 1 and (folder / "1.srt").read_text() == "mine" and "--replace-subtitles" in err
    (failure,) = read_records(tmp_path / "captions.failed.jsonl", Failure)
    assert failure.stage == "write" and failure.video == str(folder / "1.mp4")
    assert len(read_records(tmp_path / "captions.jsonl", Caption)) == 4
    ends = [one.end_seconds for one in read_records(tmp_path / "captions.jsonl", Caption)]
    assert all(end and end > 1 for end in ends)
    # The next run reports it, too.
    code, err = caption(folder, "--glob", "[01].mp4", "--export", "srt")
    assert code == 1 and "3 videos already done, skipped" in err
    assert "1 video skipped: failed in earlier runs, at least in part" in err
    text = (folder / "0.srt").read_text()
    assert text.startswith("1\n00:00:00,000 --> 00:00:") and (folder / "more" / "1.srt").exists()
    code, err = caption("--retry-failed", "--replace-subtitles", "--export", "srt")
    assert code == 0 and (folder / "1.srt").read_text().startswith("1\n00:00:00,000 --> ")
    assert not (tmp_path / "captions.failed.jsonl").exists()
