"""Find the videos to caption: files and folders, named directly or in a list, up to tens of millions of them.

They may be on this machine or remote (`remote`), and inside tar archives and Parquet files (`containers`).

    for video in VideoListing(paths=["clips/"], globs=["*.mp4"]).videos(): ...

Only the names of the videos in the folder being walked are held in memory; other files are counted by their suffix.
"""

import codecs
import logging
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b
from io import BufferedIOBase
from pathlib import Path
from typing import Literal, cast

from salmonn.batch.containers import (
    MEMBER_SEPARATOR,
    VIDEO_COLUMN,
    find_member,
    is_container,
    is_tar,
    parquet_rows,
    recorded_path,
    split_member,
    tar_members,
)
from salmonn.batch.remote import (
    LOCAL_PREFIX,
    RemoteError,
    RemoteFile,
    expand_ahead,
    expand_braces,
    is_url,
    list_folder,
    look_up,
    name_of,
    redact,
)
from salmonn.media.clip import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from salmonn.media.container import ClipError
from salmonn.records import Failure

logger = logging.getLogger(__name__)

EntryKind = Literal["folder", "link", "media", "other"]
STDIN = "-"
MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES
_MAX_SUFFIXES = 1000  # counted separately
_MAX_SUFFIX_CHARS = 10  # what follows the last dot of a longer one is part of the name
_SHOWN_SUFFIXES = 8
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class VideoFile:
    """A file to caption, as it was when it was listed.

    Args:
        path: path as the user named it, or URL without password and signature; for a member of a container see
            `containers`.
        size_bytes, modified_ns, etag: as in `Caption`; None if there is no such file. A member of a container has its
            own size, and time and ETag of the container.
        address: the path with password and signature, which is never recorded; "" where there are none.
    """

    path: str
    size_bytes: int | None = None
    modified_ns: int | None = None
    etag: str | None = None
    address: str = field(default="", repr=False, compare=False)


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count` parts of the videos, counted from 1; a hash of its path assigns a video to a shard."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"there is no shard {self.number} of {self.count}; shards are numbered from 1")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parse a shard such as "2/8"."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None:
            raise ValueError(f"--shard must look like 2/8, the second of eight shards, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def holds(self, path: str) -> bool:
        """Return whether a video belongs to this shard."""
        return path_number(path) % self.count == self.number - 1


class SkippedFiles:
    """Counts files in folders that are skipped because their suffix is neither of video nor of audio."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._num_others = 0

    @property
    def total(self) -> int:
        """Number of files."""
        return self._counts.total() + self._num_others

    def add(self, path: str) -> None:
        """Count a file."""
        suffix = _suffix(path)
        is_known = suffix in self._counts or (
            len(suffix) <= _MAX_SUFFIX_CHARS and suffix.isprintable() and len(self._counts) < _MAX_SUFFIXES
        )
        if is_known:
            self._counts[suffix] += 1
        else:
            self._num_others += 1

    def __str__(self) -> str:
        """The counts, such as "12 .jpg, 3 .txt, 1 without suffix"; rare suffixes are summed up."""
        most = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_SUFFIXES]
        parts = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in most]
        if num_others := self.total - sum(count for _, count in most):
            parts.append(f"{num_others:,} with other suffixes")
        return ", ".join(parts)


@dataclass(frozen=True)
class VideoListing:
    """The videos to caption.

    Args:
        paths: files, and folders that are searched for known suffixes; hidden files and folders are skipped. They may
            be URLs, with `*` for several files, and have braces such as {000..099}.
        list_path: file of such paths, separated by newlines or NUL bytes; "-" is stdin, which can be read only once.
        globs: patterns; a file in a folder has to match one of them, see `matches`.
        shard: part of these videos to list.
        column: column of the videos in Parquet files.

    Attributes:
        skipped: files in folders that `videos` has skipped because of their suffix, of this shard and matching a glob.
    """

    paths: Sequence[str] = ()
    list_path: str | None = None
    globs: Sequence[str] = ()
    shard: Shard = Shard()
    column: str = VIDEO_COLUMN
    skipped: SkippedFiles = field(default_factory=SkippedFiles, init=False, compare=False)

    @property
    def is_read_once(self) -> bool:
        """Whether the videos cannot be listed a second time, or only with many requests, as remote ones."""
        if any(is_url(path) for path in self.paths):
            return True
        if self.list_path is None or self.list_path == STDIN or not Path(self.list_path).is_file():
            return self.list_path is not None
        with Path(self.list_path).open("rb") as file:
            return is_url(next(_read_list(file), ""))

    def require_any(self) -> None:
        """Check that there is at least one video; the contents of a list are checked only as it is read.

        Raises:
            ValueError: nothing is named, or nothing that is named exists.
        """
        if self.list_path is None and not self.paths:
            raise ValueError("no paths given; name videos or folders, or a file that lists them (--list)")
        if self.list_path is not None:
            if self.list_path != STDIN and (not Path(self.list_path).exists() or Path(self.list_path).is_dir()):
                raise ValueError(f"{self.list_path}: there is no such file; --list takes a file with one path per line")
            return
        named = [one for path in self.paths for one in _expand_local(path)]
        existing = [path for path in named if is_url(path) or os.path.exists(path)]  # noqa: PTH110 - as in `walk_paths`
        if not existing:
            raise ClipError(f"{self.paths[0]}: there is no such file or folder; check the path")
        others = SkippedFiles()
        first = next(walk_paths(existing, self.globs, quiet=True, on_skip=others.add, column=self.column), None)
        if isinstance(first, Failure) and (is_url(first.video) or is_container(first.video)):
            raise ClipError(first.reason)
        if first is None:
            matching = f" matching {' or '.join(self.globs)}" if self.globs else ""
            found = f", only {others}; name a file itself to caption it whatever its suffix" if others.total else ""
            raise ClipError(f"{existing[0]}: no video or audio file{matching} in this folder{found}")

    def videos(self, *, quiet: bool = False) -> Iterator[VideoFile | Failure]:
        """List this shard's videos in order, folders sorted by name; a folder that cannot be listed is a `Failure`.

        Args:
            quiet: log no warnings and count nothing, for listing a second time.
        """

        def skip(path: str) -> None:
            if not quiet and self.shard.holds(path):
                self.skipped.add(path)

        for found in walk_paths(self._named(), self.globs, quiet=quiet, on_skip=skip, column=self.column):
            if isinstance(found, Failure | VideoFile):
                if self.shard.holds(found.video if isinstance(found, Failure) else found.path):
                    yield found
            elif self.shard.holds(found):
                yield stat_video(found)

    def addresses(self) -> dict[str, str]:
        """Return the named URLs with a password or a signature, by their recorded paths; nothing is looked up.

        For a URL with a password, that of its host is included, too, for the files in folders.
        """
        if self.list_path is not None:
            self.require_any()
        found: dict[str, str] = {}
        for path in (one for named in self._named() for one in _expand_local(named)):
            if (recorded := recorded_path(path)) != path:
                found[recorded] = path
                if "@" in _origin(path):
                    found[_origin(recorded)] = _origin(path)
        return found

    def _named(self) -> Iterator[str]:
        yield from self.paths
        if self.list_path == STDIN:
            yield from _read_list(cast(BufferedIOBase, sys.stdin.buffer))
        elif self.list_path is not None:
            with Path(self.list_path).open("rb") as file:
                yield from _read_list(file)


def stat_video(path: str) -> VideoFile | Failure:
    """Look up the version of a file; whether it can be decoded is found out when it is read."""
    if is_url(path) or split_member(path):
        try:
            return _stat_elsewhere(path)
        except RemoteError as error:
            return _failure(path, error)
    try:
        path.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path).decode(errors="backslashreplace")
        return Failure(name, f"{name}: the file name is not valid UTF-8 and cannot be stored in JSON; rename the file")
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # the latter for what cannot be a file name
        return VideoFile(path)
    return VideoFile(path, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else VideoFile(path)


def address_of(path: str, addresses: Mapping[str, str]) -> str:
    """Return the address of a recorded path, with the password or signature that was named; see `addresses`."""
    container, _ = split_member(path) or (path, "")
    if container in addresses:
        return addresses[container] + path[len(container) :]
    if is_url(path) and (origin := _origin(path)) in addresses:
        return addresses[origin] + path[len(origin) :]
    return path


def _origin(url: str) -> str:
    return "/".join(url.split("/")[:3])


def path_number(path: str) -> int:
    """Hash a path to a number that is the same in each process and on each machine.

    The hash is cryptographic: a CRC of numbered names can be even for all of them.
    """
    return int.from_bytes(blake2b(os.fsencode(path), digest_size=4).digest())


def walk_paths(
    paths: Iterable[str],
    globs: Sequence[str],
    *,
    quiet: bool = False,
    on_skip: Callable[[str], object] = lambda path: None,
    column: str = VIDEO_COLUMN,
) -> Iterator[str | VideoFile | Failure]:
    """Yield files as they are named, the files in folders sorted by name, and those in containers.

    Args:
        paths: files and folders.
        globs: see `VideoListing`.
        quiet: log no warning about links to folders.
        on_skip: called with each file in a folder that matches a glob but has no suffix of video or audio.
        column: column of the videos in Parquet files.
    """
    patterns = [tuple(glob.split("/")) if "/" in glob else ("**", glob) for glob in globs]
    for path, remote in expand_ahead(one for named in paths for one in _expand_local(named)):
        if isinstance(remote, Failure):
            yield remote
        elif remote is not None:
            for one in remote:
                if one.is_folder:
                    yield from _walk_remote(one.url, (), patterns, on_skip)
                elif is_container(one.url):
                    yield from _walk_container(one.url, (one.modified_ns, one.etag), column, on_skip)
                else:
                    yield _to_video(one)
        elif os.path.isdir(path):  # noqa: PTH112 - False for a name that is too long, where a Path raises
            yield from _walk_folder(Path(path), (), patterns, quiet, on_skip)
        elif is_container(path) and Path(path).is_file():
            yield from _walk_container(str(Path(path)), (Path(path).stat().st_mtime_ns, None), column, on_skip)
        else:
            yield str(Path(path))


def _expand_local(path: str) -> Iterator[str]:
    """Expand braces, unless there is a file of that name; `file://` names a local path."""
    path = path.removeprefix(LOCAL_PREFIX)
    if "{" in path and (is_url(path) or not os.path.exists(path)):  # noqa: PTH110 - as in `walk_paths`
        return expand_braces(path)
    return iter([path])


def _to_video(found: RemoteFile) -> VideoFile:
    return _video(found.url, found.size_bytes, found.modified_ns, found.etag)


def _video(address: str, size_bytes: int | None, modified_ns: int | None, etag: str | None) -> VideoFile:
    path = recorded_path(address)
    return VideoFile(path, size_bytes, modified_ns, etag, "" if path == address else address)


def _failure(address: str, error: RemoteError | str) -> Failure:
    container, _ = split_member(address) or (address, "")
    return Failure(recorded_path(address), redact(str(error), container))


def _stat_elsewhere(path: str) -> VideoFile:
    """Look up a remote file or a member of a container; raises RemoteError."""
    if (split := split_member(path)) is None:
        return _to_video(look_up(path))
    container, name = split
    found = stat_video(container)
    if isinstance(found, Failure):
        raise RemoteError(found.reason)
    version = (found.modified_ns, found.etag)
    size = find_member(container, name, version).size_bytes if is_tar(container) else None
    return _video(path, size, *version)


def _walk_remote(
    url: str, inside: tuple[str, ...], patterns: Sequence[tuple[str, ...]], on_skip: Callable[[str], object]
) -> Iterator[VideoFile | Failure]:
    """Yield the videos in a remote folder; files are recognized by their names alone."""
    try:
        entries = list_folder(url)
    except RemoteError as error:
        yield _failure(url, error)
        return
    for one in entries:
        parts = (*inside, name_of(one.url))
        if parts[-1].startswith("."):
            continue
        if one.is_folder:
            yield from _walk_remote(one.url, parts, patterns, on_skip)
        elif not patterns or any(matches(parts, pattern) for pattern in patterns):
            if is_media(parts[-1]):
                yield _to_video(one)
            else:
                on_skip(one.url)


def _walk_container(
    path: str, version: tuple[int | None, str | None], column: str, on_skip: Callable[[str], object]
) -> Iterator[str | VideoFile | Failure]:
    """Yield the videos in a tar archive or a Parquet file, and a failure if it cannot be read to its end."""
    if is_tar(path):
        members, reason = tar_members(path, version)
        for one in members.values():
            if is_media(one.name):
                yield _video(f"{path}{MEMBER_SEPARATOR}{one.name}", one.size_bytes, *version)
            else:
                on_skip(one.name)
        if reason:
            yield _failure(path, reason)
        return
    try:
        rows = (f"{path}{MEMBER_SEPARATOR}{row}" if isinstance(row, int) else row for row in parquet_rows(path, column))
        for name, remote in expand_ahead(rows):
            if remote is None:
                yield name if split_member(name) is None else _video(name, None, *version)
            elif isinstance(remote, Failure):
                yield remote
            else:
                yield from map(_to_video, remote)
    except RemoteError as error:
        yield _failure(path, error)


def _walk_folder(
    folder: Path,
    inside: tuple[str, ...],
    patterns: Sequence[tuple[str, ...]],
    quiet: bool,
    on_skip: Callable[[str], object],
) -> Iterator[str | Failure]:
    found: list[tuple[str, EntryKind]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                kind, parts = _kind_of(entry), (*inside, entry.name)
                if kind in ("media", "other") and patterns and not any(matches(parts, one) for one in patterns):
                    continue
                if kind == "other":
                    on_skip(entry.path)
                else:
                    found.append((entry.name, kind))
    except OSError as error:
        reason = f"{folder}: this folder cannot be listed ({error.strerror}); check its permissions and the disk"
        yield Failure(str(folder), reason)
        return
    for name, kind in sorted(found):
        path = folder / name
        if kind == "folder":
            yield from _walk_folder(path, (*inside, name), patterns, quiet, on_skip)
        elif kind == "link" and not quiet:
            logger.warning("%s: links to folders are not followed; name the link to caption its videos", path)
        elif kind == "media":
            yield str(path)


def _kind_of(entry: "os.DirEntry[str]") -> EntryKind:
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    if entry.is_symlink() and os.path.isdir(entry):  # noqa: PTH112 - False for a link to itself
        return "link"
    return "media" if is_media(entry.name) else "other"


def is_media(name: str) -> bool:
    """Return whether a file name has a suffix of video or audio."""
    return _suffix(name) in MEDIA_SUFFIXES


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 - millions of names, no Path for each


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path inside a folder matches a glob, both split at their slashes.

    `**` stands for any number of folders. A glob without a slash applies to the file name in any folder: `*.mp4` is
    passed to this function as `**/*.mp4`.
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _read_list(file: BufferedIOBase) -> Iterator[str]:
    """Yield the non-empty lines of a list; some tools put a byte order mark at its start.

    A list with a NUL byte, as `find -print0` writes it, is separated by those instead: names may contain line breaks.
    """
    separator, rest = b"", b""
    while chunk := file.read1(_READ_BYTES):
        if not separator:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
            separator = b"\0" if b"\0" in chunk else b"\n"
        *lines, rest = (rest + chunk).split(separator)
        yield from _to_paths(lines, separator)
    yield from _to_paths([rest], separator)


def _to_paths(lines: Sequence[bytes], separator: bytes) -> Iterator[str]:
    paths = (line if separator == b"\0" else line.rstrip(b"\r") for line in lines)
    return (os.fsdecode(path) for path in paths if path)
