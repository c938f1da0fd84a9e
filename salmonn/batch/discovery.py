"""Which videos there are: files and folders as they are named, or as they stand in a list; ten million of them, too.

    for video in Listing(paths=["clips/"], globs=["*.mp4"]).videos(): ...

Nothing is held but the names of the folder that is being walked through.
"""

import codecs
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Literal

from salmonn.media.clip import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from salmonn.media.container import ClipError
from salmonn.records import Failure

logger = logging.getLogger(__name__)

LogFunction = Callable[..., object]  # of a format and its values, as a logger's methods take them
Kind = Literal["folder", "link", "media", "other"]
STDIN = "-"
MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES


@dataclass(frozen=True)
class VideoFile:
    """A file that is to be captioned, as it was when it was listed.

    Args:
        path: as it was named.
        size_bytes, modified_ns: as in `Caption`; None where there is no such file.
    """

    path: str
    size_bytes: int | None = None
    modified_ns: int | None = None


@dataclass(frozen=True)
class Shard:
    """One part of the videos, by a hash of their paths: the `number`-th of `count`, the first is 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"there is no shard {self.number} of {self.count}: they are numbered from 1")

    @classmethod
    def parse(cls, words: str) -> "Shard":
        """Read "2/8"."""
        match = re.fullmatch(r"(\d+)/(\d+)", words.strip())
        if match is None:
            raise ValueError(f"--shard must be like 2/8, the second of eight, got {words!r}")
        return cls(int(match[1]), int(match[2]))

    def holds(self, path: str) -> bool:
        """Whether a video belongs to it."""
        return path_number(path) % self.count == self.number - 1


@dataclass(frozen=True)
class VideoListing:
    """What is to be captioned.

    Args:
        paths: files, and folders that are searched through for known suffixes; hidden things in them are passed over.
        list_path: file with one such path a line; "-" is stdin, which can be read once.
        globs: of a folder's files only those that match one of these; see `matches`.
        shard: of all these only the ones that belong to it.
    """

    paths: Sequence[str] = ()
    list_path: str | None = None
    globs: Sequence[str] = ()
    shard: Shard = Shard()

    @property
    def is_read_once(self) -> bool:
        """Whether its list comes through a pipe, and so but once."""
        return self.list_path == STDIN or (self.list_path is not None and not Path(self.list_path).is_file())

    def require_some(self) -> None:
        """See that there is anything at all; what a list holds shows only as it is read.

        Raises:
            ValueError: nothing is named, or nothing of it is there.
        """
        if self.list_path is None and not self.paths:
            raise ValueError("no paths are given: name videos or folders, or a file that lists them (--list)")
        if self.list_path is not None:
            if self.list_path != STDIN and (not Path(self.list_path).exists() or Path(self.list_path).is_dir()):
                raise ValueError(f"{self.list_path}: there is no such file; --list takes one with a path a line")
            return
        there = [path for path in self.paths if os.path.exists(path)]  # noqa: PTH110 - as in `walk_paths`
        if not there:
            raise ClipError(f"{self.paths[0]}: there is no such file or folder; check the path")
        if next(walk_paths(there, self.globs, log=_keep_quiet), None) is None:
            known = " ".join(sorted(MEDIA_SUFFIXES))
            matching = f" that matches {' or '.join(self.globs)}" if self.globs else ""
            raise ClipError(
                f"{there[0]}: the folder holds no video or sound file{matching}; known suffixes are {known}"
            )

    def videos(self, *, quiet: bool = False) -> Iterator[VideoFile | Failure]:
        """All of them in order, folders sorted by name; a folder that cannot be listed is a `Failure`.

        Args:
            quiet: warn of nothing, where they are listed a second time.
        """
        for found in walk_paths(self._named(), self.globs, log=_keep_quiet if quiet else logger.warning):
            if isinstance(found, Failure):
                if self.shard.holds(found.video):
                    yield found
            elif self.shard.holds(found):
                yield stat_video(found)

    def _named(self) -> Iterator[str]:
        yield from self.paths
        if self.list_path == STDIN:
            yield from _read_list(sys.stdin.buffer)
        elif self.list_path is not None:
            with Path(self.list_path).open("rb") as file:
                yield from _read_list(file)


def stat_video(path: str) -> VideoFile | Failure:
    """A file's size and time, if it is one; reading it will tell what is wrong with it otherwise."""
    try:
        path.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path).decode(errors="backslashreplace")
        return Failure(name, f"{name}: the name is not in UTF-8, so that no record can hold it; rename the file")
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # the latter for what cannot be a name
        return VideoFile(path)
    return VideoFile(path, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else VideoFile(path)


def path_number(path: str) -> int:
    """A number that follows from a path alone, the same in each process and on each machine.

    Of a cryptographic hash: a CRC of names that are counted up can be even for all of them.
    """
    return int.from_bytes(blake2b(os.fsencode(path), digest_size=4).digest())


def walk_paths(
    paths: Iterable[str], globs: Sequence[str], *, log: LogFunction = logger.warning
) -> Iterator[str | Failure]:
    """Files as they are named, and those in folders, sorted by name.

    Args:
        paths: of files and folders.
        globs: see `VideoListing`.
        tell: of what is passed over.
    """
    patterns = [tuple(glob.split("/")) if "/" in glob else ("**", glob) for glob in globs]
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112 - says no of a name that is too long, where a Path raises
            yield from _walk_folder(Path(path), (), patterns, log)
        else:
            yield str(Path(path))


def _walk_folder(
    folder: Path, inside: tuple[str, ...], patterns: Sequence[tuple[str, ...]], log: LogFunction
) -> Iterator[str | Failure]:
    try:
        with os.scandir(folder) as entries:
            kinds = ((entry.name, _kind(entry)) for entry in entries if not entry.name.startswith("."))
            found = sorted((name, kind) for name, kind in kinds if kind != "other")
    except OSError as error:
        yield Failure(str(folder), f"{folder}: cannot be listed ({error.strerror}); check the folder's rights and disk")
        return
    for name, kind in found:
        path, parts = folder / name, (*inside, name)
        if kind == "folder":
            yield from _walk_folder(path, parts, patterns, log)
        elif kind == "link":
            log("%s: a link to a folder, which is not followed; name it to have its videos captioned", path)
        elif not patterns or any(matches(parts, pattern) for pattern in patterns):
            yield str(path)


def _kind(entry: "os.DirEntry[str]") -> Kind:
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    if entry.is_symlink() and os.path.isdir(entry):  # noqa: PTH112 - says no of a link to itself
        return "link"
    return "media" if is_media(entry.name) else "other"


def is_media(name: str) -> bool:
    """Whether a file's name has a suffix of video or sound."""
    return os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES  # noqa: PTH122 - of millions, without a Path for each


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path inside a folder matches a glob, both split at their slashes; `**` stands for any folders, or none.

    A glob without a slash is meant for the name alone, in whatever folder: `*.mp4` is given here as `**/*.mp4`.
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _read_list(file: BinaryIO) -> Iterator[str]:
    """A list's lines but for empty ones; some tools begin it with a mark of its byte order."""
    for number, line in enumerate(file):
        path = os.fsdecode(line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).rstrip("\r\n")
        if path:
            yield path


def _keep_quiet(words: str, *values: object) -> None:
    """Log nothing."""
