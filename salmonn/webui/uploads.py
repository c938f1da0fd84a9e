"""What is let in to the page: no address for it to fetch from, and nothing without an end."""

import json
import re
from typing import Any
from urllib.parse import unquote

import httpx
from gradio import processing_utils
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from salmonn.webui.session import UploadStore

MIB = 1 << 20
_FETCHES = re.compile(r"/(file|proxy)[=/]\s*https?:", re.IGNORECASE)


class UploadLimitMiddleware:
    """Stands before Gradio, which fetches what strangers name, and takes bodies of any length.

    Args:
        app: that is let to answer.
        uploads: where files of visitors go.
        max_upload_bytes: of a file.
    """

    def __init__(self, app: ASGIApp, *, uploads: UploadStore, max_upload_bytes: int) -> None:
        self.app = app
        self.uploads = uploads
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif _FETCHES.search(unquote(scope["path"])):
            await _refuse(send, 403, "this page fetches nothing from elsewhere: upload the file")
        elif scope["path"].endswith("/upload"):
            await self._upload(scope, receive, send)
        else:
            await self._ask(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any other request: its body is short, and handed on when it is whole."""
        body, is_whole = bytearray(), False
        while not is_whole:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone
                return
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > MIB:
                await _refuse(send, 413, "the request is larger than the 1 MiB that is taken")
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not length.isdigit():
            await _refuse(send, 411, "an upload must say how long it is, in Content-Length")
        elif int(length) > self.max_upload_bytes + MIB:  # one for what stands around the file
            await _refuse(send, 413, f"the file is larger than the {self.max_upload_bytes / MIB:g} MiB that are taken")
        elif not self.uploads.admit(int(length)):
            await _refuse(send, 507, "there is no room for more files at present: try again in some minutes")
        else:
            try:
                await self.app(scope, receive, send)
            finally:
                self.uploads.arrived(int(length))


class BlockedTransport(httpx.AsyncBaseTransport):
    """A way to the network that leads nowhere."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Refuse; no name is looked up."""
        raise httpx.UnsupportedProtocol("this page fetches nothing from elsewhere", request=request)


def disable_remote_fetch() -> None:
    """Have Gradio, in all of this process, fetch nothing that a visitor names in place of a file."""
    setting: Any = processing_utils
    setting.async_transport = BlockedTransport()


async def _refuse(send: Send, status: int, words: str) -> None:
    body = json.dumps({"detail": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
