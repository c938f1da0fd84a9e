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
from salmonn.media.container import declared_seconds
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
    """A new run's writer, which knows of the runs before."""

    def make(*formats, **options) -> SubtitleWriter:
        log = tmp_path / "log" / "captions.subtitles.jsonl"
        log.parent.mkdir(exist_ok=True)
        return SubtitleWriter(formats or ("srt",), log=log, logs=[log] if log.exists() else [], **options)

    return make


def unknown(video: str) -> float:
    """Fail: the duration must not be needed."""
    raise AssertionError(video)


def cues(path: Path) -> list[tuple[float, float, str]]:
    """Start, end and text of each cue, as libav takes them."""
    with av.open(str(path)) as container:
        stream = container.streams.subtitles[0]
        found = []
        for packet in container.demux(stream):
            if packet.size:
                start = packet.pts * packet.time_base
                found.append((float(start), float(start + packet.duration * packet.time_base), bytes(packet).decode()))
    return found


def test_srt(captions, make):
    """2.5 s is 00:00:02,500; 3725.25 s is 1 h, 2 min, 5.25 s; an empty cue is none, nor is an empty line in one."""
    assert make("srt").write(captions) == []
    path = Path(captions[0].video).with_suffix(".srt")
    assert path.read_text() == (
        "1\n00:00:00,000 --> 00:00:02,500\nA red circle.\n\n"
        "2\n00:00:02,500 --> 01:02:05,250\nA tone & a <b>blue</b> star -> gone.\nThen\nrain.\n"
    )
    found = cues(path)
    assert found == [(0.0, 2.5, "A red circle."), (2.5, 3725.25, "A tone & a <b>blue</b> star -> gone.\nThen\nrain.")]


def test_vtt(captions, make):
    """Characters that would be markup are escaped."""
    assert make("vtt").write(captions) == []
    path = Path(captions[0].video).with_suffix(".vtt")
    escaped = "A tone &amp; a &lt;b&gt;blue&lt;/b&gt; star --&gt; gone.\nThen\nrain."
    assert path.read_text() == (
        f"WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nA red circle.\n\n00:00:02.500 --> 01:02:05.250\n{escaped}\n"
    )
    assert cues(path) == [(0.0, 2.5, "A red circle."), (2.5, 3725.25, escaped)]


def test_txt(captions):
    """One text stands alone; several have their times."""
    assert format_text([captions[1]], "txt", seconds_of=unknown) == captions[1].text + "\n"
    assert format_text(captions[:2], "txt", seconds_of=unknown) == (
        "[00:00:00.000] A red circle.\n[00:00:02.500] A tone & a <b>blue</b> star --> gone. Then rain.\n"
    )


def test_no_text_at_all(captions, make):
    texts = [format_text(captions[2:], name, seconds_of=unknown) for name in ("srt", "vtt")]
    assert texts == ["\n", "WEBVTT\n"]


def test_times_are_rounded_and_a_cue_has_a_length(captions):
    """59.9996 s is a minute, not 59.1000; a cue without length gets a thousandth."""
    captions = [replace(captions[0], start_seconds=59.9996, end_seconds=59.9996)]
    text = format_text(captions, "srt", seconds_of=unknown)
    assert "00:01:00,000 --> 00:01:00,001" in text


def test_an_open_end_is_the_videos_own(videos, tmp_path):
    """As the file declares it; without one that is said."""
    with av.open(str(videos[0])) as container:
        seconds = container.duration / 1e6
    text = format_text([Caption(str(videos[0]), "words")], "srt", seconds_of=declared_seconds)
    hours, minutes, rest = text.split(" --> ")[1].split("\n")[0].replace(",", ".").split(":")
    assert (hours, minutes) == ("00", "00") and abs(float(rest) - seconds) < 0.002


def test_a_video_without_a_length(make, tmp_path, videos):
    """As one that was recorded while it was sent."""
    live = tmp_path / "a.mkv"
    with av.open(str(videos[0])) as source, av.open(str(live), "w", options={"live": "1"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with make("srt", "txt") as subtitles:
        (failure,) = subtitles.write([Caption(str(live), "words", size_bytes=5, modified_ns=7)])
    assert failure.stage == "write" and "declares no duration" in failure.reason
    assert (failure.size_bytes, failure.modified_ns) == (5, 7)
    assert (tmp_path / "a.txt").read_text() == "words\n" and not (tmp_path / "a.srt").exists()


def test_durations_are_read_in_a_process_with_limits(make, videos, monkeypatch):
    """A file that takes too long is a failure, and another process reads the next one."""
    film, good = ([Caption(str(video), "words")] for video in videos[:2])
    monkeypatch.setattr("salmonn.batch.subtitles.declared_seconds", time.sleep)
    with make("srt", limits=WorkerLimits(seconds=0.5)) as subtitles, monkeypatch.context() as patched:
        patched.setattr("salmonn.batch.subtitles.partial", lambda job, video: partial(job, 60))
        (failure,) = subtitles.write(film)
        assert failure.stage == "write" and "took more than 0.5 s" in failure.reason
        patched.undo()
        monkeypatch.setattr("salmonn.batch.subtitles.declared_seconds", declared_seconds)
        assert subtitles.write(good) == []
    # The clips are shared with other tests.
    Path(good[0].video).with_suffix(".srt").unlink()


def test_a_log_that_another_process_is_writing(captions, make, tmp_path):
    """Or that it left torn: what is whole of it counts."""
    path = Path(captions[0].video).with_suffix(".txt")
    assert make("txt").write(captions[:1]) == []
    log = tmp_path / "log" / "captions.subtitles.jsonl"
    torn = log.with_name("captions-1-of-2.subtitles.jsonl")
    torn.write_bytes(log.read_bytes() + log.read_bytes()[:-9])
    log.unlink()
    other = [replace(captions[0], text="Something else.")]
    assert SubtitleWriter(["txt"], log=log, logs=[torn]).write(other) == []
    assert path.read_text() == "Something else.\n" and not torn.read_bytes().endswith(b"\n")


def test_an_arrow_in_a_text_makes_no_cue(captions, make):
    """SRT has no escape sequence for it."""
    text = "a ---> b ----> c --> d -> e"
    assert make("srt").write([replace(captions[0], text=text)]) == []
    path = Path(captions[0].video).with_suffix(".srt")
    assert path.read_text().count("-->") == 1
    assert cues(path) == [(0.0, 2.5, "a -> b -> c -> d -> e")]


def test_a_users_own_file_is_not_touched(captions, make):
    own = Path(captions[0].video).with_suffix(".srt")
    own.write_text("mine")
    (failure,) = make("srt").write(captions)
    assert own.read_text() == "mine" and failure.video == captions[0].video and failure.stage == "write"
    assert str(own) in failure.reason and "--replace-subtitles" in failure.reason
    assert make("srt", replace=True).write(captions) == [] and own.read_text().startswith("1\n")


def test_our_files_are_replaced_until_somebody_edits_them(captions, make):
    path = Path(captions[0].video).with_suffix(".txt")
    other = [replace(captions[0], text="Something else.")]
    assert make("txt").write(captions[:1]) == []
    assert make("txt").write(other) == [] and path.read_text() == "Something else.\n"
    path.write_text("Something better.\n")
    assert len(make("txt").write(captions[:1])) == 1 and path.read_text() == "Something better.\n"


def test_a_kill_before_a_subtitle_file_is_logged_does_no_harm(captions, make, tmp_path):
    """The same text is there, by whomever."""
    make("txt").write(captions[:1])
    log = tmp_path / "log" / "captions.subtitles.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert make("txt").write(captions[:1]) == []
    assert log.read_bytes().count(b"\n") == 1  # what was cut off is gone


def test_only_those_that_are_missing(captions, make):
    own = Path(captions[0].video).with_suffix(".srt")
    own.write_text("mine")
    assert make("srt", "vtt").write(captions, only_missing=True) == []
    assert own.read_text() == "mine" and own.with_suffix(".vtt").exists()


def test_videos_that_share_a_stem(make, tmp_path):
    """Pictures come before sound, then by name; those of another stem are apart."""
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


def test_another_folder_mirrors_the_paths(make, tmp_path, monkeypatch):
    clips = tmp_path / "deep" / "clips"
    clips.mkdir(parents=True)
    (clips / "a.mp4").touch()
    monkeypatch.chdir(tmp_path / "deep")
    subtitles = make("txt", folder=Path("subs"))
    assert subtitles.path_of("clips/a.mp4", "txt") == Path("subs/clips/a.txt")
    # What lies elsewhere stands there under its whole path, and nothing leaves the folder.
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


def test_a_folder_that_takes_no_files(captions, make, tmp_path, monkeypatch):
    def refuse(number):
        def write_bytes(path, data):
            raise OSError(number, os.strerror(number))

        return write_bytes

    monkeypatch.setattr(Path, "write_bytes", refuse(errno.EACCES))
    (failure,) = make("srt").write(captions)
    assert "cannot be written (Permission denied)" in failure.reason and "--subtitle-dir" in failure.reason
    monkeypatch.setattr(Path, "write_bytes", refuse(errno.ENOSPC))
    with pytest.raises(
        LedgerError, match=r"No space left.*Finished work is saved"
    ):  # which every other one would meet, too
        make("srt").write(captions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "log"]
