"""Subtitle files: their formats, as libav reads them; their names; and existing files of the user."""

import errno
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import pytest

from salmonn.batch.ledger_files import LedgerError
from salmonn.batch.subtitles import SubtitleWriter, format_text
from salmonn.caption.worker import WorkerLimits
from salmonn.media.index import measured_seconds
from salmonn.records import Caption

SPANS = [(0.0, 2.5, "A red circle."), (2.5, 3725.25, "A tone & a <b>blue</b> star --> gone.\n\n\r\nThen\u2028rain."),
         (3725.25, 3730.0, " \n")]  # fmt: skip


@pytest.fixture
def captions(tmp_path):
    (tmp_path / "film.mp4").touch()
    return [
        Caption(str(tmp_path / "film.mp4"), text, start_seconds=start, end_seconds=end) for start, end, text in SPANS
    ]


@pytest.fixture
def make(tmp_path):
    """Make the writer of a new run, which knows the log of earlier runs."""

    def make(*formats, **options) -> SubtitleWriter:
        log = tmp_path / "log" / "captions.subtitles.jsonl"
        log.parent.mkdir(exist_ok=True)
        return SubtitleWriter(formats or ("srt",), log=log, logs=[log] if log.exists() else [], **options)

    return make


def unknown(video: str) -> float:
    """Fail: the duration must not be needed."""
    raise AssertionError(video)


def cues(path: Path) -> list[tuple[float, float, str]]:
    """Return start, end and text of each cue as libav reads them."""
    with av.open(str(path)) as container:
        stream = container.streams.subtitles[0]
        found = []
        for packet in container.demux(stream):
            if packet.size:
                start = packet.pts * packet.time_base
                found.append((float(start), float(start + packet.duration * packet.time_base), bytes(packet).decode()))
    return found


def test_srt(captions, make):
    """2.5 s is 00:00:02,500; 3725.25 s is 1 h, 2 min, 5.25 s; empty cues and empty lines are left out."""
    assert make("srt").write(captions) == []
    path = Path(captions[0].video).with_suffix(".srt")
    assert path.read_text() == (
        "1\n00:00:00,000 --> 00:00:02,500\nA red circle.\n\n"
        "2\n00:00:02,500 --> 01:02:05,250\nA tone & a <b>blue</b> star -> gone.\nThen\nrain.\n"
    )
    found = cues(path)
    assert found == [(0.0, 2.5, "A red circle."), (2.5, 3725.25, "A tone & a <b>blue</b> star -> gone.\nThen\nrain.")]


def test_vtt(captions, make):
    """Markup characters are escaped."""
    assert make("vtt").write(captions) == []
    path = Path(captions[0].video).with_suffix(".vtt")
    escaped = "A tone &amp; a &lt;b&gt;blue&lt;/b&gt; star --&gt; gone.\nThen\nrain."
    assert path.read_text() == (
        f"WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nA red circle.\n\n00:00:02.500 --> 01:02:05.250\n{escaped}\n"
    )
    assert cues(path) == [(0.0, 2.5, "A red circle."), (2.5, 3725.25, escaped)]


def test_txt(captions):
    """The text of one caption; several captions have their times."""
    assert format_text([captions[1]], "txt", seconds_of=unknown) == captions[1].text + "\n"
    assert format_text(captions[:2], "txt", seconds_of=unknown) == (
        "[00:00:00.000] A red circle.\n[00:00:02.500] A tone & a <b>blue</b> star --> gone. Then rain.\n"
    )


def test_empty_captions(captions, make):
    texts = [format_text(captions[2:], name, seconds_of=unknown) for name in ("srt", "vtt")]
    assert texts == ["\n", "WEBVTT\n"]


def test_times_are_rounded_and_no_cue_is_empty(captions):
    """59.9996 s is a minute, not 59.1000; a cue lasts at least a millisecond."""
    captions = [replace(captions[0], start_seconds=59.9996, end_seconds=59.9996)]
    text = format_text(captions, "srt", seconds_of=unknown)
    assert "00:01:00,000 --> 00:01:00,001" in text


def test_an_open_end_is_the_end_of_the_video(videos, tmp_path):
    with av.open(str(videos[0])) as container:
        seconds = container.duration / 1e6
    text = format_text([Caption(str(videos[0]), "words")], "srt", seconds_of=measured_seconds)
    hours, minutes, rest = text.split(" --> ")[1].split("\n")[0].replace(",", ".").split(":")
    assert (hours, minutes) == ("00", "00") and abs(float(rest) - seconds) < 0.002


def test_an_open_end_of_a_live_recording(make, tmp_path, videos):
    """Such as a recorded live stream."""
    live = tmp_path / "a.mkv"
    with av.open(str(videos[0])) as source, av.open(str(live), "w", options={"live": "1"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with make("srt") as subtitles:
        assert subtitles.write([Caption(str(live), "words")]) == []
    assert (tmp_path / "a.srt").read_text() == format_text(
        [Caption(str(videos[0]), "words")], "srt", seconds_of=lambda video: measured_seconds(live)
    )
    assert measured_seconds(live) > 1


def test_a_video_of_unknown_duration(make, captions, tmp_path, monkeypatch):
    monkeypatch.setattr("salmonn.batch.subtitles.measured_seconds", os.path.isdir)  # returns 0
    video = captions[0].video
    with make("srt", "txt") as subtitles:
        (failure,) = subtitles.write([Caption(video, "words", size_bytes=5, modified_ns=7)])
    assert failure.stage == "write" and "has no timestamps" in failure.reason
    assert (failure.size_bytes, failure.modified_ns) == (5, 7)
    assert Path(video).with_suffix(".txt").read_text() == "words\n" and not Path(video).with_suffix(".srt").exists()


def test_durations_are_read_in_a_process_with_limits(make, videos, monkeypatch):
    """A file that takes too long is a failure, and a new process reads the next one."""
    film, good = ([Caption(str(video), "words")] for video in videos[:2])
    monkeypatch.setattr("salmonn.batch.subtitles.measured_seconds", time.sleep)
    with make("srt", limits=WorkerLimits(seconds=0.5)) as subtitles, monkeypatch.context() as patched:
        patched.setattr("salmonn.batch.subtitles.partial", lambda job, video: partial(job, 60))
        (failure,) = subtitles.write(film)
        assert failure.stage == "write" and "took more than 0.5 s" in failure.reason
        patched.undo()
        monkeypatch.setattr("salmonn.batch.subtitles.measured_seconds", measured_seconds)
        assert subtitles.write(good) == []
    # The clips are shared with other tests.
    Path(good[0].video).with_suffix(".srt").unlink()


def test_a_torn_log_of_another_process(captions, make, tmp_path):
    """It is writing the log, or was killed: the complete lines count."""
    path = Path(captions[0].video).with_suffix(".txt")
    assert make("txt").write(captions[:1]) == []
    log = tmp_path / "log" / "captions.subtitles.jsonl"
    torn = log.with_name("captions-1-of-2.subtitles.jsonl")
    torn.write_bytes(log.read_bytes() + log.read_bytes()[:-9])
    log.unlink()
    other = [replace(captions[0], text="Something else.")]
    assert SubtitleWriter(["txt"], log=log, logs=[torn]).write(other) == []
    assert path.read_text() == "Something else.\n" and not torn.read_bytes().endswith(b"\n")


def test_an_arrow_in_a_text_is_no_timing_line(captions, make):
    """SRT has no escape sequence for it."""
    text = "a ---> b ----> c --> d -> e"
    assert make("srt").write([replace(captions[0], text=text)]) == []
    path = Path(captions[0].video).with_suffix(".srt")
    assert path.read_text().count("-->") == 1
    assert cues(path) == [(0.0, 2.5, "a -> b -> c -> d -> e")]


def test_a_file_of_the_user_is_not_overwritten(captions, make):
    own = Path(captions[0].video).with_suffix(".srt")
    own.write_text("mine")
    (failure,) = make("srt").write(captions)
    assert own.read_text() == "mine" and failure.video == captions[0].video and failure.stage == "write"
    assert str(own) in failure.reason and "--replace-subtitles" in failure.reason
    assert make("srt", replace=True).write(captions) == [] and own.read_text().startswith("1\n")


def test_our_own_files_are_overwritten_unless_edited(captions, make):
    path = Path(captions[0].video).with_suffix(".txt")
    other = [replace(captions[0], text="Something else.")]
    assert make("txt").write(captions[:1]) == []
    assert make("txt").write(other) == [] and path.read_text() == "Something else.\n"
    path.write_text("Something better.\n")
    assert len(make("txt").write(captions[:1])) == 1 and path.read_text() == "Something better.\n"


def test_a_file_with_the_same_text_is_no_conflict(captions, make, tmp_path):
    """Although the log does not have it: the run was killed."""
    make("txt").write(captions[:1])
    log = tmp_path / "log" / "captions.subtitles.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert make("txt").write(captions[:1]) == []
    assert log.read_bytes().count(b"\n") == 1  # the torn line was cut off


@pytest.mark.parametrize("stem", ["x" * 251, "é" * 125 + "x"])
def test_a_video_with_a_name_of_255_bytes(make, tmp_path, stem):
    """Its subtitle file has a name of the same length, and the temporary one is shorter."""
    (tmp_path / f"{stem}.mp4").touch()
    assert make("txt").write([Caption(str(tmp_path / f"{stem}.mp4"), "words")]) == []
    assert (tmp_path / f"{stem}.txt").read_text() == "words\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{stem}.mp4", f"{stem}.txt", "log"])


def test_a_subtitle_name_that_is_too_long_is_a_failure(make, tmp_path):
    """256 bytes, since the suffix of the video is shorter; the name is not changed."""
    video = tmp_path / f"{'x' * 252}.ts"
    video.touch()
    (failure,) = make("txt").write([Caption(str(video), "words")])
    assert failure.reason == f"{video.with_suffix('.txt')} cannot be written (File name too long); rename the video"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", video.name]


def test_only_missing_files_are_written(captions, make):
    own = Path(captions[0].video).with_suffix(".srt")
    own.write_text("mine")
    assert make("srt", "vtt").write(captions, only_missing=True) == []
    assert own.read_text() == "mine" and own.with_suffix(".vtt").exists()


def test_videos_that_share_a_stem(make, tmp_path):
    """The first one, by name and video before audio, has the short name."""
    for name in ("film.mp4", "film.mov", "film.flac", "film.extra.mp4", "film.srt", "other.wav"):
        (tmp_path / name).touch()
    paths = {name: make().path_of(str(tmp_path / name), "srt").name
             for name in ("film.mp4", "film.mov", "film.flac", "film.extra.mp4", "other.wav")}  # fmt: skip
    assert paths == {
        "film.mov": "film.srt",
        "film.mp4": "film.mp4.srt",
        "film.flac": "film.flac.srt",
        "film.extra.mp4": "film.extra.srt",
        "other.wav": "other.srt",
    }


def test_a_subtitle_folder_mirrors_the_paths(make, tmp_path, monkeypatch):
    clips = tmp_path / "deep" / "clips"
    clips.mkdir(parents=True)
    (clips / "a.mp4").touch()
    monkeypatch.chdir(tmp_path / "deep")
    subtitles = make("txt", folder=Path("subs"))
    assert subtitles.path_of("clips/a.mp4", "txt") == Path("subs/clips/a.txt")
    # Files outside the working folder go there under their absolute path.
    assert subtitles.path_of("../deep/clips/a.mp4", "txt") == Path(f"subs{clips}/a.txt")
    assert subtitles.path_of(str(clips / "a.mp4"), "txt") == Path(f"subs{clips}/a.txt")
    assert subtitles.write([Caption("clips/a.mp4", "words")]) == []
    assert Path("subs/clips/a.txt").read_text() == "words\n"


def test_a_deleted_folder_is_not_created_again(make, tmp_path):
    gone = Caption(str(tmp_path / "gone" / "a.mp4"), "words")
    (failure,) = make("txt").write([gone])
    assert "a.mp4.txt cannot be written (No such file" in failure.reason and not (tmp_path / "gone").exists()
    assert make("txt", folder=tmp_path / "subs").write([gone]) == []
    assert (tmp_path / "subs" / str(tmp_path).lstrip("/") / "gone" / "a.mp4.txt").read_text() == "words\n"


def test_write_errors(captions, make, tmp_path, monkeypatch):
    def refuse(number):
        def write_bytes(path, data):
            raise OSError(number, os.strerror(number))

        return write_bytes

    monkeypatch.setattr(Path, "write_bytes", refuse(errno.EACCES))
    (failure,) = make("srt").write(captions)
    assert "cannot be written (Permission denied)" in failure.reason and "--subtitle-dir" in failure.reason
    monkeypatch.setattr(Path, "write_bytes", refuse(errno.ENOSPC))
    with pytest.raises(LedgerError, match=r"No space left.*Finished work is saved"):  # every other file would fail, too
        make("srt").write(captions)
    monkeypatch.setattr(Path, "write_bytes", refuse(errno.EROFS))
    with pytest.raises(LedgerError, match=r"Read-only file system.*another folder with --subtitle-dir"):
        make("srt").write(captions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "log"]
