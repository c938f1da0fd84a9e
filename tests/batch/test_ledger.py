"""The ledger: which videos are done or failed, retries, settings, and a million captions."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from salmonn.batch.discovery import VideoFile, VideoListing, stat_video
from salmonn.batch.ledger_files import LedgerError
from salmonn.files import read_records
from salmonn.records import Caption, Failure
from tests.batch.ledger_records import (
    JOB,
    caption,
    failure,
    has_failed,
    is_done,
    opened,
    write,
)
from tests.limits import RUN_SECONDS


def test_written_videos_are_done(files):
    write(files, [caption()], [caption("b.mp4")])
    assert read_records(files.captions, Caption) == [caption(), caption("b.mp4")]
    with opened(files) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7)) and is_done(ledger, VideoFile("b.mp4", 5, 7))
        # Another file, or that one changed since.
        for video in (VideoFile("c.mp4", 5, 7), VideoFile("a.mp4", 6, 7), VideoFile("a.mp4", 5, 8), VideoFile("a.mp4")):
            assert not is_done(ledger, video) and not has_failed(ledger, video)


def test_a_job_of_another_format_is_rejected(files):
    write(files, [caption()])
    job = json.loads(files.job.read_text())
    assert job["format"] == 1
    for other in ({**job, "format": 2}, {name: value for name, value in job.items() if name != "format"}):
        files.job.write_text(json.dumps(other))
        with pytest.raises(LedgerError, match=r"has format (2|None), and this version reads 1: .*--overwrite"):
            opened(files)


def test_failed_files_are_skipped_until_they_change(files):
    with opened(files) as ledger:
        ledger.fail([failure("a.mp4"), failure("b.mp4", size=None)])
    with opened(files) as ledger:
        assert has_failed(ledger, VideoFile("a.mp4", 5, 7)) and not has_failed(ledger, VideoFile("a.mp4", 6, 7))
        assert has_failed(ledger, failure("a.mp4")) and not has_failed(ledger, failure("c.mp4"))
        assert not is_done(ledger, VideoFile("a.mp4", 5, 7))


def test_a_failed_subtitle_file_without_captions_leaves_the_video_pending(files):
    """The run was killed between the two; the video is captioned again."""
    with opened(files) as ledger:
        ledger.fail([failure(stage="write")])
    with opened(files) as ledger:
        assert ledger.status(VideoFile("a.mp4", 5, 7)) == "pending"


def test_a_failed_segment_is_outstanding_until_it_succeeds(files, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"12345")
    known = dict(size_bytes=5, modified_ns=path.stat().st_mtime_ns)
    video = VideoFile(str(path), **known)
    ok = [replace(caption(str(path), start=start), **known) for start in (0.0, 4.0)]
    bad = replace(failure(str(path), start=2.0), **known)
    with opened(files) as ledger:
        ledger.fail([bad])
        ledger.write(ok)
    with opened(files) as ledger:
        assert is_done(ledger, video) and list(ledger.to_retry()) == [video]
        ledger.write([ok[0], replace(caption(str(path), start=2.0), **known), ok[1]])
    with opened(files) as ledger:  # killed before it replaced the list
        assert list(ledger.to_retry()) == []


def test_the_start_of_the_span_identifies_a_caption(files):
    """A caption from 2 s on, in a run that starts there."""
    write(files, [caption(start=2.0)], start_seconds=2.0)
    with opened(files, start_seconds=2.0) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7))


def test_a_retry_lists_outstanding_failures(files, tmp_path):
    """A file that was fixed, one that was fixed and captioned (without subtitles), an unchanged, a deleted one."""
    for name in ("fixed", "done", "same"):
        (tmp_path / f"{name}.mp4").write_bytes(b"12345678")
    now = {name: VideoFile(str(tmp_path / f"{name}.mp4"), 8, (tmp_path / f"{name}.mp4").stat().st_mtime_ns)
           for name in ("fixed", "done", "same")}  # fmt: skip
    with opened(files) as ledger:
        ledger.fail([failure(now["fixed"].path), failure(now["done"].path), failure(now["done"].path, stage="write")])
        ledger.fail([replace(failure(now["same"].path), size_bytes=8, modified_ns=now["same"].modified_ns)] * 2)
        ledger.fail([failure(str(tmp_path / "gone.mp4"))])
        ledger.write([replace(caption(now["done"].path), size_bytes=8, modified_ns=now["done"].modified_ns)])
    with opened(files) as ledger:
        assert list(ledger.to_retry()) == [now["fixed"], now["same"], VideoFile(str(tmp_path / "gone.mp4"))]
        assert [one.video for one in ledger.unwritten()] == [now["done"].path]
        ledger.replace_failures([failure(now["same"].path)])
    assert read_records(files.failed, Failure) == [failure(now["same"].path)]


def test_a_folder_that_could_not_be_listed_is_listed_again(files, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "b.mp4", "c.wav"):
        (tmp_path / "sub" / name).write_bytes(b"12345")
    time_ns = (tmp_path / "sub" / "a.mp4").stat().st_mtime_ns
    with opened(files) as ledger:
        ledger.fail([failure(str(tmp_path / "sub"), size=None)])
        ledger.write([replace(caption(str(tmp_path / "sub" / "a.mp4")), modified_ns=time_ns)])
    with opened(files) as ledger:
        assert [video.path for video in ledger.to_retry(VideoListing(globs=["*.mp4"]))] == [
            str(tmp_path / "sub" / "b.mp4")
        ]


def test_other_settings_are_rejected(files):
    write(files, [caption()])
    with pytest.raises(LedgerError, match=r"temperature 0\.0 \(now 1\.0\).*--overwrite"):
        opened(files, job=JOB | {"temperature": 1.0})
    assert json.loads(files.job.read_text()) == {"format": 1, **JOB}


def test_settings_that_an_older_version_lacks(files):
    """They resume its job as long as they are off."""
    write(files, [caption()])
    opened(files, job=JOB | {"stop": [], "logprobs": False})
    with pytest.raises(LedgerError, match=r'stop null \(now \["\."\]\)'):
        opened(files, job=JOB | {"stop": ["."]})


def test_a_file_without_its_settings_is_not_changed(files):
    files.out.write_text("precious")
    with pytest.raises(LedgerError, match=r"captions\.job\.json, .* is missing: choose another --out"):
        opened(files)
    assert files.out.read_text() == "precious" and len(list(files.out.parent.iterdir())) == 1


def test_the_settings_are_saved_with_the_first_caption(files):
    with opened(files):
        assert not files.job.exists()
    opened(files, job={"model": "other"})


def test_overwriting_renames_all_files(files):
    for _ in range(3):
        with opened(files, job={"model": "other"}, overwrite=True) as ledger:
            assert not is_done(ledger, VideoFile("a.mp4", 5, 7))
            ledger.write([caption()])
            ledger.fail([failure("b.mp4")])
    names = ["captions.jsonl", "captions.jsonl.old", "captions.jsonl.old.1"]
    assert sorted(path.name for path in files.out.parent.glob("captions.jsonl*")) == names
    assert [path.name for path in ledger.moved] == [
        "captions.jsonl.old.1", "captions.failed.jsonl.old.1", "captions.job.json.old.1"
    ]  # fmt: skip


def test_a_name_that_is_not_utf8_stays_in_a_retry(files, tmp_path):
    """As long as the file has that name."""
    raw = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    raw.touch()
    found = stat_video(str(raw))
    with opened(files) as ledger:
        ledger.fail([found])
    with opened(files) as ledger:
        assert list(ledger.to_retry()) == [found] and "UTF-8" in found.reason
    raw.unlink()
    with opened(files) as ledger:
        assert list(ledger.to_retry()) == [VideoFile(found.video)]


def test_a_name_that_is_too_long_stays_in_a_retry(files):
    name = "x" * 5000 + ".mp4"
    with opened(files) as ledger:
        ledger.fail([failure(name, size=None)])
    with opened(files) as ledger:
        assert list(ledger.to_retry()) == [VideoFile(name)]


def test_a_model_that_was_trained_further_is_rejected(files):
    write(files, [caption()], job=JOB | {"model_files": "ab"})
    with pytest.raises(
        LedgerError, match=r"made with other files of the model \(they have changed since\): .*--overwrite"
    ):
        opened(files, job=JOB | {"model_files": "cd"})


MANY = """
import sys
from pathlib import Path
from salmonn.batch.ledger_files import LedgerFiles
from salmonn.batch.ledger import Ledger
from salmonn.batch.discovery import VideoFile
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before, count = peak(), int(sys.argv[2])
with Ledger(LedgerFiles(Path(sys.argv[1])), job={"model": "toy", "temperature": 0.0}) as ledger:
    print(peak() - before)
    videos = (VideoFile(f"/data/clips/{number:07d}.mp4", 5, 7) for number in range(0, count, 99))
    assert all(ledger.status(video) == "done" for video in videos)
    assert ledger.status(VideoFile(f"/data/clips/{count:07d}.mp4", 5, 7)) == "pending"
"""


@pytest.mark.parametrize("count", [60_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_captions(files, count):
    """16 bytes of memory for each, and at most twice as much to collect and sort them."""
    files.job.write_text(json.dumps({"format": 1, **JOB}))
    line = json.dumps(asdict(caption("NUMBER", text="A red circle moves to the left. " * 3)))
    with files.out.open("w") as file:
        file.writelines(line.replace("NUMBER", f"/data/clips/{number:07d}.mp4") + "\n" for number in range(count))
    command = [sys.executable, "-c", MANY, str(files.out), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=RUN_SECONDS)
    assert int(result.stdout) < 50 * count
