"""Videos in tar archives and Parquet files, on this machine and on servers."""

from pathlib import Path

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from salmonn.batch.containers import source_path
from salmonn.batch.discovery import VideoListing, stat_video
from salmonn.media.container import ClipError
from tests.batch.remote_files import fetched, listed, tar_of
from tests.batch.stores import FileServer


def test_members_of_archives(web, tmp_path):
    members = {"x/a.mp4": b"first", "x/a.json": b"{}", "x/._a.mp4": b"junk", "x/b.mp4": b"second" * 2000}
    web.files["/s-0.tar"] = web.files["/s-1.tar"] = tar_of(members)
    listing = VideoListing([f"{web.url}/s-{{0..1}}.tar"])
    found = list(listing.videos())
    assert [one.path.removeprefix(web.url) for one in found] == [
        f"/s-{number}.tar::x/{name}.mp4" for number in (0, 1) for name in "ab"
    ]
    assert [one.size_bytes for one in found[:2]] == [5, 12000] and found[0].etag == found[1].etag is not None
    assert str(listing.skipped) == "2 .json"
    assert list(fetched(f"{web.url}/s-0.tar").values()) == [b"first", b"second" * 2000]
    assert stat_video(found[1].path) == found[1]
    local = tmp_path / "s.tar"
    local.write_bytes(web.files["/s-0.tar"])
    assert fetched(str(local)) == {f"{local}::x/a.mp4": b"first", f"{local}::x/b.mp4": b"second" * 2000}
    # A folder has videos; an archive in it is named by itself.
    with pytest.raises(ClipError, match=r"only 1 \.tar"):
        VideoListing([str(tmp_path)]).require_any()


def test_damaged_archives(tmp_path):
    whole = tar_of({"a.mp4": b"first", "b.mp4": b"second" * 2000})
    for name, data in (("cut.tar", whole[:5000]), ("junk.tar", b"junk" * 500)):
        (tmp_path / name).write_bytes(data)
    first, cut = listed(str(tmp_path / "cut.tar"))
    assert first.path.endswith("cut.tar::a.mp4") and "the archive is truncated in b.mp4" in cut.reason
    (junk,) = listed(str(tmp_path / "junk.tar"))
    assert "the archive cannot be read" in junk.reason


def test_a_server_without_ranges_cannot_serve_archives():
    server = FileServer(ranges=False)
    server.files["/s.tar"] = tar_of({"a.mp4": b"first"})
    (failure,) = listed(f"{server.url}/s.tar")
    server.close()
    assert "does not send parts of files (range requests); download the file" in failure.reason


def write_parquet(path: Path, values: list, kind: pyarrow.DataType, **options) -> str:
    parquet.write_table(
        pyarrow.table({"id": range(len(values)), "video": pyarrow.array(values, kind)}), path, **options
    )
    return str(path)


def test_parquet_files_of_paths(tmp_path, web):
    web.files = {"/a.mp4": b"web"}
    (tmp_path / "b.mp4").write_bytes(b"local")
    path = write_parquet(tmp_path / "t.parquet", [f"{web.url}/a.mp4", "b.mp4", None], pyarrow.string())
    first, second = listed(path)
    assert first.path == f"{web.url}/a.mp4" and first.etag
    assert second == stat_video(str(tmp_path / "b.mp4"))
    (failure,) = listed(path, column="clip")
    assert "has no column 'clip', but id, video; name the one of the videos with --column" in failure.reason
    (failure,) = listed(path, column="id")
    assert "column 'id' has type int64" in failure.reason
    # A remote table names files on its own store, and on others, but none of this machine.
    store = fsspec.filesystem("memory")
    for value, reason in (
        ("clips/c.mp4", ""),
        ("/etc/passwd.mp4", "is not on its store"),
        ("../up.mp4", "not on its store"),
    ):
        store.put_file(write_parquet(tmp_path / "r.parquet", [value], pyarrow.string()), "/data/r.parquet")
        store.pipe("/data/clips/c.mp4", b"remote")
        (found,) = listed("memory://data/r.parquet")
        assert found.path == "memory://data/clips/c.mp4" if not reason else reason in found.reason
    store.rm("/data", recursive=True)


def test_parquet_files_of_bytes(tmp_path):
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    (tmp_path / "c.mp4").write_bytes(b"third")
    rows = [
        {"bytes": b"first", "path": "a.mp4"},
        {"bytes": b"second", "path": None},
        {"bytes": None, "path": "c.mp4"},
        None,
    ]
    path = write_parquet(tmp_path / "t.parquet", rows, kind, row_group_size=2)
    found = fetched(path)
    assert found == {
        f"{path}::0": b"first",
        f"{path}::1": b"second",
        f"{path}::2": b"third",
        f"{path}::3": f"{path}: row 3 has no video",
    }
    plain = write_parquet(tmp_path / "u.parquet", [b"first", b"second"], pyarrow.binary())
    assert list(fetched(plain).values()) == [b"first", b"second"]


def test_rows_of_another_column_are_other_videos(short_videos, caption, call, tmp_path):
    """Rows are named by numbers, so the videos of two columns have the same names."""
    columns = {name: [Path(path).read_bytes()] for name, path in zip(("video", "other"), short_videos, strict=False)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert caption(tmp_path / "t.parquet")[0] == 0
    code, err = caption(tmp_path / "t.parquet", "--column", "other")
    assert code == 2 and 'was made with column null (now "other")' in err
    assert caption(tmp_path / "t.parquet", "--column", "other", out="other.jsonl")[0] == 0
    code, err = caption(tmp_path / "t.parquet", out="other.jsonl")
    assert code == 2 and 'was made with column "other" (now null)' in err
    (tmp_path / "c.job.json").write_text('{"format": 1}')
    args = ("transcribe", tmp_path / "t.parquet", "--column", "other", "--out", tmp_path / "c.jsonl", "--dry-run")
    code, _, err = call(*args)
    assert code == 2 and 'column null (now "other")' in err


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("clips/a.mp4", None),
        ("https://host/a/b%20c.mp4?key=x/y.mp4", "/host/a/b c.mp4"),
        ("https://user:password@host/c.mp4", "/host/c.mp4"),
        ("s3://bucket/a/b?c.mp4", "/bucket/a/b?c.mp4"),
        ("shards/00.tar::x/b.mp4", "shards/x/b.mp4"),
        ("https://host/d/00.tar?key=1::b.mp4", "/host/d/b.mp4"),
        ("data/t.parquet::17", "data/17"),
    ],
)
def test_names_and_folders(path, expected):
    assert source_path(path) == (expected and Path(expected))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--preset", "ltx2", "--words", "any"],
            "dataset.json lists local files, and {path} is {kind}; download or unpack the videos",
        ),
        (
            ["--export", "txt"],
            "subtitles are written next to local videos only, and {path} is {kind}; choose a --subti",
        ),
        (["--prompt", "{{sidecar}}"], "{{sidecar}} is a text file next to a local video, and {path} is {kind}; leave"),
    ],
)
def test_what_lies_beside_videos_is_refused_where_nothing_can(caption, tmp_path, flags, message):
    """Before a model is loaded, and without a file."""
    (tmp_path / "c.tar").write_bytes(tar_of({"a.mp4": b"first"}))
    rows = write_parquet(tmp_path / "bytes.parquet", [b"first"], pyarrow.binary())
    archives = (tmp_path / "c.tar", f"{tmp_path}/c.tar::a.mp4", f"{tmp_path}/{{a..c}}.tar", rows)
    before = sorted(tmp_path.iterdir())
    for path, kind in [("memory://clips", "remote"), *((path, "an archive") for path in archives)]:
        code, err = caption(path, *(flag.format() for flag in flags))
        assert code == 2 and message.format(path=path, kind=kind) in err
    assert sorted(tmp_path.iterdir()) == before
    paths = write_parquet(tmp_path / "paths.parquet", ["a.mp4"], pyarrow.string())
    code, err = caption(paths, "--dataset", tmp_path / "all.json", "--dry-run")  # a list of local files
    assert code == 0, err
