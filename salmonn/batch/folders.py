"""Export captions to folders of shards: webdataset archives with the clips, and Parquet files that `datasets` reads.

    export_folder(latest, Path("captions.webdataset"))    shard-000000.tar, ...: 00000000.mp4, .txt, .json; ...
    export_folder(latest, Path("captions.datasets"))      train-00000-of-00002.parquet, ...

A folder appears when it is complete. A webdataset folder that has these captions already is left as it is, since its
videos may have to be fetched again.
"""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from salmonn.batch.containers import split_member
from salmonn.batch.discovery import VideoFile
from salmonn.batch.export import LatestCaptions, write_parquet
from salmonn.batch.fetch import FetchConfig, Fetcher
from salmonn.batch.ledger_files import LedgerError, cannot_write
from salmonn.batch.remote import is_url, name_of
from salmonn.batch.subtitles import format_text
from salmonn.files import temporary_path
from salmonn.records import Caption, Failure

SHARD_BYTES = 1 << 30  # of an archive, which ends with the clip that reaches it
SHARD_ROWS = 100_000  # of a Parquet file
_STATE = ".captions"  # hash of the captions that a folder was made of
_OURS = re.compile(r"shard-\d{6,}\.tar|train-\d{5,}-of-\d{5,}\.parquet|" + re.escape(_STATE))
_NO_SUFFIX = ".mp4"  # of rows of Parquet files, which have no name

Write = Callable[[LatestCaptions, Path, Fetcher], list[Failure]]


def export_folder(captions: LatestCaptions, out: Path, *, fetch: FetchConfig | None = None) -> list[Failure]:
    """Write captions to a folder of shards, replacing one that this function wrote before.

    Args:
        captions: captions to write.
        out: the folder; its suffix selects the format: .webdataset or .datasets.
        fetch: how remote videos are fetched.

    Returns:
        The videos that were left out because they have changed since or cannot be read.

    Raises:
        ValueError: the suffix is none of these, or the folder has other files.
    """
    if out.suffix not in FOLDERS:
        raise ValueError(f"{out}: unknown format; choose a name that ends in {', '.join(FOLDERS)}")
    if out.exists() and (not out.is_dir() or not all(_OURS.fullmatch(path.name) for path in out.iterdir())):
        raise ValueError(f"{out} exists and has files that this command does not write; choose another name")
    digest = blake2b(digest_size=16)
    for caption in captions:
        digest.update(json.dumps(asdict(caption)).encode())
    state = digest.hexdigest()
    if (out / _STATE).exists() and (out / _STATE).read_text() == state:
        return []
    temporary = temporary_path(out)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with Fetcher(fetch) as fetcher:
            failures = FOLDERS[out.suffix](captions, temporary, fetcher)
        if not failures:
            (temporary / _STATE).write_text(state)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise LedgerError(cannot_write(out, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return failures


def _write_datasets(captions: LatestCaptions, folder: Path, fetcher: Fetcher) -> list[Failure]:
    count = max(1, -(-len(captions) // SHARD_ROWS))
    rows = iter(captions)
    for number in range(count):
        write_parquet(islice(rows, SHARD_ROWS), folder / f"train-{number:05d}-of-{count:05d}.parquet")
    return []


def _write_webdataset(captions: LatestCaptions, folder: Path, fetcher: Fetcher) -> list[Failure]:
    failures: list[Failure] = []
    shards = _ShardWriter(folder)
    try:
        for number, (group, path) in enumerate(_readable(captions, fetcher, failures)):
            key = f"{number:08d}"
            text = format_text(group, "txt", seconds_of=lambda video: 0.0)
            record = {"video": group[0].video, "captions": [asdict(caption) for caption in group]}
            shards.add(key + _suffix(group[0].video), path)
            shards.add(f"{key}.txt", text.encode())
            shards.add(f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
            shards.end_sample()
    finally:
        shards.close()
    return failures


def _readable(
    captions: LatestCaptions, fetcher: Fetcher, failures: list[Failure]
) -> Iterator[tuple[list[Caption], Path]]:
    """Yield the captions of each video with a local file of it; add a failure for a video that has changed."""
    groups: dict[int, list[Caption]] = {}

    def videos() -> Iterator[tuple[int, VideoFile]]:
        for number, group in enumerate(captions.by_video()):
            groups[number] = group
            yield number, VideoFile(group[0].video, group[0].size_bytes, group[0].modified_ns, group[0].etag)

    for number, video, path in fetcher.ahead(videos()):
        group, is_local = groups.pop(number), path == Path(video.path)
        if not path.exists():
            missing = f"{video.path}: there is no such file any more"
            failures.append(Failure(video.path, missing if is_local else fetcher.explain(video, missing), "write"))
        elif is_local and (path.stat().st_size, path.stat().st_mtime_ns) != (video.size_bytes, video.modified_ns):
            failures.append(Failure(video.path, f"{video.path}: it has changed since it was captioned", "write"))
        else:
            yield group, path
        fetcher.release(video)


class _ShardWriter:
    """Writes tar archives of about one GiB; the files of a sample are in one archive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._archive = self._open()

    def _open(self) -> tarfile.TarFile:
        self._path = self._folder / f"shard-{self._number:06d}.tar"
        return tarfile.open(self._path, "w")

    def add(self, name: str, content: Path | bytes) -> None:
        """Add a file; its time is 0, so that the same captions give the same archive."""
        info = tarfile.TarInfo(name)
        if isinstance(content, bytes):
            info.size = len(content)
            self._archive.addfile(info, io.BytesIO(content))
            return
        with content.open("rb") as file:
            info.size = content.stat().st_size
            self._archive.addfile(info, file)

    def end_sample(self) -> None:
        """Start another archive if this one is large enough."""
        if self._archive.offset >= SHARD_BYTES:
            self._archive.close()
            self._number += 1
            self._archive = self._open()

    def close(self) -> None:
        """Finish the last archive; delete it if it is empty and not the only one."""
        is_empty = self._archive.offset == 0 and self._number > 0
        self._archive.close()
        if is_empty:
            self._path.unlink()


def _suffix(video: str) -> str:
    split = split_member(video)
    name = split[1] if split else name_of(video) if is_url(video) else video
    return Path(name).suffix.lower() or _NO_SUFFIX


FOLDERS: dict[str, Write] = {".webdataset": _write_webdataset, ".datasets": _write_datasets}
