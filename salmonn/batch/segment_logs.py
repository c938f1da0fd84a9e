"""Logs of the segments of videos: the finished ones, and the shots by which videos are split.

`captions.segments.jsonl`: a run killed within a film does not caption its finished segments again.
`captions.shots.jsonl`: shots are found once, and a run that resumes has the same ones.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from salmonn.batch.discovery import VideoFile
from salmonn.batch.ledger import Ledger, version_key
from salmonn.batch.ledger_files import (
    SEGMENTS_SUFFIX,
    SHOTS_SUFFIX,
    append_records,
    read_complete,
    repair_last_line,
)
from salmonn.files import write_records
from salmonn.records import Caption, Failure


class SegmentLog:
    """Captions of the segments of videos that are not finished yet; a finished video has them in its ledger.

    Args:
        ledger: ledger of the run. The logs of all shards are read, and this shard's is appended to.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._path = ledger.files.segments
        self._captions: defaultdict[bytes, dict[float, Caption]] = defaultdict(dict)
        repair_last_line(self._path)
        for path in ledger.files.find(SEGMENTS_SUFFIX):
            for caption in read_complete(path, Caption):
                video = VideoFile(caption.video, caption.size_bytes, caption.modified_ns, caption.etag)
                if ledger.status(video) != "done":
                    self._captions[version_key(video)][caption.start_seconds or 0.0] = caption

    def take(self, video: VideoFile) -> list[Caption]:
        """Return the captions of a video's segments that an earlier run finished, and forget them."""
        return list(self._captions.pop(version_key(video), {}).values())

    def put(self, caption: Caption) -> None:
        """Write the caption of a segment; raises a LedgerError if the disk does not take it."""
        self._ledger.write_job()  # a run with other settings must not use it
        append_records(self._path, [caption])

    def finish(self) -> None:
        """Keep only captions of videos that this run did not get to."""
        left = [caption for captions in self._captions.values() for caption in captions.values()]
        if left:
            write_records(self._path, left)
        else:
            self._path.unlink(missing_ok=True)


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
        ledger: ledger of the run. The logs of all shards are read, and this shard's is appended to.
        video_of: returns the video that a path stands for; see `Fetcher.video_of`.
    """

    def __init__(self, ledger: Ledger, video_of: Callable[[Path], VideoFile | Failure]) -> None:
        self._video_of = video_of
        self._path = ledger.files.shots
        self._lock = threading.Lock()
        repair_last_line(self._path)
        self._bounds = {
            version_key(video): shots.bounds
            for path in ledger.files.find(SHOTS_SUFFIX)
            for shots in read_complete(path, ShotBounds)
            if ledger.status(video := VideoFile(shots.video, shots.size_bytes, shots.modified_ns, shots.etag)) != "done"
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
