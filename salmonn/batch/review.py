"""The captions and failures of a run as rows to review, with what may be wrong with each."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from salmonn.batch.export import LatestCaptions
from salmonn.batch.ledger_files import (
    FAILED_SUFFIX,
    VERSION_FIELDS,
    LedgerFiles,
    captions_among,
    in_order,
    read_complete,
)
from salmonn.records import Caption, Failure
from salmonn.score.repetition import count_repeated_words
from salmonn.score.text_spans import count_words

Issue = Literal["failed", "unfinished", "incomplete", "warnings", "repetitive", "same text", "empty"]
ISSUES: tuple[Issue, ...] = get_args(Issue)
ISSUE_MEANINGS: dict[Issue, str] = {
    "failed": "the video, or a part of it, could not be captioned",
    "unfinished": "the caption was cut off at the token limit",
    "incomplete": "the file is damaged: a part of it is missing",
    "warnings": "something was lost, ignored or guessed when the file was read",
    "repetitive": "clauses of the caption repeat earlier ones",
    "same text": "another clip has the same caption",
    "empty": "the caption has no words",
}
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# The web UI reads a file again whenever it has changed.
_count_words = lru_cache(maxsize=1 << 16)(count_words)
_count_repeated_words = lru_cache(maxsize=1 << 16)(count_repeated_words)


@dataclass(frozen=True)
class ReviewRow:
    """A caption, or a part of a video that could not be captioned.

    Slow measurements are made when they are first needed: a page shows few of many rows.

    Args:
        record: the caption or the failure.
        shares_text: whether another clip has the same caption.
    """

    record: Caption | Failure
    shares_text: bool = False

    @property
    def text(self) -> str:
        """The caption, or the reason of the failure."""
        return self.record.text if isinstance(self.record, Caption) else self.record.reason

    @property
    def num_words(self) -> int:
        """Number of words of the caption; 0 for a failure."""
        return _count_words(self.record.text) if isinstance(self.record, Caption) else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was lost, ignored or guessed when the file was read."""
        return self.record.warnings if isinstance(self.record, Caption) else ()

    @property
    def issues(self) -> tuple[Issue, ...]:
        """Possible issues of the row."""
        return tuple(issue for issue in ISSUES if self.has_issue(issue))

    def has_issue(self, issue: Issue) -> bool:
        """Return whether the row may have an issue."""
        if not isinstance(self.record, Caption):
            return issue == "failed"
        is_empty = not self.record.text.strip()
        tests: dict[Issue, Callable[[Caption], bool]] = {
            "unfinished": lambda one: not one.finished,
            "incomplete": lambda one: not one.complete,
            "warnings": lambda one: bool(one.warnings),
            "repetitive": lambda one: _count_repeated_words(one.text)[0] > 0,
            "same text": lambda one: self.shares_text and not is_empty,
            "empty": lambda one: is_empty,
        }
        return issue in tests and tests[issue](self.record)


def read_rows(paths: Sequence[Path]) -> list[ReviewRow]:
    """Read the latest captions of a run, and the failures that no later caption has resolved.

    Args:
        paths: captions files of one or more runs; other files of a run among them are skipped.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file holds no captions, or has an invalid line.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file; name JSONL files from `salmonn caption`")
    named = captions_among(paths)
    captions = list(LatestCaptions(in_order(named)))
    failures = list(_outstanding(named, captions))
    if not captions and not failures:
        raise ValueError(f"{paths[0]} contains no captions; name JSONL files from `salmonn caption`")
    videos_by_text: dict[str, set[str]] = {}
    for caption in captions:
        videos_by_text.setdefault(caption.text.strip(), set()).add(caption.video)
    rows = [ReviewRow(caption, len(videos_by_text[caption.text.strip()]) > 1) for caption in captions]
    return rows + [ReviewRow(failure) for failure in failures]


def _outstanding(paths: Sequence[Path], captions: Sequence[Caption]) -> Iterator[Failure]:
    """Yield the last failure of each part of a video, unless its caption has been written since."""
    failed: dict[tuple[object, ...], Failure] = {}
    for files in dict.fromkeys(map(LedgerFiles.of, paths)):
        for path in files.find(FAILED_SUFFIX):
            for failure in read_complete(path, Failure):
                failed[failure.stage == "write", *_part(failure)] = failure
    captioned = {_part(caption) for caption in captions}
    yield from (one for (is_write, *part), one in failed.items() if is_write or tuple(part) not in captioned)


def _part(record: Caption | Failure) -> tuple[object, ...]:
    version = (getattr(record, name) for name in VERSION_FIELDS)
    return record.video, *version, record.start_seconds or 0.0


def find_video(name: str, *, root: Path, captions_dir: Path) -> Path:
    """Return the file of a caption: its path from `root`, else from the folder of the captions file.

    Raises:
        ValueError: it is remote, or there is no such file.
    """
    if _REMOTE.match(name):
        raise ValueError("the video is remote and is not fetched")
    for folder in (root, captions_dir):
        if (path := folder / name).is_file():
            return path
    raise ValueError(f"there is no such file, neither in {root.absolute()} nor in {captions_dir.absolute()}")


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: captions with `first` to `last` words."""

    first: int
    last: int
    count: int


def word_histogram(rows: Sequence[ReviewRow], *, max_bars: int = 24) -> list[Bar]:
    """Return the number of captions by their number of words, in at most `max_bars` equal steps of 1, 2 or 5 x 10^n."""
    counts = Counter(row.num_words for row in rows if isinstance(row.record, Caption))
    if not counts:
        return []
    longest = max(counts)
    step = next(size for power in range(9) for size in (10**power, 2 * 10**power, 5 * 10**power)
                if longest < max_bars * size)  # fmt: skip
    bars = Counter({number // step: 0 for number in counts})
    for number, count in counts.items():
        bars[number // step] += count
    return [Bar(step * index, step * (index + 1) - 1, bars[index]) for index in range(longest // step + 1)]
