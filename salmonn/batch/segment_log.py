"""The log of finished segments, `captions.segments.jsonl`: a run killed within a film does not caption them again."""

from collections import defaultdict

from salmonn.batch.discovery import VideoFile
from salmonn.batch.ledger import Ledger, version_key
from salmonn.batch.ledger_files import SEGMENTS_SUFFIX, append_records, read_complete, repair_last_line
from salmonn.files import write_records
from salmonn.records import Caption


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
