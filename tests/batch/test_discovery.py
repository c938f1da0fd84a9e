"""Finding videos: folders, suffixes, globs, lists, shards, and names that cannot be stored in a record."""

import io
import os
import sys
import threading
import tracemalloc
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.batch.discovery import Shard, SkippedFiles, VideoFile, VideoListing, matches, stat_video
from salmonn.media.clip import read_clip
from salmonn.media.container import ClipError
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.records import Failure


@pytest.fixture
def folder(tmp_path):
    names = ("b.mp4", "a.MKV", "notes.txt", ".hidden.mp4", "sub/c.wav", "sub/deep/d.mp4", ".cache/e.mp4", "sub.mp4")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"12345")
    return tmp_path


def names(listing: VideoListing, folder: Path) -> list[str]:
    return [str(Path(video.path).relative_to(folder)) for video in listing.videos()]


def test_folders_are_listed_in_order_of_names(folder):
    """Hidden files and other suffixes are skipped; a file that is named itself is listed whatever its suffix."""
    listing = VideoListing([str(folder / "notes.txt"), f"{folder}/"])
    expected = ["notes.txt", "a.MKV", "b.mp4", "sub/c.wav", "sub/deep/d.mp4", "sub.mp4"]
    assert names(listing, folder) == expected
    first = next(listing.videos())
    assert first == VideoFile(str(folder / "notes.txt"), 5, (folder / "notes.txt").stat().st_mtime_ns)


def test_paths_stay_as_the_user_wrote_them(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [video.path for video in VideoListing(["."], globs=["b*"]).videos()] == ["b.mp4"]
    assert [video.path for video in VideoListing(["sub/", "./b.mp4"]).videos()] == [
        "sub/c.wav",
        "sub/deep/d.mp4",
        "b.mp4",
    ]


@pytest.mark.parametrize(
    ("path", "glob", "is_match"),
    [
        ("a.mp4", "**/a.mp4", True),
        ("x/y/a.mp4", "**/*.mp4", True),
        ("x/a.mp4", "x/*.mp4", True),
        ("x/y/a.mp4", "x/*.mp4", False),
        ("x/y/a.mp4", "x/**/*.mp4", True),
        ("x/a.mp4", "x/**/*.mp4", True),
        ("x/y/a.mp4", "x/**", True),
        ("z/a.mp4", "x/**", False),
        ("x/a.mp4", "x/[bc].mp4", False),
        ("x/a.MP4", "x/*.mp4", False),
    ],
)
def test_globs(path, glob, is_match):
    assert matches(path.split("/"), glob.split("/")) is is_match


def test_globs_of_a_folder(folder):
    assert names(VideoListing([str(folder)], globs=["*.mp4"]), folder) == ["b.mp4", "sub/deep/d.mp4", "sub.mp4"]
    assert names(VideoListing([str(folder)], globs=["sub/*", "a.*"]), folder) == ["a.MKV", "sub/c.wav"]


def test_links_to_folders_are_reported_and_not_followed(folder, caplog):
    (folder / "sub" / "again").symlink_to(folder)  # a cycle
    (folder / "link.mp4").symlink_to(folder / "b.mp4")
    listing = VideoListing([str(folder)])
    assert "link.mp4" in names(listing, folder) and len(names(listing, folder)) == 6
    assert f"{folder}/sub/again" in caplog.text
    caplog.clear()
    assert len(list(listing.videos(quiet=True))) == 6
    assert caplog.text == ""


def test_a_link_to_itself_does_not_affect_other_files(folder, caplog):
    """With the suffix of a video, it is listed, and reading it fails; the folder's other files are listed."""
    for name in ("loop.mp4", "loop"):
        (folder / name).symlink_to(name)
    found = list(VideoListing([str(folder)]).videos())
    assert all(isinstance(one, VideoFile) for one in found)
    assert VideoFile(str(folder / "loop.mp4")) in found and len(found) == 6 and caplog.text == ""


def test_a_list_with_a_name_that_is_too_long(folder, tmp_path):
    """Path.exists raises for it; the other lines are listed. As the only path, it is an error."""
    lines = tmp_path / "list.txt"
    lines.write_text(f"{folder}/b.mp4\n{'x' * 5000}.mp4\n{folder}/sub/c.wav\n")
    assert [one.size_bytes for one in VideoListing(list_path=str(lines)).videos()] == [5, None, 5]
    with pytest.raises(ClipError, match="there is no such file or folder"):
        VideoListing(["x" * 5000]).require_any()


def test_a_list_holds_files_and_folders(folder, tmp_path, monkeypatch):
    """Blank lines, a byte order mark and Windows line ends are ignored; a missing file is listed, too."""
    lines = tmp_path / "list.txt"
    lines.write_bytes(f"\ufeff{folder}/b.mp4\r\n\n{folder}/sub\n{folder}/gone.mp4".encode())
    listing = VideoListing(list_path=str(lines))
    listing.require_any()
    assert names(listing, folder) == ["b.mp4", "sub/c.wav", "sub/deep/d.mp4", "gone.mp4"]
    assert list(listing.videos())[-1] == VideoFile(f"{folder}/gone.mp4")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.read_bytes())))
    assert VideoListing(list_path="-").is_read_once and not listing.is_read_once
    assert list(VideoListing(list_path="-").videos()) == list(listing.videos())


def test_a_list_through_a_pipe(tmp_path):
    """From `--list <(find ...)`: it can be read only once."""
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=["/gone/a.mp4\n/gone/b.mp4\n"]).start()
    listing = VideoListing(list_path=str(tmp_path / "pipe"))
    listing.require_any()
    assert listing.is_read_once
    assert [video.path for video in listing.videos()] == ["/gone/a.mp4", "/gone/b.mp4"]


def test_special_files_have_no_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert stat_video(str(tmp_path / "pipe.mp4")) == VideoFile(str(tmp_path / "pipe.mp4"))
    assert stat_video("nul\0.mp4") == VideoFile("nul\0.mp4")


def test_a_name_that_is_not_utf8(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")).touch()
    (failure,) = VideoListing([str(tmp_path)]).videos()
    assert isinstance(failure, Failure) and failure.stage == "read"
    assert failure.video == f"{tmp_path}/caf\\xe9.mp4" and "rename" in failure.reason


def test_a_folder_that_cannot_be_listed_is_one_failure(folder, monkeypatch):
    """For example on a disk error; the rest of the folder is listed."""
    real = os.scandir

    def scandir(path):
        if Path(path).name == "sub":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = list(VideoListing([str(folder)]).videos())
    assert [type(one) for one in found] == [VideoFile, VideoFile, Failure, VideoFile]
    assert found[2].video == str(folder / "sub") and "Input/output error" in found[2].reason


def test_errors_without_any_video(tmp_path):
    with pytest.raises(ValueError, match="no paths given"):
        VideoListing().require_any()
    with pytest.raises(ClipError, match=r"gone\.mp4: there is no such file or folder"):
        VideoListing([str(tmp_path / "gone.mp4")]).require_any()
    with pytest.raises(ClipError, match=r"no video or audio file in this folder$"):
        VideoListing([str(tmp_path)]).require_any()
    for name in ("a.jpg", "b.JPG", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ClipError, match=r"no video or audio file in this folder, only 2 \.jpg, 1 \.txt; name a file"):
        VideoListing([str(tmp_path)]).require_any()
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ClipError, match=r"no video or audio file matching \*\.mov in this folder"):
        VideoListing([str(tmp_path)], globs=["*.mov"]).require_any()
    VideoListing([str(tmp_path / "gone.mp4"), str(tmp_path)]).require_any()
    with pytest.raises(ValueError, match="--list takes a file"):
        VideoListing(list_path=str(tmp_path / "gone.txt")).require_any()


def test_shards_partition_all_paths():
    """`printf 123456789 | b2sum -l 32` is e5089c4d; 0x4d % 8 = 5, the sixth of eight."""
    assert [number for number in range(1, 9) if Shard(number, 8).holds("123456789")] == [6]
    names = [f"/data/clips/{number}.mp4" for number in range(10)]
    assert 0 < sum(Shard(1, 2).holds(name) for name in names) < 10
    paths = [f"clips/{number}.mp4" for number in range(1000)]
    shares = [[path for path in paths if Shard(number, 3).holds(path)] for number in (1, 2, 3)]
    assert sorted(chain(*shares)) == sorted(paths) and min(map(len, shares)) > 250
    assert Shard.parse("2/8") == Shard(2, 8)
    for words in ("0/8", "9/8", "2", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="shard"):
            Shard.parse(words)


def test_shards_of_a_folder_are_disjoint(folder):
    shares = [names(VideoListing([str(folder)], shard=Shard(number, 2)), folder) for number in (1, 2)]
    assert sorted(chain(*shares)) == sorted(names(VideoListing([str(folder)]), folder))


# The suffix of a file, with the format, video codec, audio codec and sample rate that it is written with.
FORMATS = [
    (".vob", "vob", "mpeg2video", "mp2", 48_000),
    (".mxf", "mxf", "mpeg2video", "pcm_s16le", 48_000),
    (".asf", "asf", "wmv2", "libmp3lame", 44_100),
    (".3g2", "3g2", "mpeg4", "aac", 44_100),
    (".qt", "mov", "mpeg4", "aac", 44_100),
    (".divx", "avi", "mpeg4", "libmp3lame", 44_100),
    (".m2t", "mpegts", "mpeg2video", "mp2", 44_100),
    (".m2v", "mpeg2video", "mpeg2video", None, 0),
    (".h264", "h264", "libx264", None, 0),
    (".h265", "hevc", "libx265", None, 0),
    (".wtv", "wtv", "mpeg2video", "mp2", 44_100),
    (".nut", "nut", "mpeg4", "libmp3lame", 44_100),
    (".rm", "rm", "rv10", "ac3", 44_100),
    (".gif", "gif", "gif", None, 0),
    (".apng", "apng", "apng", None, 0),
    (".m4b", "ipod", None, "aac", 44_100),
    (".mka", "matroska", None, "libmp3lame", 44_100),
    (".weba", "webm", None, "libopus", 48_000),
    (".caf", "caf", None, "pcm_s16le", 44_100),
    (".au", "au", None, "pcm_s16be", 44_100),
    (".aifc", "aiff", None, "pcm_s16be", 44_100),
    (".w64", "w64", None, "pcm_s16le", 44_100),
    (".ac3", "ac3", None, "ac3", 44_100),
    (".eac3", "eac3", None, "eac3", 44_100),
    (".amr", "amr", None, "libopencore_amrnb", 8_000),
    (".tta", "tta", None, "tta", 44_100),
    (".wv", "wv", None, "wavpack", 44_100),
    (".mpga", "mp3", None, "libmp3lame", 44_100),
]


def write_media(path, file_format, video_codec, audio_codec, rate_hz):
    """Write a second of red frames, or of a tone, or both."""
    with av.open(str(path), "w", format=file_format) as out:
        streams = []
        if video_codec:
            video = out.add_stream(video_codec, rate=25)
            video.width, video.height = 176, 144
            video.pix_fmt = video.codec_context.codec.video_formats[0].name
            red = np.full((144, 176, 3), (255, 0, 0), np.uint8)
            frames = [av.VideoFrame.from_ndarray(red).reformat(format=video.pix_fmt) for _ in range(25)]
            streams.append((video, frames))
        if audio_codec:
            audio = out.add_stream(audio_codec, rate=rate_hz, layout="mono")
            tone = np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz, dtype=np.float32)[None] / 2
            samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            samples.sample_rate = rate_hz
            resampler = av.AudioResampler(
                audio.codec_context.format.name, "mono", rate_hz, frame_size=audio.codec_context.frame_size or 1024
            )
            streams.append((audio, [*resampler.resample(samples), *resampler.resample(None)]))
        for stream, frames in streams:
            for number, frame in enumerate(frames):
                frame.pts = number if stream.type == "video" else frame.pts
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))


@pytest.mark.parametrize(("suffix", "file_format", "video_codec", "audio_codec", "rate_hz"), FORMATS)
def test_files_of_many_formats_are_listed_and_can_be_read(
    tmp_path, suffix, file_format, video_codec, audio_codec, rate_hz
):
    path = tmp_path / f"a{suffix}"
    write_media(path, file_format, video_codec, audio_codec, rate_hz)
    (found,) = VideoListing([str(tmp_path)]).videos()
    clip = read_clip(found.path, FixedRateSampler(frames_per_second=4))
    assert (clip.has_video, clip.has_audio) == (bool(video_codec), bool(audio_codec))
    assert 0.9 < clip.duration_seconds < 1.2
    if video_codec:
        red, green, blue = clip.frames[:, 72, 88].astype(int).T
        assert len(clip.frames) >= 4 and (red > 200).all() and (green < 60).all() and (blue < 60).all()


def test_files_with_other_suffixes_are_counted_once(folder):
    for name in ("a.jpg", "b.JPG", "sub/c.jpg", "sub/README", "sub/d.srt"):
        (folder / name).touch()
    listing = VideoListing([str(folder / "notes.txt"), str(folder)])
    assert len(list(listing.videos())) == 6 and len(list(listing.videos(quiet=True))) == 6
    assert listing.skipped.total == 6 and str(listing.skipped) == "3 .jpg, 1 without suffix, 1 .srt, 1 .txt"


def test_files_that_match_no_glob_are_not_counted(folder):
    (folder / "sub" / "a.jpg").touch()
    listing = VideoListing([str(folder)], globs=["sub/*"])
    assert names(listing, folder) == ["sub/c.wav"] and str(listing.skipped) == "1 .jpg"


def test_each_shard_counts_its_own_files(folder):
    for number in range(20):
        (folder / f"{number}.jpg").touch()
    listings = [VideoListing([str(folder)], shard=Shard(number, 2)) for number in (1, 2)]
    for listing in listings:
        list(listing.videos())
    first, second = (listing.skipped.total for listing in listings)
    assert first + second == 21 and 0 < first < 21


def test_rare_suffixes_are_summed_up():
    """8 suffixes are shown. Those with more than 9 characters and the dot, or with control characters, are not kept."""
    skipped = SkippedFiles()
    for number in range(5000):
        skipped.add(f"a.x{number}")
    for name in ("a.jpg", "b.jpg", "v1.0 of the report", "a.\x1b[2J"):
        skipped.add(name)
    assert skipped.total == 5004
    assert (
        str(skipped)
        == f"{', '.join(f'1 .x{one}' for one in (0, 1, 10, 100, 101, 102, 103, 104))}, 4,996 with other suffixes"
    )


def count_and_peak(**listing) -> tuple[int, int]:
    """List videos; return their number and the peak of the memory that this takes, in bytes."""
    tracemalloc.start()
    try:
        return sum(1 for _ in VideoListing(**listing).videos()), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_long_list_takes_constant_memory(tmp_path):
    """Its 10,000 paths would take 1.2 MB; pathlib's table of interned names takes a part of that."""
    with (tmp_path / "list.txt").open("w") as file:
        file.writelines(f"/nowhere/{'x' * 40}/{number:010d}.mp4\n" for number in range(10_000))
    count, peak = count_and_peak(list_path=str(tmp_path / "list.txt"))
    assert count == 10_000 and peak < 0.6e6


def test_files_with_other_suffixes_take_constant_memory(tmp_path, monkeypatch):
    """The names of 5,000 more files, each with a suffix of its own, would take 0.5 MB."""
    monkeypatch.chdir(tmp_path)
    Path("a.mp4").touch()
    peaks = []
    for names in (range(2_000), range(2_000, 7_000)):
        for number in names:
            os.link("a.mp4", f"{'x' * 40}.{number:05d}")
        count, peak = count_and_peak(paths=["."])
        assert count == 1
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 50_000
