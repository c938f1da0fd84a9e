"""The log of found shots, `captions.shots.jsonl`: shots are found once, and a run that resumes has the same ones."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from salmonn.batch.discovery import VideoFile
from salmonn.batch.ledger import version_key
from salmonn.batch.ledger_files import (
    SHOTS_SUFFIX,
    LedgerFiles,
    append_records,
    read_complete,
    repair_last_line,
)
from salmonn.records import Failure

VideoOf = Callable[[Path], VideoFile | Failure]


@dataclass(frozen=True)
class ShotBounds:
    """The shots of a video.

    Args:
        video: path of the file.
        bounds: start of each shot and end of the last, in seconds.
        size_bytes, modified_ns, etag: version of the file, as in `Caption`.
    """

    video: str
    bounds: tuple[float, ...]
    size_bytes: int | None = None
    modified_ns: int | None = None
    etag: str | None = None


class ShotLog:
    """A `BoundsStore` next to the captions of a run.

    Args:
        files: names of the run's files. The logs of all shards are read, and this shard's is appended to.
        is_done: whether nothing is left to do for a file, so that its shots are not needed any more.
        video_of: returns the video that a path stands for; see `Fetcher.video_of`.
    """

    def __init__(self, files: LedgerFiles, *, is_done: Callable[[VideoFile], bool], video_of: VideoOf) -> None:
        self._video_of = video_of
        self._path = files.shots
        self._lock = threading.Lock()
        repair_last_line(self._path)
        self._bounds = {
            version_key(video): shots.bounds
            for path in files.find(SHOTS_SUFFIX)
            for shots in read_complete(path, ShotBounds)
            if not is_done(video := VideoFile(shots.video, shots.size_bytes, shots.modified_ns, shots.etag))
        }

    def get(self, path: Path) -> Sequence[float] | None:
        """See `BoundsStore`."""
        video = self._video_of(path)
        return self._bounds.pop(version_key(video), None) if isinstance(video, VideoFile) else None

    def put(self, path: Path, bounds: Sequence[float]) -> None:
        """See `BoundsStore`; raises a LedgerError if the disk does not take them."""
        video = self._video_of(path)
        if isinstance(video, VideoFile) and bounds:
            with self._lock:
                append_records(
                    self._path, [ShotBounds(video.path, tuple(bounds), video.size_bytes, video.modified_ns, video.etag)]
                )
