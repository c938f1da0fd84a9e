"""Uploaded files and the limits on requests: what Gradio's own `max_file_size` and `delete_cache` do not cover.

Gradio limits the size of each file, but neither other request bodies nor the total, fetches URLs that a client names in
place of a file, and deletes files by age: also those in use, and no interrupted upload. This module imports no Gradio,
which reads GRADIO_TEMP_DIR on import.
"""

import json
import math
import re
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIB = 1 << 20
# Before an unused file is deleted: the session that uploaded it may not have retained it yet.
UNUSED_SECONDS = 15 * 60.0
_REMOTE_FILE = re.compile(r"/(file|proxy)[=/]\s*https?:", re.IGNORECASE)


class UploadStore:
    """The folder of uploaded files. A file is deleted as soon as no session uses it any more.

    Args:
        root: folder of all uploads; no file outside it is ever deleted.
        max_bytes: maximum total size (default: unlimited).
    """

    def __init__(self, root: Path, *, max_bytes: float = math.inf) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._used: dict[tuple[str, str], Path] = {}  # (session, slot) -> file
        self._ended: dict[str, float] = {}  # session -> time of its end
        self._num_reserved = 0

    def retain(self, session: str, slot: str, path: Path | None) -> None:
        """Mark a file as used by a slot of a session, replacing the slot's previous file; None empties the slot.

        Events of a session may arrive after its end. They are ignored: nothing would ever release the file.
        """
        with self._lock:
            before = self._used.pop((session, slot), None)
            if path and session not in self._ended:
                self._used[session, slot] = path.resolve()
            if before:
                self._delete_if_unused(before)

    def end_session(self, session: str) -> None:
        """Release all files of a session."""
        with self._lock:
            self._ended[session] = time.time()
            for key in [key for key in self._used if key[0] == session]:
                self._delete_if_unused(self._used.pop(key))

    def reserve(self, num_bytes: int) -> bool:
        """Reserve space for an upload; return False if there is not enough. `end_reservation` must follow."""
        with self._lock:
            # The received part of an upload counts twice, as a file and as reserved; the limit still holds.
            if self._num_reserved + num_bytes + sum(size for _, size, _ in self._files()) > self.max_bytes:
                return False
            self._num_reserved += num_bytes
            return True

    def end_reservation(self, num_bytes: int) -> None:
        """Release the reserved space of an upload that has ended, successfully or not."""
        with self._lock:
            self._num_reserved -= num_bytes

    def delete_unused(self) -> None:
        """Delete files that are unused and were not modified recently, including those of interrupted uploads."""
        threshold = time.time() - UNUSED_SECONDS
        with self._lock:
            for path, _, modified in self._files():
                if modified < threshold:
                    self._delete_if_unused(path)
            self._ended = {session: ended for session, ended in self._ended.items() if ended > threshold}

    def _delete_if_unused(self, path: Path) -> None:
        if path in self._used.values() or not path.is_relative_to(self.root):
            return
        path.unlink(missing_ok=True)
        if path.parent != self.root:
            # Gradio has a folder per content, which may hold files of several names.
            with suppress(OSError):
                path.parent.rmdir()

    def _files(self) -> list[tuple[Path, int, float]]:
        """List all files with size in bytes and modification time."""
        files = []
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # moved or deleted meanwhile
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    files.append((path, status.st_size, status.st_mtime))
        return files


class UploadLimitMiddleware:
    """ASGI middleware that limits request bodies and rejects requests for remote files."""

    def __init__(self, app: ASGIApp, *, uploads: UploadStore, max_upload_bytes: int) -> None:
        self.app = app
        self.uploads = uploads
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif _REMOTE_FILE.search(unquote(scope["path"])):
            await _reject(send, 403, "remote files are not fetched: upload the file")
        elif scope["path"].endswith("/upload"):
            await self._handle_upload(scope, receive, send)
        else:
            await self._handle_small(scope, receive, send)

    async def _handle_small(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, at most 1 MiB, then pass the request on."""
        body, is_complete = bytearray(), False
        while not is_complete:
            message = await receive()
            if message["type"] != "http.request":  # the client has disconnected
                return
            body += message.get("body", b"")
            is_complete = not message.get("more_body", False)
            if len(body) > MIB:
                await _reject(send, 413, "the request exceeds the limit of 1 MiB")
                return
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    async def _handle_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the declared size, then pass the upload on while its space is reserved."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not length.isdigit():
            await _reject(send, 411, "an upload needs a Content-Length header")
        elif int(length) > self.max_upload_bytes + MIB:  # 1 MiB for the multipart headers
            await _reject(send, 413, f"the file exceeds the limit of {self.max_upload_bytes / MIB:g} MiB")
        elif not self.uploads.reserve(int(length)):
            await _reject(send, 507, "no space left for uploads: try again in a few minutes")
        else:
            try:
                await self.app(scope, receive, send)
            finally:
                self.uploads.end_reservation(int(length))


class BlockedTransport(httpx.AsyncBaseTransport):
    """HTTP transport that rejects every request, without resolving the host name."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Reject a request."""
        raise httpx.UnsupportedProtocol("remote files are not fetched", request=request)


async def _reject(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
