"""Write `.txt`, `.srt`, `.vtt` and `.json` files next to each video, for players and editors.

`film.mp4` gets `film.srt`. If two files of a folder share a stem, the first by name (video before audio) gets that, and
each other one keeps its suffix: `film.mov.srt`. Captions of several named prompts go to a file each: `film.short.srt`.
An existing file is overwritten only as long as it is exactly as this tool wrote it: a user's own subtitles, or a file
that a person has corrected, stay as they are and are reported as failures.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from salmonn.batch.containers import split_member
from salmonn.batch.discovery import is_media
from salmonn.batch.ledger_files import (
    SUBTITLES_SUFFIX,
    HashSet,
    LedgerError,
    LedgerFiles,
    append_records,
    cannot_write,
    hash_key,
    read_complete,
    repair_last_line,
)
from salmonn.batch.remote import is_url
from salmonn.batch.transcripts import Transcript, subtitle_key
from salmonn.caption.worker import Worker, WorkerDied, WorkerLimits
from salmonn.files import read_json
from salmonn.media.clip import AUDIO_SUFFIXES
from salmonn.media.container import ClipError
from salmonn.media.index import measured_seconds
from salmonn.records import Caption, Failure

SubtitleFormat = Literal["txt", "srt", "vtt", "json"]
SUBTITLE_FORMATS: tuple[SubtitleFormat, ...] = get_args(SubtitleFormat)
# Errors that would stop every other file, too.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class SubtitleFile:
    """A subtitle file as it was written.

    Args:
        path: path of the subtitle file.
        video: path of its video.
        size_bytes, modified_ns: size and time, by which an unchanged file is recognized.
    """

    path: str
    video: str
    size_bytes: int
    modified_ns: int

    @property
    def key(self) -> bytes:
        """Key for a `HashSet`."""
        return hash_key(self.path, self.video, self.size_bytes, self.modified_ns)


def written_captions(folder: Path) -> HashSet:
    """Return the keys (`subtitle_key`) of the files with captions, not transcripts, that the runs in a folder wrote."""
    keys = bytearray()
    for log in sorted(folder.glob(f"*{SUBTITLES_SUFFIX}")):
        job = LedgerFiles.of(log.with_name(log.name.removesuffix(SUBTITLES_SUFFIX) + ".jsonl")).job
        if not (job.is_file() and "whisper_model" in read_json(job)):
            for one in read_complete(log, SubtitleFile):
                keys += subtitle_key(one.path, one.size_bytes, one.modified_ns)
    return HashSet(keys)


class WrittenFiles:
    """The files that runs wrote for users; they are overwritten only as long as they are as they were written.

    Args:
        log: file that remembers what this process writes.
        logs: such files of earlier runs.
        replace: overwrite existing files that these runs did not write, too.
    """

    def __init__(self, log: Path, *, logs: Sequence[Path] = (), replace: bool = False) -> None:
        self._log = log
        self._replace = replace
        repair_last_line(log)
        self._keys = HashSet(b"".join(one.key for path in logs for one in read_complete(path, SubtitleFile)))

    def require_own(self, path: Path, video: str, *, content: bytes | None = None, remedy: str) -> None:
        """Raise a ClipError if there is a file that no run wrote, or that has been changed since.

        Args:
            path: file to be overwritten.
            video: its video; "" for a file about many.
            content: what is to be written; a file with the same content is accepted.
            remedy: how to choose another path.
        """
        if self._replace or not path.exists() or (content is not None and path.read_bytes() == content):
            return
        found = path.stat()
        if SubtitleFile(str(path), video, found.st_size, found.st_mtime_ns).key not in self._keys:
            raise ClipError(
                f"{path} exists and was not written by this run, or has been changed since; use --replace-subtitles to "
                f"overwrite it or {remedy}"
            )

    def add(self, path: Path, video: str, temporary: Path) -> None:
        """Log a complete file before it is renamed to `path`, so that every file under that name is known."""
        written = temporary.stat()
        one = SubtitleFile(str(path), video, written.st_size, written.st_mtime_ns)
        append_records(self._log, [one])
        self._keys.add(one.key)


class SubtitleWriter(AbstractContextManager["SubtitleWriter"]):
    """Writes subtitle files; use it in a `with` statement if captions may lack their end time.

    Args:
        formats: formats to write.
        log, logs, replace: see `WrittenFiles`.
        folder: folder that the files go to, under the paths of the videos; None: next to the videos.
        limits: limits for reading a video's duration, which is needed if a caption has no end time.
    """

    def __init__(
        self,
        formats: Sequence[SubtitleFormat],
        *,
        log: Path,
        logs: Sequence[Path] = (),
        folder: Path | None = None,
        replace: bool = False,
        limits: WorkerLimits | None = None,
    ) -> None:
        self._formats = formats
        self._limits = limits or WorkerLimits()
        self._worker: Worker | None = None
        self._folder = folder
        self._written = WrittenFiles(log, logs=logs, replace=replace)

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._worker.close()
        self._worker = None

    def write(self, captions: Sequence[Caption], *, only_missing: bool = False) -> list[Failure]:
        """Write the subtitle files of a video, one for each named prompt if there are several.

        Args:
            captions: captions of the video in order of time.
            only_missing: skip files that exist.

        Returns:
            A failure for each file that could not be written.

        Raises:
            LedgerError: the disk takes nothing more.
        """
        failures = []
        for prompt, name in product(captions[0].captions or [None], self._formats):
            path = self.path_of(captions[0].video, name if prompt is None else f"{prompt}.{name}")
            if only_missing and os.path.exists(path):  # noqa: PTH110 - False for a name that is too long
                continue
            texts = captions if prompt is None else [replace(one, text=one.captions[prompt]) for one in captions]
            try:
                self._write(path, format_text(texts, name, seconds_of=self._measured_seconds), captions[0])
                continue
            except ClipError as error:
                reason = str(error)
            except OSError as error:
                if error.errno in _DISK_ERRORS:
                    hint = ", or write subtitles to another folder with --subtitle-dir"
                    raise LedgerError(cannot_write(path, error) + hint) from error
                is_too_long = error.errno == errno.ENAMETOOLONG
                remedy = "rename the video" if is_too_long else "choose another folder with --subtitle-dir"
                reason = f"{path} cannot be written ({error.strerror}); {remedy}"
            first = captions[0]
            version = (first.size_bytes, first.modified_ns, first.etag)
            failures.append(Failure(first.video, reason, "write", None, None, *version))
        return failures

    def path_of(self, video: str, suffix: str) -> Path:
        """Return the path of a video's subtitle file."""
        path = Path(re.sub("^([A-Za-z0-9+.-]+)://", r"\1/", video))  # s3://bucket/... goes to the folder s3/bucket/...
        name = path.name if _shares_stem(path) else path.stem
        if self._folder is None:
            return path.with_name(f"{name}.{suffix}")
        inside = os.path.normpath(path.parent)
        if inside.startswith(("/", "..")):
            inside = str(path.parent.absolute().resolve()).lstrip("/")
        return self._folder / inside / f"{name}.{suffix}"

    def _measured_seconds(self, video: str) -> float:
        """Return `measured_seconds` of a video, read in a process with limits; raises ClipError."""
        self._worker = self._worker or Worker(self._limits)
        try:
            self._worker.start_job(partial(measured_seconds, video))
            return float(self._worker.result())
        except WorkerDied as error:
            self._worker.close()
            self._worker = None
            raise ClipError(f"{video}: {error}") from error

    def _write(self, path: Path, text: str, caption: Caption) -> None:
        """Write one file; raises OSError, and ClipError if a user's file has that name or the video is remote."""
        if self._folder is None and (is_url(caption.video) or split_member(caption.video)):
            raise ClipError(f"{caption.video}: subtitles are not written next to this video; choose a --subtitle-dir")
        remedy = "--subtitle-dir to choose another folder"
        self._written.require_own(path, caption.video, content=text.encode(), remedy=remedy)
        if self._folder is not None:  # a video's own folder exists, or is gone with the video
            path.parent.mkdir(parents=True, exist_ok=True)
        # Short, since the file's own name may have the maximum length; the same in the next run if this one is killed.
        temporary = path.with_name(f".{hash_key(path.name).hex()}.tmp")
        try:
            temporary.write_bytes(text.encode())
            self._written.add(path, caption.video, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _shares_stem(video: Path) -> bool:
    """Return whether another file comes first among those with the same stem; also True if the folder is gone."""
    try:
        return video.name in _later_names(video.parent)
    except OSError:
        return True


@lru_cache(maxsize=8)
def _later_names(folder: Path) -> frozenset[str]:
    names = [path.name for path in folder.iterdir() if is_media(path.name)]
    names.sort(key=lambda name: (Path(name).suffix.lower() in AUDIO_SUFFIXES, name))
    first: dict[str, str] = {}
    return frozenset(name for name in names if first.setdefault(Path(name).stem, name) != name)


def format_text(captions: Sequence[Caption], name: SubtitleFormat, *, seconds_of: Callable[[str], float]) -> str:
    """Return the contents of a subtitle file; of a transcript, each utterance is a caption.

    Args:
        captions: captions of one video in order of time, or its transcript.
        name: format.
        seconds_of: returns the duration of a video, 0 if it declares none; called if a caption has no end time.

    Raises:
        ClipError: a caption has no end time, and its video no duration.
    """
    if name == "json":
        records = [asdict(caption) for caption in captions]
        is_transcript = isinstance(captions[0], Transcript)
        return json.dumps(records[0] if is_transcript else records, ensure_ascii=False, indent=2) + "\n"
    captions = [one for each in captions for one in (each.cues() if isinstance(each, Transcript) else [each])]
    if name == "txt":
        if len(captions) == 1:
            return captions[0].text + "\n"
        times = [f"[{_clock(caption.start_seconds or 0.0, '.')}] " for caption in captions]
        lines = (" ".join(_lines(caption.text)) for caption in captions)
        return "".join(f"{time}{line}\n" for time, line in zip(times, lines, strict=True))
    captions = [cue for caption in captions for cue in _event_cues(caption)]
    blocks = ["WEBVTT"] if name == "vtt" else []
    for number, (start, end, text) in enumerate(_cues(captions, seconds_of), start=1):
        if name == "srt":  # SRT has no escape sequences, and an arrow would start a cue
            safe = re.sub("-{2,}>", "->", text)
            blocks.append(f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{safe}")
        else:
            safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            blocks.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{safe}")
    return "\n\n".join(blocks) + "\n"


def _event_cues(caption: Caption) -> list[Caption]:
    """Return a caption for each event and spoken line of a caption in the form of events; any other one unchanged."""
    if caption.structure is None or not (events := caption.structure.all_events()):
        return [caption]
    return [
        replace(caption, text=event.text, start_seconds=event.start_seconds, end_seconds=event.end_seconds)
        for event in events
    ]


def _cues(captions: Sequence[Caption], seconds_of: Callable[[str], float]) -> Iterator[tuple[float, float, str]]:
    """Yield the start, end and text of each caption that has text."""
    for caption in captions:
        text = "\n".join(_lines(caption.text))
        if text:
            start = caption.start_seconds or 0.0
            end = seconds_of(caption.video) if caption.end_seconds is None else caption.end_seconds
            if end <= 0:
                raise ClipError(f"{caption.video}: the file has no timestamps, so its subtitle has no end; use --end")
            yield start, max(end, start + 0.001), text


def _lines(text: str) -> list[str]:
    """Split a text into lines without empty ones, which would end a cue."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _clock(seconds: float, point: str) -> str:
    """Format a time as hours, minutes, seconds and milliseconds."""
    total = round(seconds * 1000)
    return f"{total // 3_600_000:02d}:{total // 60_000 % 60:02d}:{total // 1000 % 60:02d}{point}{total % 1000:03d}"
