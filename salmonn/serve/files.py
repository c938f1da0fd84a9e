"""OpenAI's Files API: upload a file once and name it in any number of requests, until it is deleted or expires.

POST /v1/files   GET /v1/files   GET /v1/files/ID   GET /v1/files/ID/content   DELETE /v1/files/ID
"""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from python_multipart.multipart import MultipartParser, parse_options_header

from salmonn.serve.errors import RequestError
from salmonn.serve.fetch import TooLargeError
from salmonn.serve.metrics import Metrics

PURPOSES = ("user_data", "vision", "assistants", "evals")  # those of OpenAI's that are for the input of a model
_MAX_FILES = 10_000
_MAX_FIELD_BYTES = 1000
_MAX_NAME_CHARS = 255
_BLOCK_BYTES = 1 << 20  # of a body, to write at a time
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("file", "purpose", _ANCHOR, _SECONDS)


@dataclass(frozen=True)
class FileLimits:
    """Limits of stored files.

    Args:
        max_file_bytes: maximum size of a file.
        max_bytes: maximum size of all files together.
        seconds: time after which a file is deleted, if its upload does not ask for a shorter one.
    """

    max_file_bytes: int = 512 << 20
    max_bytes: int = 4 << 30
    seconds: float = 24 * 3600.0


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file.

    Args:
        id: its id.
        path: the file.
        owner: who uploaded it; others cannot see it.
        name, purpose: as given in the upload.
        num_bytes: its size.
        created_at, expires_at: times in seconds since 1970.
    """

    id: str
    path: Path
    owner: str
    name: str
    purpose: str
    num_bytes: int
    created_at: float
    expires_at: float

    def to_json(self) -> dict[str, Any]:
        """Return the file as OpenAI's API has it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """The files that clients have uploaded; they last no longer than the server.

    Args:
        folder: private folder for them.
        limits: limits.
        clock: source of the time in seconds since 1970.
    """

    def __init__(self, folder: Path, limits: FileLimits, *, clock: Callable[[], float] = time.time) -> None:
        self.limits = limits
        self._folder = folder
        self._clock = clock
        self._files: dict[str, StoredFile] = {}
        self._stored_bytes = self._receiving_bytes = 0

    def find(self, file_id: str, owner: str) -> StoredFile:
        """Return a file; raises a RequestError with status 404 if there is none of that id."""
        self.remove_expired()
        file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise RequestError(
                f"no file {file_id[:100]!r}; it may have expired: upload it again", status=404, code="file_not_found"
            )
        return file

    def files(self, owner: str) -> list[StoredFile]:
        """Return an owner's files, oldest first."""
        self.remove_expired()
        return [file for file in self._files.values() if file.owner == owner]

    def remove(self, file: StoredFile) -> None:
        """Delete a file; requests that have linked to it keep it."""
        del self._files[file.id]
        self._stored_bytes -= file.num_bytes
        file.path.unlink(missing_ok=True)

    def remove_expired(self) -> None:
        """Delete the files whose time is over."""
        now = self._clock()
        for file in [file for file in self._files.values() if file.expires_at <= now]:
            self.remove(file)

    def link(self, file_id: str, owner: str, folder: Path) -> Path:
        """Give a request its own name for a file, which it keeps when the file expires; raises what `find` does."""
        path = folder / "file"
        os.link(self.find(file_id, owner).path, path)
        return path

    async def receive(self, content_type: str, parts: AsyncIterator[bytes], *, owner: str) -> StoredFile:
        """Store the file of a multipart form while it arrives.

        Raises:
            RequestError: the form is malformed, or there is no space left.
            TooLargeError: the file is too large.
            OSError: the disk is full.
        """
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not content_type.lower().startswith("multipart/form-data") or not boundary:
            raise RequestError("the Content-Type must be multipart/form-data", status=415)
        self._folder.mkdir(exist_ok=True)
        file_id = f"file-{uuid.uuid4().hex}"
        form = _Form(self._folder / file_id, boundary, max_bytes=self.limits.max_file_bytes)
        num_received, block = 0, bytearray()
        try:
            async for part in parts:
                self._reserve(len(part))
                num_received += len(part)
                block += part
                if len(block) >= _BLOCK_BYTES:
                    await asyncio.to_thread(form.feed, bytes(block))
                    block.clear()
            form.feed(bytes(block), is_last=True)
            file = self._to_file(file_id, form, owner)
        except BaseException:
            form.path.unlink(missing_ok=True)
            raise
        finally:
            self._receiving_bytes -= num_received
            form.file.close()  # which fails on a full disk
        self._files[file_id] = file
        self._stored_bytes += file.num_bytes
        return file

    def _reserve(self, num_bytes: int) -> None:
        """Count bytes of a file that arrive."""
        self.remove_expired()
        if (
            self._stored_bytes + self._receiving_bytes + num_bytes > self.limits.max_bytes
            or len(self._files) >= _MAX_FILES
        ):
            raise RequestError(
                "the space for files is full; delete some, or wait until some expire", status=507, code="storage_full"
            )
        self._receiving_bytes += num_bytes

    def _to_file(self, file_id: str, form: "_Form", owner: str) -> StoredFile:
        fields = {name: value.decode(errors="replace") for name, value in form.fields.items()}
        if form.name is None:
            raise RequestError("file: the form has no such part, with the file", param="file")
        if not form.num_bytes:
            raise RequestError("file: it is empty", param="file")
        if fields.get("purpose") not in PURPOSES:
            raise RequestError(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
        seconds = fields.get(_SECONDS, "")
        if (
            fields.get(_ANCHOR, "created_at") != "created_at"
            or not (seconds or "1").isdecimal()
            or not int(seconds or 1)
        ):
            raise RequestError("expires_after needs the anchor created_at, and seconds", param="expires_after")
        now = self._clock()
        expires_at = now + min(self.limits.seconds, float(seconds or self.limits.seconds))
        return StoredFile(file_id, form.path, owner, form.name, fields["purpose"], form.num_bytes, now, expires_at)


class _Form:
    """A multipart form that arrives in parts; its file is written to a path.

    Args:
        path: path of the new file.
        boundary: boundary of the form's parts.
        max_bytes: maximum size of the file.

    Attributes:
        name: name of the file, None if there was none yet.
        num_bytes: size of the file so far.
        fields: the other fields.
    """

    def __init__(self, path: Path, boundary: bytes, *, max_bytes: int) -> None:
        self.path = path
        self.name: str | None = None
        self.num_bytes = 0
        self.fields: dict[str, bytes] = {}
        self._max_bytes = max_bytes
        self._field = ""  # name of the current part
        self._header = self._value = b""
        self._is_complete = False
        callbacks: Any = {
            "on_header_begin": self._begin_header,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_part_begin": self._begin_part,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except ValueError as error:
            raise RequestError(f"the form is malformed: {error}") from error
        self.file = path.open("xb")

    def feed(self, data: bytes, *, is_last: bool = False) -> None:
        """Add the next part of the body; raises what `FileStore.receive` does."""
        try:
            self._parser.write(data)
        except (RequestError, TooLargeError):
            raise
        except ValueError as error:  # FormParserError is one
            raise RequestError(f"the form is malformed: {str(error)[:200]}") from error
        if is_last and not self._is_complete:
            raise RequestError("the form is malformed: its end is missing")

    def _begin_part(self) -> None:
        self._field = ""

    def _begin_header(self) -> None:
        self._header = self._value = b""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_length(self._header)

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_length(self._value)

    def _end_header(self) -> None:
        if self._header.lower() != b"content-disposition":
            return
        options = parse_options_header(self._value)[1]
        self._field = options.get(b"name", b"").decode(errors="replace")
        if self._field == "file" and self.name is None:
            self.name = options.get(b"filename", b"file").decode(errors="replace")[:_MAX_NAME_CHARS]
        elif self._field == "file":
            raise RequestError("file: send one file in each request", param="file")

    def _end_headers(self) -> None:
        if self._field not in _FIELDS:
            raise RequestError(f"{self._field[:60] or 'a part without a name'}: unsupported field", param=None)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._field != "file":
            self.fields[self._field] = self.fields.get(self._field, b"") + data[start:end]
            self._check_length(self.fields[self._field])
            return
        self.num_bytes += end - start
        if self.num_bytes > self._max_bytes:
            raise TooLargeError(f"the file is larger than the maximum of {self._max_bytes / (1 << 20):g} MiB")
        self.file.write(data[start:end])

    def _end(self) -> None:
        self.file.close()  # so that an error of the disk is reported
        self._is_complete = True

    def _check_length(self, value: bytes) -> None:
        if len(value) > _MAX_FIELD_BYTES:
            raise RequestError(f"a field or header of the form has more than {_MAX_FIELD_BYTES} bytes")


def file_routes(store: FileStore, metrics: Metrics, *, seconds: float) -> APIRouter:
    """Return the routes of the Files API.

    Args:
        store: store of the files.
        metrics: metrics in which the received bytes are counted.
        seconds: time limit of an upload.
    """
    router = APIRouter()
    part = {"type": "object", "required": ["file", "purpose"], "properties": {
        "file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": list(PURPOSES)},
        _ANCHOR: {"type": "string", "enum": ["created_at"]}, _SECONDS: {"type": "integer"},
    }}  # fmt: skip
    body = {"required": True, "content": {"multipart/form-data": {"schema": part}}}

    @router.post("/v1/files", openapi_extra={"requestBody": body}, summary="Upload a file")
    async def upload(request: Request) -> dict[str, Any]:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > store.limits.max_file_bytes + (1 << 20):
            limit = store.limits.max_file_bytes / (1 << 20)
            raise TooLargeError(f"the file is larger than the maximum of {limit:g} MiB")
        async with asyncio.timeout(seconds):
            content_type = request.headers.get("content-type", "")
            file = await store.receive(content_type, request.stream(), owner=request.state.owner)
        metrics.received_bytes.labels("file").inc(file.num_bytes)
        return file.to_json()

    @router.get("/v1/files", summary="List the files")
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        files = [file for file in store.files(request.state.owner) if purpose in (None, file.purpose)]
        return _to_page(files if order == "asc" else files[::-1], after=after, limit=limit)

    @router.get("/v1/files/{file_id}", summary="Describe a file")
    async def retrieve(request: Request, file_id: str) -> dict[str, Any]:
        return store.find(file_id, request.state.owner).to_json()

    @router.get("/v1/files/{file_id}/content", summary="Download a file")
    async def content(request: Request, file_id: str) -> FileResponse:
        file = store.find(file_id, request.state.owner)
        headers = {"X-Content-Type-Options": "nosniff"}
        return FileResponse(file.path, filename=file.name, media_type="application/octet-stream", headers=headers)

    @router.delete("/v1/files/{file_id}", summary="Delete a file")
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        file = store.find(file_id, request.state.owner)
        store.remove(file)
        return {"id": file.id, "object": "file", "deleted": True}

    return router


def _to_page(files: Sequence[StoredFile], *, after: str | None, limit: int) -> dict[str, Any]:
    """Return up to `limit` files behind the one with the id `after`, in OpenAI's format of a list."""
    if after is not None:
        ids = [file.id for file in files]
        files = files[ids.index(after) + 1 :] if after in ids else []
    data = [file.to_json() for file in files[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": len(files) > limit}
