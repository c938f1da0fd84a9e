"""Side-cars: `.txt`, `.srt` and `.vtt` beside each video, for players and editors.

`film.mp4` gets `film.srt`. Where two files of a folder share a stem, the first by name (pictures before sound alone)
gets that, and each other one its whole name: `film.mov.srt`. A file that is there already and is not as this tool left
it, as a user's own subtitles, or a side-car that somebody corrected, is not touched: that is a failure.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args

from salmonn.batch.discovery import is_media
from salmonn.batch.hash_set import HashSet, hash_key
from salmonn.batch.ledger_files import LedgerError, append_group, cut_tail, iter_whole, no_room
from salmonn.caption.worker import Worker, WorkerDied, WorkerLimits
from salmonn.media.clip import AUDIO_SUFFIXES
from salmonn.media.container import ClipError, declared_seconds
from salmonn.records import Caption, Failure

Format = Literal["txt", "srt", "vtt"]
FORMATS: tuple[Format, ...] = get_args(Format)
# Where one of these stops a side-car, it stops the next one, too.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class Cue:
    """A text with its time in seconds from the start of the video."""

    start_seconds: float
    end_seconds: float
    text: str


@dataclass(frozen=True)
class SubtitleFile:
    """A side-car as it was left.

    Args:
        path: of the side-car.
        video: that it is of.
        size_bytes, modified_ns: by which it is known to be untouched.
    """

    path: str
    video: str
    size_bytes: int
    modified_ns: int

    @property
    def key(self) -> bytes:
        """What it is known by."""
        return hash_key(self.path, self.video, self.size_bytes, self.modified_ns)


class DurationReader:
    """Asks files for their lengths, in a process with limits, as for reading them; to be closed.

    Args:
        limits: what a file may cost.
    """

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._worker: Worker | None = None

    def close(self) -> None:
        """End the process."""
        if self._worker:
            self._worker.kill()
        self._worker = None

    def seconds(self, video: str) -> float:
        """As `declared_seconds`; raises ClipError where that does, and where it breaks a limit or its process."""
        self._worker = self._worker or Worker(self._limits)
        try:
            self._worker.begin(partial(declared_seconds, video))
            return float(self._worker.finish())
        except WorkerDied as error:
            self.close()
            raise ClipError(f"{video}: {error}") from error


class SubtitleWriter:
    """Writes side-cars; to be used in a `with` statement where captions may have no end.

    Args:
        formats: of them.
        log: file that remembers those that this process writes.
        logs: such files of earlier runs.
        folder: below which they go, under the paths of the videos; None: beside the videos.
        replace: whether other files of those names are replaced.
        limits: of asking a video how long it is, where its caption does not say.
    """

    def __init__(
        self,
        formats: Sequence[Format],
        *,
        log: Path,
        logs: Sequence[Path] = (),
        folder: Path | None = None,
        replace: bool = False,
        limits: WorkerLimits | None = None,
    ) -> None:
        self._formats = formats
        self._lengths = DurationReader(limits or WorkerLimits())
        self._log = log
        self._folder = folder
        self._replace = replace
        cut_tail(log)
        self._ours = HashSet(b"".join(one.key for path in logs for one in iter_whole(path, SubtitleFile)))

    def __enter__(self) -> "SubtitleWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._lengths.close()

    def write(self, captions: Sequence[Caption], *, only_missing: bool = False) -> list[Failure]:
        """Write those of a video.

        Args:
            captions: of the video, in order of time.
            only_missing: leave alone what is there, whatever it is.

        Returns:
            Why some could not be written.

        Raises:
            LedgerError: the disk takes nothing more.
        """
        failures = []
        for name in self._formats:
            path = self.path_of(captions[0].video, name)
            if only_missing and os.path.exists(path):  # noqa: PTH110 - says no of a name that is too long
                continue
            try:
                self._write(path, format_text(captions, name, seconds_of=self._lengths.seconds), captions[0])
            except ClipError as error:
                failures.append(_fail(captions[0], str(error)))
            except OSError as error:
                if error.errno in _DISK_ERRORS:
                    raise LedgerError(no_room(path, error)) from error
                reason = f"{path}: cannot be written ({error.strerror}); choose another folder with --subtitle-dir"
                failures.append(_fail(captions[0], reason))
        return failures

    def path_of(self, video: str, suffix: str) -> Path:
        """Where a video's side-car stands."""
        path = Path(video)
        name = path.name if _is_crowded(path) else path.stem
        if self._folder is None:
            return path.with_name(f"{name}.{suffix}")
        inside = os.path.normpath(path.parent)
        if inside.startswith(("/", "..")):
            inside = str(path.parent.absolute().resolve()).lstrip("/")
        return self._folder / inside / f"{name}.{suffix}"

    def _write(self, path: Path, text: str, caption: Caption) -> None:
        """Write one; raises OSError, and ClipError where something else stands there."""
        if path.exists() and not self._replace and path.read_bytes() != text.encode():
            there = path.stat()
            if SubtitleFile(str(path), caption.video, there.st_size, there.st_mtime_ns).key not in self._ours:
                raise ClipError(
                    f"{path}: is there already, and not as it was left here; give --replace-subtitles to replace it or "
                    "--subtitle-dir for another folder"
                )
        if self._folder is not None:  # a video's own folder is there, or gone with it
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # which the next run takes over where this one is killed
        try:
            temporary.write_bytes(text.encode())
            left = temporary.stat()
            # Before it takes its name, so that whatever stands there is known.
            sidecar = SubtitleFile(str(path), caption.video, left.st_size, left.st_mtime_ns)
            append_group(self._log, [sidecar])
            self._ours.add(sidecar.key)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _is_crowded(video: Path) -> bool:
    """Whether a video's stem belongs to another one of its folder; also where that is gone, and nobody can tell."""
    try:
        return video.name in _crowded(video.parent)
    except OSError:
        return True


@lru_cache(maxsize=8)
def _crowded(folder: Path) -> frozenset[str]:
    names = [path.name for path in folder.iterdir() if is_media(path.name)]
    names.sort(key=lambda name: (Path(name).suffix.lower() in AUDIO_SUFFIXES, name))
    first: dict[str, str] = {}
    return frozenset(name for name in names if first.setdefault(Path(name).stem, name) != name)


def format_text(captions: Sequence[Caption], name: Format, *, seconds_of: Callable[[str], float]) -> str:
    """What stands in a side-car.

    Args:
        captions: of one video, in order of time.
        name: the format.
        seconds_of: gives the length of a video, 0 where it states none; asked where a caption does not say its end.

    Raises:
        ClipError: a caption does not say where it ends, and neither does the video.
    """
    if name == "txt":
        return _format_plain(captions)
    cues = list(_cues(captions, seconds_of))
    if name == "srt":
        blocks = [
            f"{number}\n{_clock(cue.start_seconds, ',')} --> {_clock(cue.end_seconds, ',')}\n"
            # Nothing stands for other letters in SRT.
            + re.sub("-{2,}>", "->", cue.text)
            for number, cue in enumerate(cues, start=1)
        ]
    else:
        blocks = ["WEBVTT"] + [
            f"{_clock(cue.start_seconds, '.')} --> {_clock(cue.end_seconds, '.')}\n"
            + cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            for cue in cues
        ]
    return "\n\n".join(blocks) + "\n"


def _format_plain(captions: Sequence[Caption]) -> str:
    if len(captions) == 1:
        return captions[0].text + "\n"
    times = [f"[{_clock(caption.start_seconds or 0.0, '.')}] " for caption in captions]
    return "".join(time + " ".join(_lines(caption.text)) + "\n" for time, caption in zip(times, captions, strict=True))


def _cues(captions: Sequence[Caption], seconds_of: Callable[[str], float]) -> Iterator[Cue]:
    for caption in captions:
        text = "\n".join(_lines(caption.text))
        if text:
            start = caption.start_seconds or 0.0
            yield Cue(start, max(_end_seconds(caption, seconds_of), start + 0.001), text)


def _lines(text: str) -> list[str]:
    """A text's lines; an empty one would end the cue."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _end_seconds(caption: Caption, seconds_of: Callable[[str], float]) -> float:
    end = seconds_of(caption.video) if caption.end_seconds is None else caption.end_seconds
    if end <= 0:
        raise ClipError(
            f"{caption.video}: does not say how long it is, so that a cue has no end; give --segment-seconds, or --end"
        )
    return end


def _clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and thousandths."""
    total = round(seconds * 1000)
    return f"{total // 3_600_000:02d}:{total // 60_000 % 60:02d}:{total // 1000 % 60:02d}{point}{total % 1000:03d}"


def _fail(caption: Caption, reason: str) -> Failure:
    return Failure(caption.video, reason, "write", size_bytes=caption.size_bytes, modified_ns=caption.modified_ns)
