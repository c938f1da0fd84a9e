"""Records for tests of the ledger, and short forms of its questions."""

from dataclasses import replace
from pathlib import Path

from salmonn.batch.discovery import VideoFile
from salmonn.batch.ledger import Ledger
from salmonn.files import read_records
from salmonn.records import Caption, Failure

JOB = {"model": "toy", "temperature": 0.0}


def caption(video="a.mp4", *, text="words", size=5, start=None, end=None) -> Caption:
    return Caption(video, text, start_seconds=start, end_seconds=end, size_bytes=size, modified_ns=7)


def segments(*captions: Caption, num_failed: int = 0) -> list[Caption]:
    """Captions of one video's segments, as a job numbers them."""
    counts = dict(num_segments=len(captions) + num_failed, num_failed_segments=num_failed)
    return [replace(one, segment=number, **counts) for number, one in enumerate(captions)]


def failure(video="a.mp4", *, size=5, start=None, stage="read") -> Failure:
    return Failure(video, "broken", stage, start_seconds=start, size_bytes=size, modified_ns=7)


def opened(files, **options) -> Ledger:
    return Ledger(files, job=options.pop("job", JOB), **options)


def is_done(ledger: Ledger, video: VideoFile) -> bool:
    return ledger.status(video) in ("done", "failed in part")


def has_failed(ledger: Ledger, found: VideoFile | Failure) -> bool:
    return ledger.status(found) == "failed"


def has_failed_in_part(ledger: Ledger, video: VideoFile) -> bool:
    return ledger.status(video) == "failed in part"


def write(files, *groups, **options) -> None:
    with opened(files, **options) as ledger:
        for group in groups:
            ledger.write(group)


def names(out: Path, kind: type = Caption) -> list[str]:
    """Return folder and name of the videos in a file, sorted."""
    return sorted("/".join(Path(one.video).parts[-2:]) for one in read_records(out, kind))


# Of the videos of the fixture `folder`.
EACH_ONCE = sorted(f"{room}/{number}.mp4" for room in ("clips", "more") for number in range(3))
