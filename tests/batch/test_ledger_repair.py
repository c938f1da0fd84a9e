"""Captions files that a killed run, an editor, a full disk or a power failure left behind."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from salmonn.batch.discovery import VideoFile
from salmonn.batch.ledger_files import GroupReader, LedgerError, LedgerFiles
from salmonn.files import read_records
from salmonn.records import Caption, Failure
from tests.batch.ledger_records import caption, failure, has_failed_in_part, is_done, opened, segments, write
from tests.limits import RUN_SECONDS


def test_captions_of_a_video_are_consecutive_json_lines(files):
    group = segments(caption(start=0.0, end=2.0), caption(start=2.0, end=4.0), caption(start=4.0, end=5.5))
    write(files, group, [caption("b.mp4")])
    assert read_records(files.captions, Caption) == [*group, caption("b.mp4")]
    text = files.captions.read_text()
    assert text.count("\n") == 4 and all(line == line.strip() for line in text.splitlines())
    assert [len(lines) for lines in GroupReader(files.captions)] == [3, 1]


@pytest.mark.parametrize("num_bytes", ["in a line", "after a line", "in the last line"])
def test_an_unfinished_video_is_cut_off(files, num_bytes):
    """Wherever in it the run was killed; its complete lines are cut off, too."""
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


def change_white_space(path: Path, change: str) -> None:
    """Change only the white space around the lines, as an editor may."""
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
def test_changed_white_space_does_not_affect_resuming(files, change):
    """A whole video, one in segments, and two with failed segments; the failures of d.mp4 are not recorded."""
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
        change_white_space(path, change)
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
def test_an_unfinished_video_is_recognized_after_changed_white_space(files, change):
    """The file ends with the first of two segments, after a complete video."""
    whole = segments(caption("a.mp4", start=0.0), caption("a.mp4", start=2.0))
    write(files, whole, segments(caption("b.mp4", start=0.0), caption("b.mp4", start=2.0)))
    text = files.captions.read_text()
    files.captions.write_text("".join(text.splitlines(keepends=True)[:3]))
    change_white_space(files.captions, change)
    with opened(files) as ledger:
        assert ledger.num_cut_bytes > 0
        assert is_done(ledger, VideoFile("a.mp4", 5, 7)) and not is_done(ledger, VideoFile("b.mp4", 5, 7))
    assert read_records(files.captions, Caption) == whole


def test_a_deleted_line_makes_its_video_pending(files):
    """In the middle of the file; the videos after it are still done."""
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


def test_zeros_after_a_power_failure_are_cut_off(files):
    write(files, [caption()])
    whole = files.captions.read_bytes()
    files.captions.write_bytes(whole + bytes(100))
    with opened(files):
        assert files.captions.read_bytes() == whole


def test_a_torn_line_of_failures_is_cut_off(files):
    with opened(files) as ledger:
        ledger.fail([failure("a.mp4")])
    with files.failed.open("a") as file:
        file.write('{"video": "b.mp4", "rea')
    with opened(files) as ledger:
        ledger.fail([failure("c.mp4")])
    assert [one.video for one in read_records(files.failed, Failure)] == ["a.mp4", "c.mp4"]


def test_an_invalid_line_is_an_error(files):
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
    """The file may have 2000 bytes: all captions of a video are written, or none."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(files.out)], capture_output=True, text=True, check=False, timeout=RUN_SECONDS
    )
    assert "cannot be written (File too large)" in result.stderr and "run the same command" in result.stderr
    kept = read_records(files.out, Caption)
    number = int(result.stderr.split()[0])
    assert 1 <= number < 10 and len(kept) == 2 * number and len({one.video for one in kept}) == number
