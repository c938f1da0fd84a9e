"""Videos inside other files: members of tar archives (webdataset shards) and rows of Parquet files.

    shards/clips-000000.tar::harbour.mp4      a member of a tar archive
    data/train-00000-of-00004.parquet::17     row 17, from 0, of a Parquet file with the bytes of videos

Both may be local or remote. From a remote one, only what is needed is transferred: of a tar archive, its headers and
the members that are captioned; of a Parquet file, the row groups that contain them.
"""

import os
import posixpath
import re
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from salmonn.batch.remote import (
    LOCAL_PREFIX,
    SCHEMES,
    RemoteError,
    attempt,
    is_url,
    name_of,
    scheme_of,
    store_of,
    without_secrets,
)

MEMBER_SEPARATOR = "::"
CONTAINER_SUFFIXES = (".tar", ".parquet")
VIDEO_COLUMN = "video"
MAX_GROUP_BYTES = 4 << 30  # of the videos in a row group, which is held in memory
_HEADER_BYTES = 1 << 16  # of a remote archive that are transferred at a time
_MEMBER = re.compile(r"(.+?\.(?:tar|parquet)(?:[?#].*?)?)::(.+)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A file inside an archive: its offset and size in bytes."""

    name: str
    offset: int
    size_bytes: int


def is_container(path: str) -> bool:
    """Return whether a path is that of a tar archive or a Parquet file."""
    return _name(path).endswith(CONTAINER_SUFFIXES) and split_member(path) is None


def is_tar(path: str) -> bool:
    """Return whether a path is that of a tar archive."""
    return _name(path).endswith(".tar")


def _name(path: str) -> str:
    return name_of(path) if is_url(path) else path


def split_member(path: str) -> tuple[str, str] | None:
    """Split the path of a member into the path of its container and its name in it; None for any other path."""
    match = _MEMBER.fullmatch(path)
    return None if match is None else (match[1], match[2])


def recorded_path(path: str) -> str:
    """Return a path as it is recorded: URLs, also of containers, without passwords and signatures."""
    container, member = split_member(path) or (path, "")
    return f"{without_secrets(container)}{MEMBER_SEPARATOR if member else ''}{member}"


def source_path(path: str) -> Path | None:
    """Return a path with the name and folder of a video that is remote or in a container; None for a local file.

    It is `/host/a/b c.mp4` for https://host/a/b%20c.mp4?key=1, and `shards/x/b.mp4` for shards/00.tar::x/b.mp4.
    """
    container, member = split_member(path) or (path, "")
    if is_url(container):
        place = container.partition("://")[2]
        if scheme_of(container) in ("http", "https"):
            host, _, place = re.split(r"[?#]", place)[0].partition("/")
            place = unquote(f"{host.rpartition('@')[2]}/{place}")  # without user and password
        container = f"/{place}"
    elif not member:
        return None
    return Path(container).parent / member if member else Path(container)


def holds_videos(path: str, *, column: str) -> bool:
    """Return whether a path names a container of videos, or a video in one, and not a list of local files.

    Args:
        path: local path as the user named it.
        column: column of the videos in Parquet files, which may also have paths.

    Raises:
        RemoteError: a Parquet file cannot be read.
    """
    if split_member(path) is not None:
        return True
    if not is_container(path) or Path(path).is_dir():
        return False
    if is_tar(path) or not Path(path).is_file():  # the latter with braces
        return is_tar(path)
    first = next(parquet_rows(path, column), "")
    return isinstance(first, int) or is_url(first)


def open_container(path: str, *, block_bytes: int = 4 << 20) -> BinaryIO:
    """Open a local or remote container; raises RemoteError or OSError."""
    if not is_url(path):
        return Path(path).open("rb")
    store, name = store_of(path)
    file = attempt(path, lambda: store.open(name, "rb", block_size=block_bytes))
    try:
        file.seek(0, os.SEEK_END)
        file.seek(0)
    except ValueError as error:  # a stream; fsspec says of it that it is seekable
        file.close()
        raise RemoteError(
            f"{path}: the server does not send parts of files (range requests); download the file and name it there"
        ) from error
    return cast(BinaryIO, file)


@lru_cache(maxsize=16)
def tar_members(path: str, version: tuple[Any, ...]) -> tuple[dict[str, Member], str]:
    """List the files in a tar archive in their order.

    Args:
        path: path or URL of the archive.
        version: state of the archive; a changed one is read again.

    Returns:
        The members by name, hidden ones left out, and the reason if the archive cannot be read to its end, else "".
    """
    members: dict[str, Member] = {}
    try:
        with open_container(path, block_bytes=_HEADER_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = file.seek(0, os.SEEK_END)
            for one in archive:
                if one.isreg() and not posixpath.basename(one.name).startswith("."):
                    if one.offset_data + one.size > size:
                        return members, f"{path}: the archive is truncated in {one.name}; download or write it again"
                    members.setdefault(one.name, Member(one.name, one.offset_data, one.size))
    except RemoteError as error:
        return members, str(error)
    except (tarfile.TarError, OSError, EOFError) as error:
        return members, f"{path}: the archive cannot be read ({error}); an archive must be an uncompressed .tar"
    return members, ""


def find_member(path: str, name: str, version: tuple[Any, ...]) -> Member:
    """Find a member of a tar archive; raises RemoteError."""
    members, reason = tar_members(path, version)
    if name not in members:
        raise RemoteError(reason or f"{path}: the archive has no member {name}")
    return members[name]


def parquet_rows(path: str, column: str) -> Iterator[str | int]:
    """Yield the videos of a Parquet file: paths and URLs as they are in it, or row numbers if it has their bytes.

    Rows without a video are skipped.

    Raises:
        RemoteError: the file is not available, is not a Parquet file, or has no such column.
    """
    import pyarrow  # noqa: PLC0415 - an extra

    with open_container(path) as file:
        table = _parquet_file(path, file)
        if column not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names[:20])
            raise RemoteError(f"{path} has no column {column!r}, but {names}; name the one of the videos with --column")
        kind = table.schema_arrow.field(column).type
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            for batch in table.iter_batches(columns=[column]):
                yield from (_resolve(path, value) for value in batch.column(0).to_pylist() if value)
        elif _holds_bytes(kind):
            yield from range(table.metadata.num_rows)
        else:
            raise RemoteError(
                f"{path}: column {column!r} has type {kind}; it must have paths or URLs, bytes, or a struct with bytes "
                "and path"
            )


class ParquetRows:
    """Reads videos from the rows of Parquet files; keeps the last row group in memory.

    Args:
        column: column of the videos.
    """

    def __init__(self, column: str = VIDEO_COLUMN) -> None:
        self._column = column
        self._lock = threading.Lock()
        self._key: tuple[Any, ...] = ()
        self._first = 0
        self._group: Any = None

    def read(self, path: str, row: int, version: tuple[Any, ...]) -> bytes | str:
        """Return the bytes of the video of a row, or its path or URL.

        Raises:
            RemoteError: the row has none, or the file cannot be read.
        """
        with self._lock:
            if self._key[:2] != (path, version) or not 0 <= row - self._first < len(self._group):
                self._load(path, row, version)
            value = self._group[row - self._first].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or (_resolve(path, value["path"]) if value.get("path") else None)
        if not value:
            raise RemoteError(f"{path}: row {row} has no video")
        return cast(bytes | str, value)

    def _load(self, path: str, row: int, version: tuple[Any, ...]) -> None:
        self._key, self._group = (), None  # before the next one: two may not fit into memory
        with open_container(path) as file:
            table = _parquet_file(path, file)
            index = [name.split(".")[0] for name in (table.schema.column(i).path for i in range(len(table.schema)))]
            first = 0
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                if first <= row < first + group.num_rows:
                    columns = (group.column(i) for i, name in enumerate(index) if name == self._column)
                    if (size := sum(one.total_uncompressed_size for one in columns)) > MAX_GROUP_BYTES:
                        raise RemoteError(
                            f"{path}: the videos of row group {number} have {size / (1 << 30):.1f} GiB, and the "
                            f"maximum is {MAX_GROUP_BYTES >> 30}; write it with smaller row groups"
                        )
                    self._group = table.read_row_group(number, columns=[self._column]).column(0)
                    self._first, self._key = first, (path, version)
                    return
                first += group.num_rows
        raise RemoteError(f"{path}: there is no row {row}; the file has {first}")


def _parquet_file(path: str, file: BinaryIO) -> Any:
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise RemoteError(f"{path}: Parquet needs pyarrow: pip install 'salmonn[parquet]'") from error
    try:
        return parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise RemoteError(f"{path} cannot be read as Parquet ({error}); write it again") from error


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types  # noqa: PLC0415 - an extra

    if types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _resolve(container: str, value: str) -> str:
    """Return the path or URL of a video that a Parquet file names; relative ones start from the file's folder.

    A remote file may come from an untrusted source, so it may name only remote files.

    Raises:
        RemoteError: it names another file.
    """
    if is_url(value) and (not is_url(container) or scheme_of(value) in SCHEMES):
        return value
    folder = posixpath.dirname(container)
    if not is_url(container):
        return os.path.normpath(os.path.join(folder, value.removeprefix(LOCAL_PREFIX)))  # noqa: PTH118 - as `path` is
    if is_url(value) or value.startswith(("/", LOCAL_PREFIX)) or ".." in value.split("/"):
        raise RemoteError(f"{container} names {value}, which is not on its store; correct the file")
    return f"{folder}/{value}"
