"""Output of `salmonn caption`: tables, stdout, subtitles and segments, and what is shown while it runs."""

import os
import re

import pytest

from salmonn.batch.segment_logs import ShotBounds
from salmonn.files import read_records, write_records
from salmonn.records import Caption, Failure
from tests.batch.ledger_records import EACH_ONCE, names
from tests.media.builders import BASE, write_media
from tests.truncated import write_truncated


@pytest.fixture
def shots(tmp_path):
    """A folder with a video of six shots, a second each, and a file of sound."""
    pytest.importorskip("scenedetect")
    folder = tmp_path / "shots"
    folder.mkdir()
    write_media(folder / "a.mp4", **BASE)
    write_media(folder / "b.m4a", audio=(0, 2))
    return folder


@pytest.mark.parametrize("segments", [False, True])
def test_captions_of_damaged_files_are_marked_and_counted(folder, caption, videos, tmp_path, segments):
    """A truncated file, whole or in segments; in segments, only the last one lacks a part."""
    write_truncated(videos[0], folder / "truncated.mkv")
    options = ["--segments", 2] if segments else []
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
    assert code == 0 and "6 videos already done" in err and (tmp_path / f"captions.{name}").read_bytes() == table


def test_captions_on_stdout(folder, call, random_model, tmp_path, monkeypatch):
    """They are those of a file, and no file is left; failures are printed."""
    monkeypatch.chdir(tmp_path)
    (folder / "bad.mp4").write_bytes(b"12345")
    args = ("caption", folder, "--model", random_model, "--max-new-tokens", 6, "--workers", 1, "--quiet")
    code, out, err = call(*args, "--out", "-")
    assert code == 1 and err.startswith("failed: ") and err.count("\n") == 1 and "bad.mp4" in err
    assert list(tmp_path.iterdir()) == [folder]
    assert call(*args, "--out", "captions.jsonl")[1] == ""
    assert out == (tmp_path / "captions.jsonl").read_text() and out.count("\n") == 6


def test_quiet(folder, caption):
    assert caption(folder, "--quiet", "--export", "csv", "--workers", 1) == (0, "")


def test_limit(folder, caption, tmp_path):
    """Each run captions at most N more."""
    for expected in (4, 6):
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
    assert out == "would caption 6 videos (0.00 GiB) of 6\n1 file skipped because of the suffix: 1 .txt\n"
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
    assert code == 0 and "would caption 2 videos" in out and "of 6\n4 videos already done, skipped\n" in out
    os.truncate(tmp_path / "captions.jsonl", (tmp_path / "captions.jsonl").stat().st_size - 5)
    torn = (tmp_path / "captions.jsonl").read_bytes()
    out = call("caption", folder, "--out", tmp_path / "captions.jsonl", "--dry-run", *caption.model)[1]
    assert "would caption 3 videos" in out and (tmp_path / "captions.jsonl").read_bytes() == torn


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
    code, _ = caption(folder / "0.mp4", "--segments", 1, "--export", "srt", "vtt", "txt", "csv", "parquet",
                      "--subtitle-dir", tmp_path / "subs")  # fmt: skip
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    assert code == 0 and [one.start_seconds for one in captions] == [0.0, 1.0]
    srt = (tmp_path / "subs" / str(folder).lstrip("/") / "0.srt").read_text()
    times = [tuple(map(float, re.findall(r"(\d\d)[,\n]", line))) for line in srt.splitlines() if "-->" in line]
    assert srt.count(" --> ") == len(captions) and times
    assert "00:00:00,000 --> 00:00:01,000" in srt and captions[0].text.split()[0] in srt
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
    assert all(end and 1.5 < end < 2.5 for end in ends)
    # The next run reports it, too.
    code, err = caption(folder, "--glob", "[01].mp4", "--export", "srt")
    assert code == 1 and "3 videos already done, skipped" in err
    assert "1 video skipped: failed in earlier runs, at least in part" in err
    text = (folder / "0.srt").read_text()
    assert text.startswith("1\n00:00:00,000 --> 00:00:") and (folder / "more" / "1.srt").exists()
    code, err = caption("--retry-failed", "--replace-subtitles", "--export", "srt")
    assert code == 0 and (folder / "1.srt").read_text().startswith("1\n00:00:00,000 --> ")
    assert not (tmp_path / "captions.failed.jsonl").exists()


def test_shots_with_subtitles(shots, caption, tmp_path):
    """Each shot is a caption and a cue; the shots are recorded, and a file without video fails with the reason."""
    code, err = caption(shots, "--segments", "shots", "--export", "srt", "vtt", "--subtitle-dir", tmp_path / "subs")
    assert code == 1 and "b.m4a: has no video and so no shots; caption audio files in a separate run" in err
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    assert [one.start_seconds for one in captions] == pytest.approx([0, 1, 2, 3, 4, 5], abs=0.01)
    assert [one.end_seconds for one in captions] == pytest.approx([1, 2, 3, 4, 5, 6], abs=0.06)
    (subtitles,) = (tmp_path / "subs").rglob("*.srt")
    assert "\n00:00:01,000 --> 00:00:02,000\n" in subtitles.read_text() and "\n6\n00:00:05," in subtitles.read_text()
    (found,) = read_records(tmp_path / "captions.shots.jsonl", ShotBounds)
    assert found.bounds == (0.0, *(one.end_seconds for one in captions))


def test_a_run_that_resumes_has_the_same_shots(shots, caption, tmp_path):
    """The shots that a killed run recorded are used: here others than there are. A changed file is searched again."""
    video = shots / "a.mp4"
    status = video.stat()
    known = ShotBounds(str(video), (0.0, 2.5, 6.0), status.st_size, status.st_mtime_ns)
    write_records(tmp_path / "captions.shots.jsonl", [known])
    assert caption(video, "--segments", "shots")[0] == 0
    assert [one.end_seconds for one in read_records(tmp_path / "captions.jsonl", Caption)] == [2.5, 6.0]
    os.utime(video, (1, 1))
    assert caption(video, "--segments", "shots")[0] == 0
    assert len(read_records(tmp_path / "captions.jsonl", Caption)) == 2 + 6
    assert caption(video, "--segments", "shots")[1].count("1 video already done") == 1
    code, err = caption(video, "--segments", "shots", "--min-shot", 2)
    assert code == 2 and "min-shot null (now 2.0)" in err
    assert caption(video, "--segments", "shots", "--min-shot", 2, "--overwrite")[0] == 0
    assert len(read_records(tmp_path / "captions.jsonl", Caption)) == 3
    assert (tmp_path / "captions.shots.jsonl.old").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-shot", "2"], "--min-shot needs --segments shots"),
        (["--segments", "5", "--shot-detector", "pyscenedetect"], "--shot-detector needs --segments shots"),
        (["--segments", "shots", "--min-shot", "-1"], "shortest shot must be 0 s or more, got -1"),
        (["--segments", "shot"], "segments"),
    ],
)
def test_options_of_shots_are_checked(shots, caption, flags, message):
    code, err = caption(shots, *flags)
    assert code == 2 and message in err
