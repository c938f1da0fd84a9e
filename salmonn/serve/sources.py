"""What a request names as its file becomes a file on this machine: data in the request, a URL, or a path below a root.

What strangers send lies in a private folder, and is removed after use.
"""

import asyncio
import base64
import binascii
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from salmonn.serve.fetch import FetchPolicy, SourceError, TooLargeError, fetch

_PREFIX, _NEW_PREFIX = "salmonn-uploads-", "salmonn-new-"
_BLOCK = 4 << 20  # letters of base64 that are read at once; a multiple of 4
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class MediaSources:
    """Where files may come from.

    Args:
        roots: folders of this machine that may be read from.
        fetching: what may be fetched; its `max_bytes` also holds for what is sent.
    """

    allowed_dirs: tuple[Path, ...] = ()
    fetch_policy: FetchPolicy = field(default_factory=FetchPolicy)

    def __post_init__(self) -> None:
        for root in self.allowed_dirs:
            if not root.is_dir():
                raise ValueError(f"--allowed-dirs {root} is no folder: name one whose files may be read")


@dataclass(frozen=True)
class ResolvedMedia:
    """A file that a request named: where it lies, whence it came, and its bytes if they came over the network."""

    path: Path
    whence: str
    num_bytes: int = 0


async def resolve_media(url: str, folder: Path, *, sources: MediaSources) -> ResolvedMedia:
    """Have the file that a URL names.

    Args:
        url: data:, http:, https:, file: or a path.
        folder: for what is not on this machine yet.
        sources: where it may come from.

    Raises:
        SourceError: it may not be had, or cannot be.
        TooLargeError: it is larger than is taken.
    """
    scheme = match[1].lower() if (match := _SCHEME.match(url)) else ""
    path = folder / "file"  # without an ending: its content tells what it is
    if scheme == "data":
        size = await asyncio.to_thread(write_data, url, path, max_bytes=sources.fetch_policy.max_bytes)
        return ResolvedMedia(path, "data", size)
    if scheme in ("http", "https"):
        return ResolvedMedia(path, "fetched", await fetch(url, path, fetch_policy=sources.fetch_policy))
    if scheme in ("file", ""):
        return ResolvedMedia(await asyncio.to_thread(find_below, url, sources.allowed_dirs), "root")
    raise SourceError(f"{scheme[:20]}: is no address that a file is taken from: use data:, https:, http: or file:")


def write_data(url: str, path: Path, *, max_bytes: int) -> int:
    """Write what a data: URL holds; returns its size in bytes. Raises as `obtain`."""
    match = _DATA.match(url)
    if match is None:
        raise SourceError("a data: URL must be written data:video/mp4;base64,... and hold the file in base64")
    start = match.end()
    if (len(url) - start) // 4 * 3 > max_bytes + 2:
        raise TooLargeError(f"the file is larger than the {max_bytes / (1 << 20):g} MiB that are taken here")
    size = 0
    with path.open("wb") as file:
        for begin in range(start, len(url), _BLOCK):
            try:
                size += file.write(base64.b64decode(url[begin : begin + _BLOCK], validate=True))
            except (binascii.Error, ValueError) as error:
                raise SourceError(f"the file's data is no base64: {error}") from error
    return size


def find_below(url: str, allowed_dirs: tuple[Path, ...]) -> Path:
    """The file that a file: URL or a path names, if it lies below one of the roots, links followed.

    Raises:
        SourceError: there is no such file there; whether there is one elsewhere is not told.
    """
    if not allowed_dirs:
        raise SourceError(
            "this server reads no local files: send the file as a data: URL, or start the server with --allowed-dirs"
        )
    named = url
    if url[:5].lower() == "file:":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise SourceError("a file: URL names a path of the server: write file:///folder/video.mp4")
        named = unquote(parts.path)
    whole = [root.resolve() for root in allowed_dirs]
    # From a root on, or as whoever started the server would name it.
    for folder in (*whole, Path()):
        try:
            path = (folder / named).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # not there, no name at all, or links that go round
            continue
        if path.is_file() and any(path.is_relative_to(root) for root in whole):
            return path
    raise SourceError("there is no such file below the folders that this server reads from")


@contextmanager
def upload_folder(parent: Path | None = None) -> Iterator[Path]:
    """A private folder that is removed in the end, and with it those of servers that were killed.

    Args:
        parent: where to make it (default: the machine's folder for temporary files).
    """
    parent = parent or Path(tempfile.gettempdir())
    _sweep(parent)
    new = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=parent))
    # Locked as long as this process lives, however it ends; what tidies temporary folders up heeds the lock as well.
    # It has its name from then on, so that no other server takes it for one that was left.
    lock = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = new.rename(parent / new.name.replace(_NEW_PREFIX, _PREFIX))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove the folders of this user's servers that are no more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # of a server that lives
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)  # which follows no link
        finally:
            os.close(lock)
