"""A captions file that people review in the web UI: its rows with rewards and feedback, pictures, videos and edits."""

import mimetypes
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from threading import Lock

from starlette.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from salmonn.batch.discovery import is_media
from salmonn.batch.edits import Edit, EditableCaptions
from salmonn.batch.export import LatestCaptions
from salmonn.batch.ledger_files import SUBTITLES_SUFFIX
from salmonn.batch.review import ISSUES, ReviewRow, find_video
from salmonn.batch.subtitles import SubtitleFormat, SubtitleWriter
from salmonn.batch.thumbnails import describe_missing, submit_thumbnail, to_data_url
from salmonn.caption.loader import ClipReader
from salmonn.media.container import ClipError
from salmonn.preference.feedback import Action, Candidate, Feedback, FeedbackStore, utc_now
from salmonn.records import Caption, Failure

VIDEO_ROUTE = "dataset-video"
_MAX_PICTURES = 2000  # kept in memory, of about 6 KB each
ClipKey = tuple[str, float | None, float | None]

FILTERS = (
    "all", "to review", "failed", "unfinished", "incomplete", "repetitive", "same text", "short", "long", "low reward",
    "edited", "accepted",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetRow:
    """A row as the web UI shows it.

    Args:
        number: number of the row, which never changes.
        row: caption or failure with its possible issues.
        reward: its reward; None if unknown.
        review: a person's action on exactly this text.
    """

    number: int
    row: ReviewRow
    reward: float | None = None
    review: str = ""

    @property
    def key(self) -> ClipKey:
        """The part of the video."""
        return _clip_key(self.row.record)


@dataclass(frozen=True)
class Picture:
    """A picture of a clip as a data URL, or the reason why there is none; both are empty if it is not known yet."""

    url: str = ""
    reason: str = ""


@dataclass
class Dataset:
    """A captions file under review.

    Args:
        captions: its captions.
        feedback: where edits and accepted captions are saved, too.
        reader: worker processes that read pictures.
        root: folder that the paths of the videos start from.
        rewards: (video, sample) -> reward.
    """

    captions: EditableCaptions
    feedback: FeedbackStore
    reader: ClipReader
    root: Path
    rewards: Mapping[tuple[str, int], float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, init=False)
    _reviews: dict[tuple[ClipKey, str], str] = field(default_factory=dict, init=False)
    _pictures: OrderedDict[ClipKey, Picture] = field(default_factory=OrderedDict, init=False)
    _tokens: dict[str, Path] = field(default_factory=dict, init=False)
    _token_of: dict[Path, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for one in self.feedback.read():
            if one.tab == "dataset":
                self._note(one)

    def rows(self) -> list[DatasetRow]:
        """Return all rows as they are now."""
        return [
            DatasetRow(number, row, self._reward(row), self._reviews.get((_clip_key(row.record), row.text), ""))
            for number, row in self.captions.rows().items()
        ]

    def find(self, *, show: str, search: str) -> list[DatasetRow]:
        """Return the rows of a filter that have all words of a search in their text or file name.

        Short captions have less than half of the median number of words, long ones more than twice as many. Low rewards
        are the lowest tenth.
        """
        rows = self.rows()
        words = search.lower().split()
        test = _filter_test(show, rows)
        return [
            one for one in rows
            if test(one) and all(word in f"{one.row.record.video}\n{one.row.text}".lower() for word in words)
        ]  # fmt: skip

    def edit(self, edits: Sequence[Edit], *, rater: str = "", keep_videos: bool = False) -> tuple[int, list[int]]:
        """Write edits to the captions file, and save them as feedback.

        Returns:
            The number of edits made, and the rows that somebody else has changed.

        Raises:
            ValueError, OSError: see `EditableCaptions.apply` and `FeedbackStore.add`.
        """
        before, conflicts = self.captions.apply(edits)
        made = [edit for edit in edits if edit.row not in conflicts]
        for caption, edit in zip(before, made, strict=True):
            self._save(caption, "edit", edit.text, rater=rater, keep_videos=keep_videos)
        return len(made), conflicts

    def accept(self, row: int, text: str, *, rater: str = "", keep_videos: bool = False) -> None:
        """Save that a person found a caption right as it is.

        Raises:
            ValueError: the row has no caption with this text.
            OSError: the feedback cannot be saved.
        """
        found = self.captions.rows().get(row)
        if found is None or not isinstance(found.record, Caption) or found.text != text:
            raise ValueError("this caption has changed since it was shown: read it again")
        self._save(found.record, "accept", text, rater=rater, keep_videos=keep_videos)

    def pictures(self, rows: Sequence[ReviewRow], *, only_known: bool = False) -> list[Picture]:
        """Return a picture of each clip; with `only_known`, an empty one where it has not been read yet."""
        reading = {} if only_known else {_clip_key(row.record): self._submit(row) for row in rows}
        pictures = []
        for row in rows:
            key = _clip_key(row.record)
            with self._lock:
                picture = self._pictures.get(key)
            if picture is None and key in reading:
                picture = self._wait(reading[key], row)
                with self._lock:
                    self._pictures[key] = picture
                    while len(self._pictures) > _MAX_PICTURES:
                        self._pictures.popitem(last=False)
            pictures.append(picture or Picture())
        return pictures

    def _submit(self, row: ReviewRow) -> "Future[bytes] | str":
        """Start reading a picture, unless it is known; return why that is impossible, else."""
        with self._lock:
            if _clip_key(row.record) in self._pictures:
                return ""
        try:
            path = self._find_video(row.record)
        except ValueError as error:
            return str(error)
        start, end = row.record.start_seconds, row.record.end_seconds
        return submit_thumbnail(self.reader, path, start_seconds=start, end_seconds=end)

    def _wait(self, reading: "Future[bytes] | str", row: ReviewRow) -> Picture:
        if isinstance(reading, str):
            return Picture(reason=reading)
        try:
            return Picture(to_data_url(reading.result()))
        except ClipError as error:
            return Picture(reason=describe_missing(error, self._find_video(row.record)))

    def write_subtitles(self, formats: Sequence[SubtitleFormat]) -> tuple[int, list[Failure]]:
        """Write subtitle files of all captions next to their videos, except over files that this tool did not write.

        Returns:
            The number of videos, and why some files could not be written.
        """
        files, number, failures = self.captions.files, 0, list[Failure]()
        with SubtitleWriter(formats, log=files.subtitles, logs=files.find(SUBTITLES_SUFFIX)) as subtitles:
            for captions in LatestCaptions(files.all_captions()).by_video():
                try:
                    path = str(self._find_video(captions[0]))
                except ValueError as error:
                    failures.append(Failure(captions[0].video, f"{captions[0].video}: {error}", "write"))
                    continue
                failures += subtitles.write([replace(one, video=path) for one in captions])
                number += 1
        return number, failures

    def video_url(self, row: ReviewRow) -> str:
        """Return the address of a video under a random name, relative to that of the page; "" if there is none.

        Files whose suffix is not one of video or sound are not served, whatever a captions file names.
        """
        try:
            path = self._find_video(row.record).resolve()
        except ValueError:
            return ""
        if not is_media(path.name):
            return ""
        with self._lock:
            if path not in self._token_of:
                token = secrets.token_urlsafe(24)
                self._token_of[path], self._tokens[token] = token, path
            return f"{VIDEO_ROUTE}/{self._token_of[path]}"

    def video_of(self, token: str) -> Path | None:
        """Return the video with a random name."""
        return self._tokens.get(token)

    def _find_video(self, record: Caption | Failure) -> Path:
        try:
            return find_video(record.video, root=self.root, captions_dir=self.captions.files.out.parent)
        except ValueError as error:  # without the server's folders
            raise ValueError(str(error).partition(", neither in")[0]) from error

    def _reward(self, row: ReviewRow) -> float | None:
        record = row.record
        return self.rewards.get((record.video, record.sample)) if isinstance(record, Caption) else None

    def _save(self, caption: Caption, action: Action, text: str, *, rater: str, keep_videos: bool) -> None:
        feedback = Feedback(
            utc_now(),
            action,
            caption.video,
            Candidate(caption.model, caption.text, caption.prompt, caption.finished),
            text=text,
            tab="dataset",
            modality=caption.modality or "both",
            start_seconds=caption.start_seconds,
            end_seconds=caption.end_seconds,
            rater=rater,
        )
        self._note(self.feedback.add(feedback, self._find_video(caption) if keep_videos else None))

    def _note(self, one: Feedback) -> None:
        key = (one.video, one.start_seconds, one.end_seconds)
        self._reviews[key, one.text] = "accepted" if one.action == "accept" else "edited"


def _filter_test(show: str, rows: Sequence[DatasetRow]) -> Callable[[DatasetRow], bool]:
    if show in ISSUES:
        return lambda one: one.row.has_issue(show)
    middle = 0.0
    if show in ("short", "long"):
        middle = median([one.row.num_words for one in rows if isinstance(one.row.record, Caption)] or [0])
    rewards = sorted(one.reward for one in rows if one.reward is not None)
    low = rewards[len(rewards) // 10] if rewards else 0.0

    def is_caption(one: DatasetRow) -> bool:
        return isinstance(one.row.record, Caption)

    tests: dict[str, Callable[[DatasetRow], bool]] = {
        "all": lambda one: True,
        "to review": lambda one: is_caption(one) and not one.review,
        "short": lambda one: is_caption(one) and one.row.num_words < middle / 2,
        "long": lambda one: is_caption(one) and one.row.num_words > 2 * middle,
        "low reward": lambda one: one.reward is not None and one.reward <= low,
        "edited": lambda one: one.review == "edited",
        "accepted": lambda one: one.review == "accepted",
    }
    return tests[show]


def _clip_key(record: Caption | Failure) -> ClipKey:
    return record.video, record.start_seconds, record.end_seconds


@dataclass(frozen=True)
class Replacement:
    """What to replace in captions.

    Args:
        find: text to find.
        text: text in its place.
        match_case: whether capital and small letters differ.
        whole_words: whether the text must not be a part of a longer word.

    Raises:
        ValueError: there is nothing to find.
    """

    find: str
    text: str
    match_case: bool = False
    whole_words: bool = True

    def __post_init__(self) -> None:
        if not self.find.strip():
            raise ValueError("enter a text to find")

    @property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression of the text to find."""
        found = re.escape(self.find)
        if self.whole_words:
            found = rf"(?<!\w){found}(?!\w)"
        return re.compile(found, re.NOFLAG if self.match_case else re.IGNORECASE)

    def edits(self, rows: Sequence[DatasetRow]) -> tuple[list[Edit], int]:
        """Return an edit for each caption that changes, and the number of places."""
        edits, num_places = [], 0
        for one in rows:
            if isinstance(one.row.record, Caption):
                text, count = self.pattern.subn(lambda _: self.text, one.row.text)
                if text != one.row.text:
                    edits.append(Edit(one.number, one.row.text, text))
                    num_places += count
        return edits, num_places


class DatasetVideos:
    """ASGI middleware that serves the videos of a dataset by their random names, and nothing else.

    The names are on pages that need the password, if there is one.
    """

    def __init__(self, app: ASGIApp, *, dataset: Dataset) -> None:
        self.app = app
        self.dataset = dataset

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a video, or pass the request on."""
        _, route, token = (scope["path"] if scope["type"] == "http" else "").rpartition(f"/{VIDEO_ROUTE}/")
        if not route or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        path = self.dataset.video_of(token)
        if path is None or not path.is_file():
            await PlainTextResponse("not found", status_code=404)(scope, receive, send)
            return
        kind = mimetypes.guess_type(path.name)[0] or ""
        is_media = kind.startswith(("video/", "audio/"))
        response = FileResponse(
            path,
            media_type=kind if is_media else "application/octet-stream",
            headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private"},
        )
        await response(scope, receive, send)
