"""Clips that cannot be read: found before the first step, listed, and left out again when the run is resumed."""

import shutil
from pathlib import Path

import pytest

from salmonn.files import read_records
from salmonn.records import Reference
from salmonn.train.data import ClipCache, ClipSet, ClipSource
from salmonn.train.left_out import LEFT_OUT_NAME, LeftOut, LeftOutClip, leave_out_unreadable


@pytest.fixture
def sources(videos, tmp_path):
    """A good clip and a broken one, the latter with both modalities and with its audio alone."""
    shutil.copy(videos[0], tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    bad = tmp_path / "bad.mp4"
    return [ClipSource(tmp_path / "good.mp4"), ClipSource(bad), ClipSource(bad, modality="audio", start_seconds=0.5)]


def test_unreadable_clips_are_listed(captioner, sources, tmp_path, caplog):
    left_out = LeftOut(tmp_path, max_failures=2)
    leave_out_unreadable(sources, ClipCache(captioner.processor), left_out, name="training clips")
    assert left_out.sources == set(sources[1:])
    assert "2 of 3 training clips cannot be read" in caplog.text
    listed = read_records(tmp_path / LEFT_OUT_NAME, LeftOutClip)
    assert [clip.source for clip in listed] == sources[1:] and "bad.mp4" in listed[0].reason
    again = LeftOut(tmp_path, max_failures=0)
    assert again.sources == set(sources[1:])
    leave_out_unreadable(sources, ClipCache(captioner.processor), again, name="training clips")  # not read again
    assert again.sources == set(sources[1:])


def test_those_of_earlier_starts_count(captioner, sources, tmp_path):
    leave_out_unreadable(sources[:2], ClipCache(captioner.processor), LeftOut(tmp_path, max_failures=1), name="clips")
    with pytest.raises(ValueError, match=r"1 of 2 clips cannot be read: .*allow more with --max-failures \(1\)"):
        leave_out_unreadable(sources, ClipCache(captioner.processor), LeftOut(tmp_path, max_failures=1), name="clips")
    assert len(read_records(tmp_path / LEFT_OUT_NAME, LeftOutClip)) == 1


def test_not_all_may_be_unreadable(captioner, sources):
    with pytest.raises(ValueError, match="2 of 2 clips cannot be read"):
        leave_out_unreadable(sources[1:], ClipCache(captioner.processor), LeftOut(None, max_failures=9), name="clips")


def test_a_set_loses_the_clips_that_are_left_out(tmp_path):
    left_out = LeftOut(tmp_path, max_failures=1)
    left_out.add({ClipSource(tmp_path / "a.mp4"): "broken"}, num_clips=2, name="clips")
    clips = ClipSet([Reference("a.mp4"), Reference("b.mp4")], tmp_path)
    assert left_out.remove_from(clips).references == [Reference("b.mp4")]
    assert left_out.remove_from(ClipSet(clips.references, Path("elsewhere"))).references == clips.references
