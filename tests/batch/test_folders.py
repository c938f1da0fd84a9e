"""Folders of shards: read back by tarfile and by `datasets`, and used as input again."""

import json
import tarfile

import fsspec
import pytest

from salmonn.batch import folders
from salmonn.batch.discovery import VideoListing, stat_video
from salmonn.batch.export import LatestCaptions
from salmonn.batch.folders import export_folder
from salmonn.files import write_records
from salmonn.records import Caption


def captions_of(tmp_path, names, **values) -> LatestCaptions:
    """Write a captions file about videos as they are now."""
    records = []
    for name in names:
        now = stat_video(str(name))
        version = dict(size_bytes=now.size_bytes, modified_ns=now.modified_ns, etag=now.etag)
        records.append(Caption(str(name), f"words of {name}", **version, **values))
    write_records(tmp_path / "captions.jsonl", records)
    return LatestCaptions([tmp_path / "captions.jsonl"])


def members(path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive}


def test_webdataset_shards(tmp_path, monkeypatch):
    """Two clips, one of them remote, in an archive each; their order is that of the captions."""
    monkeypatch.setattr(folders, "SHARD_BYTES", 1)
    (tmp_path / "b.x.MKV").write_bytes(b"second")
    fsspec.filesystem("memory").pipe("/a.mp4", b"first")
    latest = captions_of(tmp_path, ["memory://a.mp4", tmp_path / "b.x.MKV"])
    out = tmp_path / "captions.webdataset"
    assert export_folder(latest, out) == []
    assert sorted(path.name for path in out.glob("*")) == [".captions", "shard-000000.tar", "shard-000001.tar"]
    first, second = members(out / "shard-000000.tar"), members(out / "shard-000001.tar")
    assert list(first) == ["00000000.mp4", "00000000.txt", "00000000.json"] and first["00000000.mp4"] == b"first"
    assert first["00000000.txt"] == b"words of memory://a.mp4\n" and second["00000001.mkv"] == b"second"
    record = json.loads(first["00000000.json"])
    assert record["video"] == "memory://a.mp4" and record["captions"][0]["text"] == "words of memory://a.mp4"
    # The shards are videos to caption again.
    found = list(VideoListing([str(out / "shard-{000000..000001}.tar")]).videos())
    assert [one.path.rpartition("::")[2] for one in found] == ["00000000.mp4", "00000001.mkv"]
    # Nothing has changed, so nothing is fetched; then it has.
    fsspec.filesystem("memory").rm("/a.mp4")
    assert export_folder(latest, out) == []
    write_records(tmp_path / "captions.jsonl", [Caption("memory://a.mp4", "other", size_bytes=5)])
    (failure,) = export_folder(LatestCaptions([tmp_path / "captions.jsonl"]), out)
    assert failure.reason == "memory://a.mp4: there is no such file or folder; check the URL"
    assert members(out / "shard-000000.tar") == {} and not (out / ".captions").exists()


def test_changed_videos_and_segments(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"first")
    (tmp_path / "b.mp4").write_bytes(b"second")
    now = stat_video(str(tmp_path / "a.mp4"))
    parts = [
        Caption(now.path, text, "", "", 0, True, start, start + 2, 5, now.modified_ns, segment, 2)
        for segment, start, text in ((0, 0.0, "one"), (1, 2.0, "two"))
    ]
    stale = Caption(str(tmp_path / "b.mp4"), "words", size_bytes=6, modified_ns=7)
    write_records(tmp_path / "captions.jsonl", [*parts, stale])
    out = tmp_path / "captions.webdataset"
    (failure,) = export_folder(LatestCaptions([tmp_path / "captions.jsonl"]), out)
    assert failure.video == stale.video and "has changed since it was captioned" in failure.reason
    (shard,) = out.iterdir()
    found = members(shard)
    assert found["00000000.txt"] == b"[00:00:00.000] one\n[00:00:02.000] two\n"
    assert [one["text"] for one in json.loads(found["00000000.json"])["captions"]] == ["one", "two"]


def test_folders_with_other_files_are_kept(tmp_path):
    latest = captions_of(tmp_path, [])
    (tmp_path / "my.datasets").mkdir()
    (tmp_path / "my.datasets" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="has files that this command does not write"):
        export_folder(latest, tmp_path / "my.datasets")
    with pytest.raises(ValueError, match=r"a name that ends in \.webdataset, \.datasets"):
        export_folder(latest, tmp_path / "my.folder")


def test_shards_that_datasets_loads(tmp_path, monkeypatch):
    from datasets import load_dataset

    monkeypatch.setattr(folders, "SHARD_ROWS", 2)
    names = [tmp_path / f"{number}.mp4" for number in range(5)]
    for name in names:
        name.write_bytes(b"x")
    latest = captions_of(tmp_path, names, warnings=("cut",))
    out = tmp_path / "captions.datasets"
    export_folder(latest, out)
    assert sorted(path.name for path in out.glob("train-*")) == [
        f"train-{number:05d}-of-00003.parquet" for number in range(3)
    ]
    rows = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["text"][:] == [f"words of {name}" for name in names] and rows[4]["warnings"] == ["cut"]
    assert rows[0]["size_bytes"] == 1 and rows[0]["etag"] is None
    # Its column of paths is an input.
    assert [one.path for one in VideoListing([str(out / "train-00000-of-00003.parquet")]).videos()] == [
        str(one) for one in names[:2]
    ]


def test_the_commands_write_folders(videos, caption, call, tmp_path):
    (tmp_path / "a.mp4").write_bytes(videos[0].read_bytes())
    assert caption(tmp_path / "a.mp4", "--export", "webdataset", "datasets")[0] == 0
    shard = tmp_path / "captions.webdataset" / "shard-000000.tar"
    (text,) = [json.loads(line)["text"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert members(shard)["00000000.txt"].decode() == text + "\n"
    assert (tmp_path / "captions.datasets" / "train-00000-of-00001.parquet").exists()
    code, _, err = call("export", tmp_path / "captions.jsonl", "--to", tmp_path / "again.webdataset")
    assert code == 0 and (tmp_path / "again.webdataset" / "shard-000000.tar").read_bytes() == shard.read_bytes(), err
