"""Servers of remote files on this machine: an S3 service (moto), a web server, and the routes of a Hugging Face Hub."""

import base64
import hashlib
import json
import logging
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def start_s3():
    """Start an S3 service; return it and its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return server, f"http://{host}:{port}"


class FileServer:
    """A web server with files in memory, their ETags and ranges.

    Args:
        ranges: whether parts of files are sent.

    Attributes:
        files: contents by path.
        requests: number of requests by method and path.
        failing: paths with the status of each next answer.
        authorizations: the `Authorization` header of each request.
    """

    def __init__(self, *, ranges: bool = True) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.failing: dict[str, list[int]] = {}
        self.authorizations: list[str | None] = []
        self.ranges = ranges
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Return status, contents and headers of an answer."""
        path = unquote(urlsplit(path).path)
        if path not in self.files:
            return 404, b"", {}
        data = self.files[path]
        return 200, data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FileServer

    def log_message(self, *args) -> None:
        pass

    def _answer(self) -> None:
        store, path = self.store, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store.requests[self.command, path] += 1
        store.authorizations.append(self.headers.get("Authorization"))
        if codes := store.failing.get(path):
            status, data, headers = codes.pop(0), b"", {}
        else:
            status, data, headers = store.answer(self.command, self.path, body)
        start, end = 0, len(data)
        asked = self.headers.get("Range")
        if asked and store.ranges and status == 200:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(len(data), int(last or len(data)) + 1)
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes" if store.ranges else "none", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start:end])

    do_GET = do_HEAD = do_POST = _answer


class HubServer(FileServer):
    """The routes of the Hub that a dataset's files are listed, downloaded and committed by.

    Attributes:
        files: contents by path in the dataset ORG/NAME.
        commits: the messages of commits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[str] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:  # noqa: PLR0911
        url = urlsplit(path)
        name = unquote(url.path)
        api, files = "/api/datasets/ORG/NAME", "/datasets/ORG/NAME/resolve/main/"
        if name.startswith(files) and name.removeprefix(files) in self.files:
            data = self.files[name.removeprefix(files)]
            return 200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": "1" * 40}
        if name in (api, f"{api}/revision/main"):
            return _json({"id": "ORG/NAME", "sha": "1" * 40, "private": False, "tags": [], "downloads": 0, "likes": 0})
        if name.startswith(f"{api}/tree/main"):
            return self._tree(
                name.removeprefix(f"{api}/tree/main").strip("/"), is_recursive="recursive=true" in url.query.lower()
            )
        if name == f"{api}/preupload/main":
            asked = json.loads(body)["files"]
            return _json(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
            )
        if name == f"{api}/commit/main":
            return self._commit([json.loads(line) for line in body.splitlines()])
        if name == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        return 404, b"{}", {"X-Error-Code": "EntryNotFound"}

    def _tree(self, folder: str, *, is_recursive: bool) -> tuple[int, bytes, dict[str, str]]:
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, data in sorted(self.files.items()):
            if path.startswith(prefix):
                head, slash, _ = path[len(prefix) :].partition("/")
                if slash and not is_recursive:
                    entries[prefix + head] = {"type": "directory", "path": prefix + head, "oid": "2" * 40, "size": 0}
                else:
                    entries[path] = {"type": "file", "path": path, "oid": _oid(data), "size": len(data)}
        if not entries and folder:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        return _json(list(entries.values()))

    def _commit(self, lines: list[dict]) -> tuple[int, bytes, dict[str, str]]:
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                self.files.pop(line["value"]["path"], None)
            elif line["key"] == "header":
                self.commits.append(line["value"]["summary"])
        commit = {"commitUrl": f"{self.url}/datasets/ORG/NAME/commit/{'1' * 40}", "commitOid": "1" * 40}
        return _json(commit | {"pullRequestUrl": None})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(value) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}
