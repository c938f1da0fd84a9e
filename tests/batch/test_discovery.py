"""Finding videos: folders, globs, lists, shards, and names that cannot be stored in a record."""

import io
import os
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

import pytest

from salmonn.batch.discovery import Shard, VideoFile, VideoListing, matches, stat_video
from salmonn.media.container import ClipError
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


def test_folders_are_walked_in_order_of_names(folder):
    """Hidden things and other suffixes are skipped; a file that is named is taken as it is."""
    listing = VideoListing([str(folder / "notes.txt"), f"{folder}/"])
    expected = ["notes.txt", "a.MKV", "b.mp4", "sub/c.wav", "sub/deep/d.mp4", "sub.mp4"]
    assert names(listing, folder) == expected
    first = next(listing.videos())
    assert first == VideoFile(str(folder / "notes.txt"), 5, (folder / "notes.txt").stat().st_mtime_ns)


def test_paths_are_as_they_were_named(folder, monkeypatch):
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
    (folder / "sub" / "again").symlink_to(folder)  # a circle
    (folder / "link.mp4").symlink_to(folder / "b.mp4")
    listing = VideoListing([str(folder)])
    assert "link.mp4" in names(listing, folder) and len(names(listing, folder)) == 6
    assert f"{folder}/sub/again" in caplog.text
    caplog.clear()
    assert len(list(listing.videos(quiet=True))) == 6
    assert caplog.text == ""


def test_a_link_to_itself_costs_nothing_but_itself(folder, caplog):
    """One that is named like a video is left to the reader; the folder's other files are listed."""
    for name in ("loop.mp4", "round"):
        (folder / name).symlink_to(name)
    found = list(VideoListing([str(folder)]).videos())
    assert all(isinstance(one, VideoFile) for one in found)
    assert VideoFile(str(folder / "loop.mp4")) in found and len(found) == 6 and caplog.text == ""


def test_a_name_that_cannot_be_is_one_line_of_a_list(folder, tmp_path):
    """A name longer than any file system allows, for which a Path would raise; as the only path, it is an error."""
    lines = tmp_path / "list.txt"
    lines.write_text(f"{folder}/b.mp4\n{'x' * 5000}.mp4\n{folder}/sub/c.wav\n")
    assert [one.size_bytes for one in VideoListing(list_path=str(lines)).videos()] == [5, None, 5]
    with pytest.raises(ClipError, match="there is no such file or folder"):
        VideoListing(["x" * 5000]).require_any()


def test_a_list_holds_files_and_folders(folder, tmp_path, monkeypatch):
    """Blank lines, a mark of the byte order and Windows' line ends do no harm; what is not there is listed, too."""
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
    """As `--list <(find ...)` gives it: read once, and not counted."""
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=["/gone/a.mp4\n/gone/b.mp4\n"]).start()
    listing = VideoListing(list_path=str(tmp_path / "pipe"))
    listing.require_any()
    assert listing.is_read_once
    assert [video.path for video in listing.videos()] == ["/gone/a.mp4", "/gone/b.mp4"]


def test_special_files_are_left_to_the_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert stat_video(str(tmp_path / "pipe.mp4")) == VideoFile(str(tmp_path / "pipe.mp4"))
    assert stat_video("nul\0.mp4") == VideoFile("nul\0.mp4")


def test_a_name_that_no_record_can_hold(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")).touch()
    (failure,) = VideoListing([str(tmp_path)]).videos()
    assert isinstance(failure, Failure) and failure.stage == "read"
    assert failure.video == f"{tmp_path}/caf\\xe9.mp4" and "rename" in failure.reason


def test_a_folder_that_cannot_be_listed_is_one_failure(folder, monkeypatch):
    """As where a disk does not answer; the rest of the folder is listed."""
    real = os.scandir

    def scandir(path):
        if Path(path).name == "sub":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = list(VideoListing([str(folder)]).videos())
    assert [type(one) for one in found] == [VideoFile, VideoFile, Failure, VideoFile]
    assert found[2].video == str(folder / "sub") and "Input/output error" in found[2].reason


def test_nothing_at_all(tmp_path):
    with pytest.raises(ValueError, match="no paths given"):
        VideoListing().require_any()
    with pytest.raises(ClipError, match=r"gone\.mp4: there is no such file or folder"):
        VideoListing([str(tmp_path / "gone.mp4")]).require_any()
    with pytest.raises(ClipError, match=r"no video or audio file in this folder; known suffixes: .*\.mp4"):
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


def test_a_shard_lists_its_own(folder):
    shares = [names(VideoListing([str(folder)], shard=Shard(number, 2)), folder) for number in (1, 2)]
    assert sorted(chain(*shares)) == sorted(names(VideoListing([str(folder)]), folder))


LONG = """
import tracemalloc
from salmonn.batch.discovery import VideoListing
tracemalloc.start()
count = sum(1 for _ in VideoListing(list_path="list.txt").videos())
print(count, tracemalloc.get_traced_memory()[1])
"""


def test_a_long_list_is_not_held(tmp_path):
    """Its 50,000 paths would be 6 MB; what is left are Python's own tables, of names that it has seen."""
    with (tmp_path / "list.txt").open("w") as file:
        file.writelines(f"/nowhere/{'x' * 40}/{number:010d}.mp4\n" for number in range(50_000))
    result = subprocess.run([sys.executable, "-c", LONG], cwd=tmp_path, capture_output=True, text=True, check=True)
    count, peak = map(int, result.stdout.split())
    assert count == 50_000 and peak < 3e6
