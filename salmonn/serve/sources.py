"""Turn the URL of a request into a local file: data in the request itself, a web address, or an allowed local path.

Uploaded and fetched files are kept in a private folder and removed after use.
"""

import asyncio
import base64
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from salmonn import system
from salmonn.serve.fetch import FetchPolicy, SourceError, TooLargeError, fetch

_PREFIX, _NEW_PREFIX = "salmonn-uploads-", "salmonn-new-"
_CHUNK_CHARS = 1 << 20  # characters of base64 to decode at a time
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_DATA_URL = re.compile(r"data:.{0,200}?;base64,", re.IGNORECASE)  # quoted parameters may contain commas
# Line breaks are dropped. A space is an error: it may be a plus sign that was taken for one of a form.
_BASE64_SPELLING = {ord("-"): "+", ord("_"): "/", **dict.fromkeys(map(ord, "\r\n\t"))}


@dataclass(frozen=True)
class MediaSources:
    """Allow-list of the places that files may come from.

    Args:
        allowed_dirs: folders of this machine whose files may be read.
        fetch_policy: rules for fetching over the network; its `max_bytes` applies to uploads too.
    """

    allowed_dirs: tuple[Path, ...] = ()
    fetch_policy: FetchPolicy = field(default_factory=FetchPolicy)

    def __post_init__(self) -> None:
        for folder in self.allowed_dirs:
            if not folder.is_dir():
                raise ValueError(f"--allowed-dirs {folder} is not a folder")


@dataclass(frozen=True)
class ResolvedMedia:
    """The local file of a request: its path, its source, and its size if it came over the network."""

    path: Path
    source: str
    num_bytes: int = 0


async def resolve_media(url: str, folder: Path, *, sources: MediaSources) -> ResolvedMedia:
    """Return the file that a URL refers to, after writing it to the folder if it is not a local file.

    Args:
        url: data:, http:, https: or file: URL, or a path.
        folder: folder for the file.
        sources: allow-list.

    Raises:
        SourceError: the file is not allowed, or cannot be read or fetched.
        TooLargeError: the file is larger than the maximum.
    """
    scheme = match[1].lower() if (match := _SCHEME.match(url)) else ""
    path = folder / "file"  # without a suffix: the decoder detects the format
    if scheme == "data":
        size = await asyncio.to_thread(write_data, url, path, max_bytes=sources.fetch_policy.max_bytes)
        return ResolvedMedia(path, "upload", size)
    if scheme in ("http", "https"):
        return ResolvedMedia(path, "fetched", await fetch(url, path, policy=sources.fetch_policy))
    if scheme in ("file", ""):
        return ResolvedMedia(await asyncio.to_thread(find_local, url, sources.allowed_dirs), "local")
    raise SourceError(f"{scheme[:20]}: unsupported URL scheme; use data:, https:, http: or file:")


class Base64File:
    """A new file whose content arrives as parts of a data: URL, or of base64 without one.

    The base64 may have line breaks, the alphabet for URLs, percent-encoded characters, and no padding. After an error,
    the file is gone.

    Args:
        path: path of the file.
        max_bytes: maximum size of the file.

    Attributes:
        num_bytes: size of the file so far.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self.path = path
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._rest = ""  # characters that are not a complete group of four yet
        self._file = path.open("wb")

    def write(self, text: str, *, is_last: bool = False) -> None:
        """Decode the next part, and close the file after the last one.

        Raises:
            SourceError: the text is not valid base64.
            TooLargeError: the file is larger than the maximum.
        """
        text = self._rest + text
        # A percent-encoded character at the end may be incomplete.
        cut = text.rfind("%", max(len(text) - 2, 0))
        end = len(text) if is_last or cut < 0 else cut
        plain = (unquote(text[:end]) if "%" in text else text[:end]).translate(_BASE64_SPELLING)
        whole = len(plain) // 4 * 4
        if is_last:
            plain += "=" * (-len(plain) % 4)
            whole = len(plain)
        self._rest = plain[whole:] + text[end:]
        try:
            self.num_bytes += self._file.write(base64.b64decode(plain[:whole], validate=True))
        except ValueError as error:  # binascii.Error is one
            self.remove()
            raise SourceError(f"the file's data is not valid base64: {error}") from error
        if self.num_bytes > self._max_bytes:
            self.remove()
            raise TooLargeError(f"the file is larger than the maximum of {self._max_bytes / (1 << 20):g} MiB")
        if is_last:
            self._file.close()

    def remove(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def split_data_url(text: str) -> str:
    """Return the base64 of a data: URL, or of its beginning; raises a SourceError if it has another form."""
    match = _DATA_URL.match(text)
    if match is None:
        raise SourceError("a data: URL must have the form data:video/mp4;base64,... with the file in base64")
    return text[match.end() :]


def write_data(url: str, path: Path, *, max_bytes: int) -> int:
    """Write the contents of a data: URL to a file and return their size in bytes; raises what `resolve_media` does."""
    text = split_data_url(url)
    file = Base64File(path, max_bytes=max_bytes)
    for first in range(0, len(text), _CHUNK_CHARS):
        file.write(text[first : first + _CHUNK_CHARS])
    file.write("", is_last=True)
    return file.num_bytes


def find_local(url: str, allowed_dirs: tuple[Path, ...]) -> Path:
    """Return the file that a file: URL or a path refers to, if it is below an allowed folder after following links.

    Raises:
        SourceError: there is no such file there; the message does not reveal whether it exists elsewhere.
    """
    if not allowed_dirs:
        raise SourceError(
            "this server reads no local files: send the file as a data: URL, or start the server with --allowed-dirs"
        )
    name = url
    if url[:5].lower() == "file:":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise SourceError("a file: URL must refer to this server, as in file:///folder/video.mp4")
        name = unquote(parts.path)
    resolved = [folder.resolve() for folder in allowed_dirs]
    # Relative to an allowed folder, or to the server's working directory.
    for folder in (*resolved, Path()):
        try:
            path = (folder / name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # missing, not a valid path, or a loop of links
            continue
        if path.is_file() and any(path.is_relative_to(allowed) for allowed in resolved):
            return path
    raise SourceError("no such file below the allowed folders of this server")


@contextmanager
def upload_folder(parent: Path | None = None) -> Iterator[Path]:
    """Create a private folder and remove it at the end, and those of servers that were killed.

    Args:
        parent: folder to create it in (default: the system's folder for temporary files).
    """
    parent = parent or Path(tempfile.gettempdir())
    if not system.FOLDERS_CAN_BE_LOCKED:  # then the folder of a server that was killed stays
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    _remove_abandoned(parent)
    new = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=parent))
    # The lock lasts as long as this process, however it ends; systemd-tmpfiles respects it too. The folder gets its
    # final name once it is locked, so that no other server takes it for an abandoned one.
    lock = system.open_folder(new)
    try:
        system.lock(lock)
        folder = new.rename(parent / new.name.replace(_NEW_PREFIX, _PREFIX))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the upload folders of this user's servers that no longer run."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = system.open_folder(folder)
        except OSError:  # another user's, or just removed
            continue
        try:
            if system.try_lock(lock):  # else it is of a running server
                shutil.rmtree(folder, ignore_errors=True)  # does not follow links
        finally:
            os.close(lock)
