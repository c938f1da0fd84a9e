"""Fetch remote files, and members of containers, to a local scratch folder just before they are decoded.

    with Fetcher(FetchConfig()) as fetcher:
        for index, video, path in fetcher.ahead(videos):
            ...                              # decode `path`
            fetcher.release(video)           # and delete it

Decoders need a file that they can seek in and read twice, and worker processes a path; so files are not streamed.
"""

import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fsspec.callbacks import Callback

from salmonn import system
from salmonn.batch.containers import VIDEO_COLUMN, ParquetRows, find_member, is_tar, open_container, split_member
from salmonn.batch.discovery import VideoFile, stat_video
from salmonn.batch.remote import RemoteError, attempt, is_url, name_of, redact, scheme_of, store_of
from salmonn.records import Failure

NUM_FETCHING = 4  # files fetched at the same time
FETCHED_AHEAD = 16
_PREFIX = "salmonn-scratch-"
_BLOCK_BYTES = 1 << 20
_MAX_NAME_CHARS = 80


@dataclass(frozen=True)
class FetchConfig:
    """How remote files are fetched.

    Args:
        folder: folder for the scratch files; None: the system's folder for temporary files.
        gib: size of the scratch files, in GiB, at which no more are fetched ahead; also the maximum size of a file.
        seconds: time limit of a file.
        column: column of the videos in Parquet files.
    """

    folder: Path | None = None
    gib: float = 16.0
    seconds: float = 900.0
    column: str = VIDEO_COLUMN

    def __post_init__(self) -> None:
        if not self.gib > 0 or not self.seconds > 0:
            raise ValueError(f"--scratch-gib and --fetch-seconds must be above 0, got {self.gib} and {self.seconds}")
        if self.folder is not None and not (self.folder.is_dir() and os.access(self.folder, os.W_OK)):
            raise ValueError(f"--scratch-dir {self.folder} is not a folder that can be written; choose another one")

    @property
    def max_bytes(self) -> int:
        """The same, in bytes."""
        return int(self.gib * (1 << 30))


class Fetcher(AbstractContextManager["Fetcher"]):
    """Fetches files ahead of their use; local files are used in place.

    Scratch folders of killed runs are deleted by the next run on this machine that needs one.
    """

    def __init__(self, config: FetchConfig | None = None) -> None:
        self.config = config or FetchConfig()
        self._threads = ThreadPoolExecutor(NUM_FETCHING, thread_name_prefix="fetching")
        self._rows = ParquetRows(self.config.column)
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._folder_lock: int | None = None
        self._held: dict[str, int] = {}  # sizes of the files that are fetched or being fetched, by the videos' paths
        self._paths: dict[str, Path] = {}
        self._videos: dict[Path, VideoFile] = {}
        self._reasons: dict[str, str] = {}
        self._number = 0
        self._is_closed = False

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop fetching and delete the scratch folder."""
        self._is_closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._folder_lock is not None:
            os.close(self._folder_lock)
        self._folder = self._folder_lock = None

    def ahead(self, videos: Iterable[tuple[int, VideoFile]]) -> Iterator[tuple[int, VideoFile, Path]]:
        """Yield each video with its index and the path of a local file.

        That file does not exist if the video could not be fetched; `reason` then says why.
        """
        pending: deque[tuple[int, VideoFile, Path, Future[None] | None]] = deque()
        videos = iter(videos)
        while True:
            while len(pending) < FETCHED_AHEAD and (not pending or self._has_room()):
                if (found := next(videos, None)) is None:
                    break
                index, video = found
                if not (is_url(video.path) or split_member(video.path)):
                    pending.append((index, video, Path(video.path), None))
                    break  # nothing is taken ahead of local files: a list may come through a slow pipe
                path = self._reserve(video)
                pending.append((index, video, path, self._threads.submit(self._fetch, video, path)))
            if not pending:
                return
            index, video, path, future = pending.popleft()
            if future is not None:
                future.result()
            yield index, video, path

    def release(self, video: VideoFile) -> None:
        """Delete the scratch file of a video that is done."""
        with self._lock:
            path = self._paths.pop(video.path, None)
            self._held.pop(video.path, None)
            self._reasons.pop(video.path, None)
        if path is not None:
            self._videos.pop(path, None)
            path.unlink(missing_ok=True)

    def explain(self, video: VideoFile, reason: str) -> str:
        """Return why a video failed: it could not be fetched, or what the decoder says about its scratch file."""
        with self._lock:
            path, failed = self._paths.get(video.path), self._reasons.get(video.path)
        return failed or (reason if path is None else reason.replace(str(path), video.path))

    def video_of(self, path: Path) -> VideoFile | Failure:
        """Return the video that a scratch file belongs to; for any other path, what `stat_video` returns."""
        with self._lock:
            video = self._videos.get(path)
        return video or stat_video(str(path))

    def bucket_share(self, path: Path) -> float:
        """Return the share of a `ClipReader`'s bucket that a file fills, so that the scratch folder holds some.

        The reader holds two buckets, and batches of others.
        """
        if self._folder is None or path.parent != self._folder or not path.exists():
            return 0.0
        return path.stat().st_size / (self.config.max_bytes / 4)

    def _has_room(self) -> bool:
        with self._lock:
            return sum(self._held.values()) < self.config.max_bytes

    def _reserve(self, video: VideoFile) -> Path:
        """Choose the scratch file of a video."""
        if self._folder is None:
            self._folder, self._folder_lock = _make_scratch(self.config.folder)
        split = split_member(video.path)
        name = split[1].rpartition("/")[2] if split else name_of(video.path)
        self._number += 1
        path = self._folder / f"{self._number:08d}-{name[-_MAX_NAME_CHARS:]}"
        with self._lock:
            self._held[video.path] = video.size_bytes or 0
            self._paths[video.path] = path
            self._videos[path] = video
        return path

    def _fetch(self, video: VideoFile, path: Path) -> None:
        temporary = path.with_name(f"{path.name}.part")
        try:
            self._copy(video, temporary)
            size = temporary.stat().st_size
            if video.size_bytes is not None and size != video.size_bytes:
                raise RemoteError(
                    f"{video.path}: {size} bytes were received, and it had {video.size_bytes} when it was listed; run "
                    "again with --retry-failed"
                )
            with self._lock:
                self._held[video.path] = size
            temporary.rename(path)
        except RemoteError as error:
            self._fail(video, str(error))
        except OSError as error:
            self._fail(
                video,
                f"{video.path}: cannot be fetched to {temporary.parent} ({error.strerror or error}); check the disk, "
                "or use another one (--scratch-dir) or less of it (--scratch-gib)",
            )
        finally:
            temporary.unlink(missing_ok=True)

    def _fail(self, video: VideoFile, reason: str) -> None:
        with self._lock:
            container, _ = split_member(video.address) or (video.address, "")
            self._reasons[video.path] = redact(reason, container)
            self._held[video.path] = 0

    def _copy(self, video: VideoFile, out: Path) -> None:
        address = video.address or video.path
        split = split_member(address)
        guard = _Guard(self, video)
        if split is None:
            _download(address, out, guard)
            return
        container, name = split
        version = (video.modified_ns, video.etag)
        if is_tar(container):
            member = find_member(container, name, version)
            attempt(container, lambda: _copy_range(container, member.offset, member.size_bytes, out, guard))
            return
        if not name.isdigit():
            raise RemoteError(f"{video.path}: after {container}:: there must be the number of a row")
        value = attempt(container, lambda: self._rows.read(container, int(name), version))
        if isinstance(value, bytes):
            out.write_bytes(value)
        elif is_url(value):
            _download(value, out, guard)
        else:
            shutil.copyfile(value, out)

    def check(self, video: VideoFile, num_bytes: int, deadline: float) -> None:
        """Raise a RemoteError for a file that is too large or takes too long, or if the run has ended."""
        if num_bytes > self.config.max_bytes:
            raise RemoteError(f"{video.path}: the file has more than {self.config.gib:g} GiB; increase --scratch-gib")
        if time.monotonic() > deadline:
            raise RemoteError(
                f"{video.path}: fetching it took more than {self.config.seconds:g} s; check the connection or increase "
                "--fetch-seconds"
            )
        if self._is_closed:
            raise RemoteError(f"{video.path}: the run has ended")


class _Guard(Callback):
    """Checks the limits of a file while it is being fetched; fsspec reports each block to it."""

    def __init__(self, fetcher: Fetcher, video: VideoFile) -> None:
        super().__init__()
        self._fetcher = fetcher
        self._video = video
        self._deadline = time.monotonic() + fetcher.config.seconds
        self.restart()
        self.relative_update(video.size_bytes or 0)
        self.restart()

    def restart(self) -> None:
        """Reset the count for another attempt."""
        self._num_bytes = 0

    def relative_update(self, inc: int = 1) -> None:
        """Count a block; raises RemoteError."""
        self._num_bytes += inc
        self._fetcher.check(self._video, self._num_bytes, self._deadline)


def _download(url: str, out: Path, guard: _Guard) -> None:
    store, path = store_of(url)

    def get() -> None:
        guard.restart()
        if scheme_of(url) == "hf":  # one stream, which huggingface_hub resumes; its get_file takes no callback
            with store.open(path, "rb", block_size=0) as file:
                _copy_blocks(file, out, guard)
        else:
            store.get_file(path, str(out), callback=guard)

    attempt(url, get)


def _copy_range(container: str, offset: int, size: int, out: Path, guard: _Guard) -> None:
    guard.restart()
    with open_container(container) as file:
        file.seek(offset)
        _copy_blocks(file, out, guard, size=size)


def _copy_blocks(file: BinaryIO, out: Path, guard: _Guard, *, size: int | None = None) -> None:
    rest = size
    with out.open("wb") as target:
        while block := file.read(_BLOCK_BYTES if rest is None else min(rest, _BLOCK_BYTES)):
            target.write(block)
            guard.relative_update(len(block))
            rest = None if rest is None else rest - len(block)


def _make_scratch(parent: Path | None) -> tuple[Path, int | None]:
    """Make a scratch folder, locked while this process lives, and delete those of processes that have died.

    Only those of this machine: on a shared disk, locks of another machine may not be visible here.
    """
    parent = parent or Path(tempfile.gettempdir())
    if not system.FOLDERS_CAN_BE_LOCKED:  # then the folder of a process that was killed stays
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)), None
    prefix = f"{_PREFIX}{re.sub(r'[^A-Za-z0-9.-]', '_', socket.gethostname())}-"
    for left in parent.glob(f"{prefix}*"):
        if "-" in left.name[len(prefix) :]:  # of a machine whose name begins with this one's
            continue
        with suppress(OSError):
            handle = system.open_folder(left, follows_links=False)
            try:
                if system.try_lock(handle) and left.stat().st_uid == os.getuid():
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):  # another process may delete it before it is locked
            handle = system.open_folder(folder)
            with suppress(OSError):  # no locks there
                system.lock(handle)
            if folder.exists():
                return folder, handle
            os.close(handle)
