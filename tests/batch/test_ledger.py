"""The ledger on disk: resumed, torn, edited, sharded, on a full disk, and with a million videos."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import pytest

from salmonn.batch.discovery import Shard, VideoFile, stat_video
from salmonn.batch.ledger import Ledger
from salmonn.batch.ledger_files import FAILED_SUFFIX, GroupReader, LedgerError, LedgerFiles
from salmonn.records import Caption, Failure, read_records

JOB = {"model": "toy", "temperature": 0.0}


def caption(video="a.mp4", *, text="words", size=5, start=None, end=None) -> Caption:
    return Caption(video, text, start_seconds=start, end_seconds=end, size_bytes=size, modified_ns=7)


def segments(*captions: Caption, num_failed: int = 0) -> list[Caption]:
    """Captions of one video's segments, as a job numbers them."""
    counts = dict(num_segments=len(captions) + num_failed, num_failed_segments=num_failed)
    return [replace(one, segment=number, **counts) for number, one in enumerate(captions)]


def failure(video="a.mp4", *, size=5, start=None, stage="read") -> Failure:
    return Failure(video, "broken", stage, start_seconds=start, size_bytes=size, modified_ns=7)


@pytest.fixture
def files(tmp_path):
    return LedgerFiles(tmp_path / "captions.jsonl")


def opened(files, **options) -> Ledger:
    return Ledger(files, job=options.pop("job", JOB), **options)


def is_done(ledger: Ledger, video: VideoFile) -> bool:
    return ledger.status(video) in ("done", "failed in part")


def has_failed(ledger: Ledger, found: VideoFile | Failure) -> bool:
    return ledger.status(found) == "failed"


def has_failed_in_part(ledger: Ledger, video: VideoFile) -> bool:
    return ledger.status(video) == "failed in part"


def write(files, *groups, **options) -> None:
    with opened(files, **options) as ledger:
        for group in groups:
            ledger.write(group)


def test_written_videos_are_done(files):
    write(files, [caption()], [caption("b.mp4")])
    assert read_records(files.captions, Caption) == [caption(), caption("b.mp4")]
    with opened(files) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7)) and is_done(ledger, VideoFile("b.mp4", 5, 7))
        # Another file, or that one changed since.
        for video in (VideoFile("c.mp4", 5, 7), VideoFile("a.mp4", 6, 7), VideoFile("a.mp4", 5, 8), VideoFile("a.mp4")):
            assert not is_done(ledger, video) and not has_failed(ledger, video)


def test_all_lines_of_a_group_are_json(files):
    group = segments(caption(start=0.0, end=2.0), caption(start=2.0, end=4.0), caption(start=4.0, end=5.5))
    write(files, group, [caption("b.mp4")])
    assert read_records(files.captions, Caption) == [*group, caption("b.mp4")]
    text = files.captions.read_text()
    assert text.count("\n") == 4 and all(line == line.strip() for line in text.splitlines())
    assert [len(lines) for lines in GroupReader(files.captions)] == [3, 1]


@pytest.mark.parametrize("num_bytes", ["in a line", "after a line", "in the last line"])
def test_an_incomplete_group_is_cut_off(files, num_bytes):
    """Wherever a killed run broke off, together with the lines of the same video before."""
    write(files, [caption("a.mp4")])
    whole = files.captions.read_bytes()
    write(files, segments(caption("b.mp4", start=0.0), caption("b.mp4", start=2.0)))
    added = files.captions.read_bytes()[len(whole) :]
    first = added.index(b"\n") + 1
    kept = {"in a line": first + 9, "after a line": first, "in the last line": len(added) - 2}[num_bytes]
    os.truncate(files.captions, len(whole) + kept)
    with opened(files) as ledger:
        assert files.captions.read_bytes() == whole and ledger.num_cut_bytes == kept
        assert is_done(ledger, VideoFile("a.mp4", 5, 7)) and not is_done(ledger, VideoFile("b.mp4", 5, 7))


def write_as_an_editor_would(path: Path, change: str) -> None:
    """Change nothing but the white space around the lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    text = {
        "trim": "\n".join(line.rstrip() for line in lines) + "\n",
        "no newline at the end": "\n".join(lines),
        "indent": "".join(f"  {line}\t \n" for line in lines),
        "blank lines": "\n".join(f"{line}\n" for line in lines) + "\n \n\n",
        "carriage returns": "".join(f"{line}\r\n" for line in lines),
    }[change]
    path.write_bytes(text.encode())


EDITS = ["trim", "no newline at the end", "indent", "blank lines", "carriage returns"]


@pytest.mark.parametrize("change", EDITS)
def test_an_editor_that_changes_white_space_does_not_destroy_resume(files, change):
    """A whole video, one in segments, and two with failed segments; the failures of one of these are not recorded."""
    groups = {
        "a.mp4": segments(caption("a.mp4")),
        "b.mp4": segments(caption("b.mp4", start=0.0), caption("b.mp4", start=2.0)),
        "c.mp4": segments(caption("c.mp4", start=0.0), caption("c.mp4", start=4.0), num_failed=1),
        "d.mp4": segments(caption("d.mp4", start=0.0), num_failed=2),
    }
    with opened(files) as ledger:
        for group in groups.values():
            ledger.write(group)
        ledger.fail([failure("c.mp4", start=2.0)])
    for path in (files.captions, files.failed):
        write_as_an_editor_would(path, change)
    before = [group for group in GroupReader(files.captions)]
    assert [len(group) for group in before] == [1, 2, 2, 1]
    with opened(files) as ledger:
        assert ledger.num_cut_bytes == 0
        assert [is_done(ledger, VideoFile(video, 5, 7)) for video in groups] == [True, True, True, False]
        assert [has_failed_in_part(ledger, VideoFile(video, 5, 7)) for video in groups] == [False, False, True, False]
        ledger.write(groups["d.mp4"])
        ledger.fail([failure("d.mp4", start=2.0), failure("d.mp4", start=4.0)])
    assert read_records(files.captions, Caption) == [*chain(*groups.values()), *groups["d.mp4"]]
    assert len(read_records(files.failed, Failure)) == 3
    with opened(files) as ledger:
        assert all(is_done(ledger, VideoFile(video, 5, 7)) for video in groups) and ledger.num_cut_bytes == 0


@pytest.mark.parametrize("change", EDITS)
def test_an_incomplete_group_is_recognized_after_an_editor(files, change):
    """The file ends with the first of two segments, behind a complete video."""
    whole = segments(caption("a.mp4", start=0.0), caption("a.mp4", start=2.0))
    write(files, whole, segments(caption("b.mp4", start=0.0), caption("b.mp4", start=2.0)))
    text = files.captions.read_text()
    files.captions.write_text("".join(text.splitlines(keepends=True)[:3]))
    write_as_an_editor_would(files.captions, change)
    with opened(files) as ledger:
        assert ledger.num_cut_bytes > 0
        assert is_done(ledger, VideoFile("a.mp4", 5, 7)) and not is_done(ledger, VideoFile("b.mp4", 5, 7))
    assert read_records(files.captions, Caption) == whole


def test_a_deleted_line_makes_its_video_pending(files):
    """In the middle of the file; the videos before and after it are still done."""
    groups = [segments(*(caption(video, start=start) for start in (0.0, 2.0, 4.0))) for video in ("a.mp4", "b.mp4")]
    write(files, *groups, [caption("c.mp4")])
    lines = files.captions.read_text().splitlines(keepends=True)
    files.captions.write_text("".join(lines[:2] + lines[3:]))
    with opened(files) as ledger:
        assert ledger.num_cut_bytes == 0
        assert [is_done(ledger, VideoFile(f"{name}.mp4", 5, 7)) for name in "abc"] == [False, True, True]
        ledger.write(groups[0])
    with opened(files) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7))


def test_a_job_of_another_format_is_refused(files):
    write(files, [caption()])
    job = json.loads(files.job.read_text())
    assert job["format"] == 1
    for other in ({**job, "format": 2}, {name: value for name, value in job.items() if name != "format"}):
        files.job.write_text(json.dumps(other))
        with pytest.raises(LedgerError, match=r"has format (2|None), and this version reads 1: .*--overwrite"):
            opened(files)


def test_zeros_that_a_power_cut_left_are_cut_off(files):
    write(files, [caption()])
    whole = files.captions.read_bytes()
    files.captions.write_bytes(whole + bytes(100))
    with opened(files):
        assert files.captions.read_bytes() == whole


def test_what_another_shard_is_writing_is_left_alone(files):
    write(replace(files, shard=Shard(1, 2)), [caption("a.mp4")])
    other = replace(files, shard=Shard(1, 2)).captions
    other.write_bytes(other.read_bytes() + b'{"video": "b.m')
    before = other.read_bytes()
    with opened(files) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7)) and ledger.num_cut_bytes == 0
    assert other.read_bytes() == before


def test_shards_read_each_others_captions(files):
    for number in (1, 2):
        write(replace(files, shard=Shard(number, 2)), [caption(f"{number}.mp4")])
    assert [path.name for path in files.all_captions()] == ["captions-1-of-2.jsonl", "captions-2-of-2.jsonl"]
    # Another number of them since.
    with opened(replace(files, shard=Shard(3, 3))) as ledger:
        assert is_done(ledger, VideoFile("1.mp4", 5, 7)) and is_done(ledger, VideoFile("2.mp4", 5, 7))


def test_other_files_of_the_folder_are_not_read(files):
    write(files, [caption()])
    for name in ("captions-old.jsonl", "captions.jsonl.old", "captions2.jsonl", "captions.7.jsonl", "captions.txt"):
        files.out.with_name(name).write_text("precious")
    with opened(files) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7))
    assert LedgerFiles.of(files.out.with_name("captions-3-of-8.00002.jsonl")) == files == LedgerFiles.of(files.out)


def test_rotation(files):
    """Two lines a file: a group of one, of two, of three, which is never split, and of one."""
    groups = [
        [caption("a.mp4")],
        [caption("b.mp4", start=0.0), caption("b.mp4", start=1.0)],
        [caption("c.mp4", start=float(second)) for second in range(3)],
        [caption("d.mp4")],
    ]
    write(files, *groups[:2], lines_per_file=2)
    write(files, *groups[2:], lines_per_file=2)
    names = ["captions.00001.jsonl", "captions.00002.jsonl", "captions.00003.jsonl", "captions.jsonl"]
    assert sorted(path.name for path in files.all_captions()) == names
    assert [read_records(files.out.with_name(name), Caption) for name in names] == groups
    with opened(files) as ledger:
        assert all(is_done(ledger, VideoFile(f"{name}.mp4", 5, 7)) for name in "abcd")
    with pytest.raises(ValueError, match="--lines-per-file"):
        opened(files, lines_per_file=0)


def test_failed_files_are_skipped_until_they_change(files):
    with opened(files) as ledger:
        ledger.fail([failure("a.mp4"), failure("b.mp4", size=None)])
    with opened(files) as ledger:
        assert has_failed(ledger, VideoFile("a.mp4", 5, 7)) and not has_failed(ledger, VideoFile("a.mp4", 6, 7))
        assert has_failed(ledger, failure("a.mp4")) and not has_failed(ledger, failure("c.mp4"))
        assert not is_done(ledger, VideoFile("a.mp4", 5, 7))


def test_a_subtitle_file_that_failed_before_its_captions_were_written(files):
    """A kill between the two: the video is captioned."""
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


def test_the_span_is_part_of_what_is_known(files):
    """A caption from 2 s on is known by that."""
    write(files, [caption(start=2.0)], start_seconds=2.0)
    with opened(files, start_seconds=2.0) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7))


def test_a_retry_lists_what_failed_and_has_not_succeeded_since(files, tmp_path):
    """Fixed since; fixed and captioned; unchanged; a subtitle file of captions that exist; deleted."""
    for name in ("mended", "done", "same"):
        (tmp_path / f"{name}.mp4").write_bytes(b"12345678")
    now = {name: VideoFile(str(tmp_path / f"{name}.mp4"), 8, (tmp_path / f"{name}.mp4").stat().st_mtime_ns)
           for name in ("mended", "done", "same")}  # fmt: skip
    with opened(files) as ledger:
        ledger.fail([failure(now["mended"].path), failure(now["done"].path), failure(now["done"].path, stage="write")])
        ledger.fail([replace(failure(now["same"].path), size_bytes=8, modified_ns=now["same"].modified_ns)] * 2)
        ledger.fail([failure(str(tmp_path / "gone.mp4"))])
        ledger.write([replace(caption(now["done"].path), size_bytes=8, modified_ns=now["done"].modified_ns)])
    with opened(files) as ledger:
        assert list(ledger.to_retry()) == [now["mended"], now["same"], VideoFile(str(tmp_path / "gone.mp4"))]
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
        assert [video.path for video in ledger.to_retry(globs=["*.mp4"])] == [str(tmp_path / "sub" / "b.mp4")]


def test_lists_of_shards_become_one(files):
    for number in (1, 2):
        with opened(replace(files, shard=Shard(number, 2))) as ledger:
            ledger.fail([failure(f"{number}.mp4")])
    with opened(files) as ledger:
        ledger.replace_failures([failure("1.mp4")])
        assert [path.name for path in files.find(FAILED_SUFFIX)] == ["captions.failed.jsonl"]
    with opened(files) as ledger:
        ledger.replace_failures([])
    assert files.find(FAILED_SUFFIX) == []


def test_a_failure_that_was_half_written(files):
    with opened(files) as ledger:
        ledger.fail([failure("a.mp4")])
    with files.failed.open("a") as file:
        file.write('{"video": "b.mp4", "rea')
    with opened(files) as ledger:
        ledger.fail([failure("c.mp4")])
    assert [one.video for one in read_records(files.failed, Failure)] == ["a.mp4", "c.mp4"]


def test_captions_with_other_settings_are_not_mixed(files):
    write(files, [caption()])
    with pytest.raises(LedgerError, match=r"temperature 0\.0 \(now 1\.0\).*--overwrite"):
        opened(files, job=JOB | {"temperature": 1.0})
    assert json.loads(files.job.read_text()) == {"format": 1, **JOB}


def test_captions_of_somebody_else_are_not_touched(files):
    files.out.write_text("precious")
    with pytest.raises(LedgerError, match=r"captions\.job\.json, .* is missing: choose another --out"):
        opened(files)
    assert files.out.read_text() == "precious" and len(list(files.out.parent.iterdir())) == 1


def test_the_settings_are_saved_with_the_first_caption(files):
    with opened(files):
        assert not files.job.exists()
    opened(files, job={"model": "other"})


def test_overwrite_renames_everything(files):
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


def test_two_processes_do_not_write_the_same(files):
    with opened(files), pytest.raises(LedgerError, match="another process is writing"), opened(files):
        pass
    with opened(replace(files, shard=Shard(1, 2))), opened(replace(files, shard=Shard(2, 2))):
        pass


@pytest.mark.parametrize(("one", "other"), [((1, 1), (1, 2)), ((1, 2), (1, 1)), ((2, 8), (2, 18))])
@pytest.mark.parametrize("overwrite", [False, True])
def test_another_number_of_shards_at_the_same_time_is_refused(files, one, other, overwrite):
    """They would do the same videos; nor does --overwrite move aside what a shard is writing."""
    held, late = (replace(files, shard=Shard(*shard)) for shard in (one, other))
    with opened(held) as ledger:
        ledger.write([caption()])
        with pytest.raises(LedgerError, match="same number of shards"), opened(late, overwrite=overwrite):
            pass
        assert held.captions.exists()
    # The lock file stays, and no process holds it.
    with opened(late) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7))


def test_another_runs_files_are_not_ones_own(files):
    """Dates are no numbers of full files; and what looks like a shard or a full file may be signed as a run's own."""
    write(files, [caption()])
    others = [files.out.with_name(f"captions{part}.jsonl") for part in (".20260101", "-1-of-2", ".00001")]
    for other in others:
        write(LedgerFiles(other), [caption("b.mp4")], job={"model": "other"})
        with opened(LedgerFiles(other), job={"model": "other"}) as ledger:
            ledger.fail([failure("c.mp4")])
            with opened(files):
                pass
        assert LedgerFiles.of(other) == LedgerFiles(other)
    with opened(files) as ledger:
        assert not is_done(ledger, VideoFile("b.mp4", 5, 7)) and not has_failed(ledger, VideoFile("c.mp4", 5, 7))
        assert files.all_captions() == [files.out] and files.next_full().name == "captions.00001.jsonl"
    with opened(files, overwrite=True) as ledger:
        assert [path.name for path in ledger.moved] == ["captions.jsonl.old", "captions.job.json.old"]
    assert all(other.exists() for other in others)
    # A date is recognized, too.
    undated = files.out.with_name("captions.20260102.jsonl")
    undated.write_text("precious")
    assert undated not in files.all_captions()


def test_files_in_the_order_in_which_they_were_written(files):
    """Within a shard by their numbers, whatever their times are; several shards by their times."""
    folder = files.out.parent
    times = {"captions.00001.jsonl": 30, "captions.00002.jsonl": 10, "captions.jsonl": 20,
             "captions-1-of-2.00001.jsonl": 5, "captions-1-of-2.jsonl": 40}  # fmt: skip
    for name, seconds in times.items():
        (folder / name).touch()
        os.utime(folder / name, (seconds, seconds))
    assert [path.name for path in files.all_captions()] == [
        "captions-1-of-2.00001.jsonl", "captions.00001.jsonl", "captions.00002.jsonl", "captions.jsonl",
        "captions-1-of-2.jsonl",
    ]  # fmt: skip


def test_a_file_that_becomes_full_meanwhile(files, monkeypatch):
    """Another shard's, between its name's being listed and its being looked at; then, its being read."""
    other = replace(files, shard=Shard(1, 2))
    with opened(other, lines_per_file=1) as ledger:
        ledger.write([caption("a.mp4")])
    full = other.next_full()
    listed = LedgerFiles.find

    def then_rename(self, *args, **options):
        found = listed(self, *args, **options)
        if other.captions.exists() and other.captions in found:
            other.captions.rename(full)
        return found

    monkeypatch.setattr(LedgerFiles, "find", then_rename)
    assert files.all_captions() == [full]
    monkeypatch.undo()
    full.rename(other.captions)
    ordered = LedgerFiles.all_captions

    def then_rename_too(self):
        found = ordered(self)
        if other.captions in found:
            other.captions.rename(full)
        return found

    monkeypatch.setattr(LedgerFiles, "all_captions", then_rename_too)
    with opened(replace(files, shard=Shard(2, 2))) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7)) and full.exists()


def test_more_full_files_than_there_are_numbers(files):
    write(files, [caption()])
    files.out.with_name("captions.99999.jsonl").touch()
    with pytest.raises(LedgerError, match="increase --lines-per-file"):
        write(files, [caption("b.mp4")], lines_per_file=1)
    assert len(read_records(files.captions, Caption)) == 1


def test_a_name_that_no_record_can_hold_stays_in_a_retry(files, tmp_path):
    """As long as the file has it."""
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


def test_a_model_that_changed_in_its_folder(files):
    write(files, [caption()], job=JOB | {"model_files": "ab"})
    with pytest.raises(
        LedgerError, match=r"made with other files of the model \(they have changed since\): .*--overwrite"
    ):
        opened(files, job=JOB | {"model_files": "cd"})


def test_a_line_that_is_no_caption_is_named(files):
    write(files, [caption()])
    for line in ("no json", "[1]", '{"text": "a"}', "\xff"):
        whole = files.captions.read_bytes()
        files.captions.write_bytes(whole + line.encode("latin-1") + b"\n")
        with pytest.raises(LedgerError, match=r"captions\.jsonl: a line is"), opened(files):
            pass
        files.captions.write_bytes(whole)
    with pytest.raises(LedgerError, match="is a folder"):
        opened(LedgerFiles(files.out.parent))


FULL = """
import resource, sys
from pathlib import Path
from salmonn.batch.ledger_files import LedgerFiles
from salmonn.batch.ledger import Ledger
from salmonn.records import Caption
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with Ledger(LedgerFiles(Path(sys.argv[1])), job={"model": "toy"}) as ledger:
    for number in range(100):
        try:
            ledger.write([Caption(f"{number}.mp4", "words " * 20, start_seconds=float(part)) for part in range(2)])
        except ValueError as error:
            sys.exit(f"{number} {error}")
"""


def test_a_full_disk(files):
    """Of a file that may have 2000 bytes: whole groups are kept, and nothing of the one that had no room."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(files.out)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "cannot be written (File too large)" in result.stderr and "run the same command" in result.stderr
    kept = read_records(files.out, Caption)
    number = int(result.stderr.split()[0])
    assert 1 <= number < 10 and len(kept) == 2 * number and len({one.video for one in kept}) == number


MILLION = """
import resource, sys, time
from pathlib import Path
from salmonn.batch.ledger_files import LedgerFiles
from salmonn.batch.ledger import Ledger
from salmonn.batch.discovery import VideoFile
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, begin = peak(), time.perf_counter()
with Ledger(LedgerFiles(Path(sys.argv[1])), job={"model": "toy", "temperature": 0.0}) as ledger:
    print(time.perf_counter() - begin, peak() - before)
    videos = (VideoFile(f"/data/clips/{number:07d}.mp4", 5, 7) for number in range(0, 10**6, 99))
    assert all(ledger.status(video) == "done" for video in videos)
    assert ledger.status(VideoFile("/data/clips/1000000.mp4", 5, 7)) == "pending"
"""


def test_a_million_captions(files):
    """Known again in half a minute at most (10 s here), with 16 MB for them and some to gather and sort these."""
    files.job.write_text(json.dumps({"format": 1, **JOB}))
    line = json.dumps(asdict(caption("NUMBER", text="A red circle moves to the left. " * 3)))
    with files.out.open("w") as file:
        file.writelines(line.replace("NUMBER", f"/data/clips/{number:07d}.mp4") + "\n" for number in range(1_000_000))
    result = subprocess.run([sys.executable, "-c", MILLION, str(files.out)], capture_output=True, text=True, check=True)
    seconds, more = map(float, result.stdout.split())
    assert seconds < 30 and more < 50e6
