"""Request limits, blocked remote files, and deletion of uploads by a running server."""

import asyncio
import json
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from gradio import processing_utils

from salmonn.webui.app import disable_remote_fetch
from salmonn.webui.uploads import MIB, UploadLimitMiddleware, UploadStore
from tests.limits import STEP_SECONDS, wait_until
from tests.webui.conftest import start_demo
from tests.webui.test_session import age

FREQUENT_CLEANUP = (
    "import salmonn.cli.demo as demo; from salmonn.cli.main import main; demo.CLEANUP_SECONDS = 0.2; main()"
)


@pytest.fixture
def uploads(tmp_path):
    return UploadStore(tmp_path, max_bytes=4 * MIB)


def send_request(uploads, method, path, **options):
    """Return status and body of the response of an app that returns the request's size, with a limit of 2 MiB."""

    async def count(scope, receive, send):
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % size})

    async def call():
        middleware = UploadLimitMiddleware(count, uploads=uploads, max_upload_bytes=2 * MIB)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://page") as client:
            return await client.request(method, path, **options)

    # In a separate thread: other tests' browser has an event loop in this one.
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(asyncio.run, call()).result()
    return response.status_code, response.text


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://100.100.100.200/latest",
        "/gradio_api/file=HTTPS://example.com",
        "/gradio_api/file%3Dhttp%3A%2F%2Fexample.com",
        "/gradio_api/file=%2568ttp://example.com",
        "/gradio_api/file=%20http://example.com",
        "/gradio_api/file/http://example.com",
        "/gradio_api/proxy=http://example.com",
        "/file=http://example.com",
    ],
)
def test_remote_files_are_rejected(uploads, path):
    for method in ("GET", "HEAD"):
        assert send_request(uploads, method, path)[0] == 403


def test_local_files_are_served(uploads):
    assert send_request(uploads, "GET", "/gradio_api/file=/tmp/https/a.mp4") == (200, "0")


async def chunks(size):
    for _ in range(size // 1024):
        yield b"x" * 1024


def test_request_bodies_are_limited(uploads):
    path = "/gradio_api/queue/join"
    assert send_request(uploads, "POST", path, content=b"x" * MIB) == (200, str(MIB))
    status, message = send_request(uploads, "POST", path, content=b"x" * (MIB + 1))
    assert status == 413 and "1 MiB" in message
    # Without Content-Length.
    assert send_request(uploads, "POST", path, content=chunks(MIB)) == (200, str(MIB))
    assert send_request(uploads, "POST", path, content=chunks(2 * MIB))[0] == 413


def test_uploads_need_a_length_within_the_limit(uploads):
    path = "/gradio_api/upload"
    assert send_request(uploads, "POST", path, content=b"x" * 3 * MIB) == (200, str(3 * MIB))
    status, message = send_request(uploads, "POST", path, content=b"x" * (3 * MIB + 1))
    assert status == 413 and "2 MiB" in message
    assert send_request(uploads, "POST", path, content=chunks(MIB))[0] == 411
    both = {"Content-Length": str(MIB), "Transfer-Encoding": "chunked"}
    assert send_request(uploads, "POST", path, content=chunks(MIB), headers=both)[0] == 411


def test_the_total_size_of_uploads_is_limited(uploads):
    # 4 MiB in total: 2 on disk and 2 being uploaded fit exactly; one byte more does not.
    (uploads.root / "folder").mkdir()
    (uploads.root / "folder" / "a.mp4").write_bytes(b"x" * 2 * MIB)
    for _ in range(2):  # a finished upload is no longer reserved
        assert send_request(uploads, "POST", "/gradio_api/upload", content=b"x" * 2 * MIB)[0] == 200
    status, message = send_request(uploads, "POST", "/gradio_api/upload", content=b"x" * (2 * MIB + 1))
    assert status == 507 and "try again" in message
    assert uploads.reserve(MIB) and uploads.reserve(MIB) and not uploads.reserve(1)  # concurrent uploads count
    uploads.end_reservation(MIB)
    assert uploads.reserve(MIB)


@pytest.mark.parametrize("host", ["100.100.100.200", "huggingface.co", "no-such-name.invalid"])
def test_gradio_fetches_nothing(monkeypatch, tmp_path, host):
    monkeypatch.setattr(processing_utils, "async_transport", None)  # restored after the test
    disable_remote_fetch()
    monkeypatch.setattr(socket, "getaddrinfo", None)  # no host name is resolved
    with pytest.raises(httpx.UnsupportedProtocol, match="remote files are not fetched"):
        processing_utils.ssrf_protected_download(f"http://{host}/a.mp4", str(tmp_path))


def test_a_forged_remote_file_is_not_fetched(demo):
    """The server could only reach the network through its proxy, which receives no connection."""
    with httpx.Client(base_url=f"{demo.address}gradio_api", trust_env=False, timeout=STEP_SECONDS) as client:
        config = httpx.get(f"{demo.address}config", trust_env=False).json()
        files = {part["id"] for part in config["components"] if part["type"] == "file"}
        retain_event = next(
            event
            for event in config["dependencies"]
            if event["backend_fn"] and len(event["inputs"]) == 1 and event["inputs"][0] in files
        )
        forged_file = {"path": "http://huggingface.co/a.mp4", "meta": {"_type": "gradio.FileData"}}
        body = {"data": [forged_file], "fn_index": retain_event["id"], "session_hash": "forger"}
        assert client.post("/queue/join", json=body).status_code == 200
        with client.stream("GET", "/queue/data", params={"session_hash": "forger"}) as stream:
            events = [json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:")]
        (completed,) = [event for event in events if event["msg"] == "process_completed"]
        assert not completed["success"]
        assert client.get("/file=http://huggingface.co/a.mp4").status_code == 403
        assert client.post("/queue/join", content=b"x" * (MIB + 1)).status_code == 413
        assert client.post("/upload", content=(b"x" for _ in range(9))).status_code == 411
    demo.proxy.settimeout(0.5)
    with pytest.raises(TimeoutError):
        demo.proxy.accept()


@contextmanager
def partial_upload(address):
    """Start an upload; disconnect at the end of the context."""
    url = httpx.URL(address)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: page\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(head + b"Content-Length: 500000\r\n\r\n" + part + b"x" * 100_000)
        yield


def test_unused_uploads_are_deleted(tmp_path):
    """With files of at most 1 MiB, the total limit is 4 MiB."""
    demo = start_demo(tmp_path / "demo", "--max_upload_mib", 1, command=[sys.executable, "-c", FREQUENT_CLEANUP])
    try:
        # If the server saw the end of the connection first, it would drop the data.
        with partial_upload(demo.address):
            wait_until(lambda: len(demo.uploads()) == 1)
        with httpx.Client(base_url=f"{demo.address}gradio_api", timeout=STEP_SECONDS) as client:

            def send(content, size=MIB):
                return client.post("/upload", files={"files": ("a.mp4", content * size)}).status_code

            # One partial file and three complete ones leave no space for a fourth.
            assert [send(content) for content in (b"a", b"b", b"c", b"d")] == [200, 200, 200, 507]
            assert send(b"e", 2 * MIB) == 413
            assert len(demo.uploads()) == 4
            for path in demo.uploads():
                age(path)
            wait_until(lambda: not demo.uploads())
            assert send(b"d") == 200
    finally:
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(STEP_SECONDS) == 0
