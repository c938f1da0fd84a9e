"""The files of a run: shards, full files, locks, and files of other runs in the same folder."""

import fcntl
import os
from dataclasses import replace

import pytest

from salmonn.batch.discovery import Shard, VideoFile
from salmonn.batch.ledger_files import FAILED_SUFFIX, LedgerError, LedgerFiles
from salmonn.files import read_records
from salmonn.records import Caption
from tests.batch.ledger_records import caption, failure, has_failed, is_done, opened, write


def test_a_torn_line_of_another_shard_stays(files):
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


def test_other_files_in_the_folder_are_not_read(files):
    write(files, [caption()])
    for name in ("captions-old.jsonl", "captions.jsonl.old", "captions2.jsonl", "captions.7.jsonl", "captions.txt"):
        files.out.with_name(name).write_text("precious")
    with opened(files) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7))
    assert LedgerFiles.of(files.out.with_name("captions-3-of-8.00002.jsonl")) == files == LedgerFiles.of(files.out)


def test_full_files_are_renamed(files):
    """Two lines per file; videos with 1, 2, 3 and 1 captions, which are never split."""
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


def test_replacing_failures_merges_the_lists_of_all_shards(files):
    for number in (1, 2):
        with opened(replace(files, shard=Shard(number, 2))) as ledger:
            ledger.fail([failure(f"{number}.mp4")])
    with opened(files) as ledger:
        ledger.replace_failures([failure("1.mp4")])
        assert [path.name for path in files.find(FAILED_SUFFIX)] == ["captions.failed.jsonl"]
    with opened(files) as ledger:
        ledger.replace_failures([])
    assert files.find(FAILED_SUFFIX) == []


def test_two_processes_cannot_write_the_same_file(files):
    with opened(files), pytest.raises(LedgerError, match="another process is writing"), opened(files):
        pass
    with opened(replace(files, shard=Shard(1, 2))), opened(replace(files, shard=Shard(2, 2))):
        pass


@pytest.mark.parametrize(("one", "other"), [((1, 1), (1, 2)), ((1, 2), (1, 1)), ((2, 8), (2, 18))])
@pytest.mark.parametrize("overwrite", [False, True])
def test_another_number_of_shards_at_the_same_time_is_rejected(files, one, other, overwrite):
    """They would caption the same videos, and --overwrite would rename a file that a shard is writing."""
    held, late = (replace(files, shard=Shard(*shard)) for shard in (one, other))
    with opened(held) as ledger:
        ledger.write([caption()])
        with pytest.raises(LedgerError, match="same number of shards"), opened(late, overwrite=overwrite):
            pass
        assert held.captions.exists()
    with opened(late) as ledger:
        assert is_done(ledger, VideoFile("a.mp4", 5, 7))


def test_no_lock_file_is_left(files):
    with opened(files):
        assert files.lock.exists()
        with pytest.raises(LedgerError), opened(files):
            pass
        assert files.lock.exists()  # it belongs to the first process
    assert not files.lock.exists()
    files.lock.touch()  # as a killed process leaves it
    with opened(files):
        pass
    assert not files.lock.exists()


def test_a_lock_that_another_process_deletes_is_taken_anew(files, monkeypatch):
    """Between our opening and locking the file, its holder ends: we must not hold a deleted file."""
    flock, calls = fcntl.flock, []

    def late_flock(file, operation):
        if not calls:
            files.lock.unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    with opened(files):
        assert len(calls) == 2 and files.lock.exists()
        with pytest.raises(LedgerError, match="another process is writing"), opened(files):
            pass


def test_files_of_another_run_are_ignored(files):
    """A date is not the number of a full file; a name like a shard's may belong to a run with its own job."""
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


def test_captions_files_are_in_the_order_of_writing(files):
    """Within a shard by number, whatever their times; shards by time."""
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


def test_a_file_that_is_renamed_while_it_is_read(files, monkeypatch):
    """By another shard: first between listing it and looking up its time, then between listing and reading it."""
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


def test_the_number_of_full_files_is_limited(files):
    write(files, [caption()])
    files.out.with_name("captions.99999.jsonl").touch()
    with pytest.raises(LedgerError, match="increase --lines-per-file"):
        write(files, [caption("b.mp4")], lines_per_file=1)
    assert len(read_records(files.captions, Caption)) == 1
