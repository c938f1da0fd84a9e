"""What is let in: no addresses to fetch from, no bodies without an end; and Gradio itself goes nowhere."""

import asyncio
import json
import signal
import socket
import sys

import httpx
import pytest
from gradio import processing_utils

from salmonn.webui.session import UploadStore
from salmonn.webui.uploads import MIB, UploadLimitMiddleware, disable_remote_fetch
from tests.webui.conftest import start_demo
from tests.webui.test_app import wait_until
from tests.webui.test_session import age

HASTY = "import salmonn.cli.demo as demo; from salmonn.cli.main import main; demo._CLEANUP_SECONDS = 0.2; main()"


@pytest.fixture
def uploads(tmp_path):
    return UploadStore(tmp_path, max_bytes=4 * MIB)


def ask(uploads, method, path, **options):
    """What a gate of 2 MiB, before an app that tells how much has come to it, answers; and that answer's status."""

    async def count(scope, receive, send):
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % size})

    async def call():
        gate = UploadLimitMiddleware(count, uploads=uploads, max_upload_bytes=2 * MIB)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://page") as client:
            return await client.request(method, path, **options)

    answer = asyncio.run(call())
    return answer.status_code, answer.text


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
def test_no_address_is_fetched_from(uploads, path):
    for method in ("GET", "HEAD"):
        assert ask(uploads, method, path)[0] == 403


def test_files_are_handed_out(uploads):
    assert ask(uploads, "GET", "/gradio_api/file=/tmp/https/a.mp4") == (200, "0")


async def pieces(size):
    for _ in range(size // 1024):
        yield b"x" * 1024


def test_a_request_is_short(uploads):
    path = "/gradio_api/queue/join"
    assert ask(uploads, "POST", path, content=b"x" * MIB) == (200, str(MIB))
    status, words = ask(uploads, "POST", path, content=b"x" * (MIB + 1))
    assert status == 413 and "1 MiB" in words
    # No length is told of these.
    assert ask(uploads, "POST", path, content=pieces(MIB)) == (200, str(MIB))
    assert ask(uploads, "POST", path, content=pieces(2 * MIB))[0] == 413


def test_an_upload_tells_its_length_and_is_not_too_long(uploads):
    path = "/gradio_api/upload"
    assert ask(uploads, "POST", path, content=b"x" * 3 * MIB) == (200, str(3 * MIB))
    status, words = ask(uploads, "POST", path, content=b"x" * (3 * MIB + 1))
    assert status == 413 and "2 MiB" in words
    assert ask(uploads, "POST", path, content=pieces(MIB))[0] == 411
    both = {"Content-Length": str(MIB), "Transfer-Encoding": "chunked"}
    assert ask(uploads, "POST", path, content=pieces(MIB), headers=both)[0] == 411


def test_all_uploads_together_have_their_room(uploads):
    # 4 MiB in all: 2 that lie there and 2 that come are just enough, and a byte more is not.
    (uploads.root / "folder").mkdir()
    (uploads.root / "folder" / "a.mp4").write_bytes(b"x" * 2 * MIB)
    for _ in range(2):  # what has come is no longer expected
        assert ask(uploads, "POST", "/gradio_api/upload", content=b"x" * 2 * MIB)[0] == 200
    status, words = ask(uploads, "POST", "/gradio_api/upload", content=b"x" * (2 * MIB + 1))
    assert status == 507 and "try again" in words
    assert uploads.admit(MIB) and uploads.admit(MIB) and not uploads.admit(1)  # those that come at once count
    uploads.arrived(MIB)
    assert uploads.admit(MIB)


@pytest.mark.parametrize("host", ["100.100.100.200", "huggingface.co", "no-such-name.invalid"])
def test_gradio_fetches_nothing(monkeypatch, tmp_path, host):
    monkeypatch.setattr(processing_utils, "async_transport", None)  # and back in the end
    disable_remote_fetch()
    monkeypatch.setattr(socket, "getaddrinfo", None)  # no name is looked up
    with pytest.raises(httpx.UnsupportedProtocol, match="fetches nothing"):
        processing_utils.ssrf_protected_download(f"http://{host}/a.mp4", str(tmp_path))


def test_the_page_goes_nowhere_for_a_forged_file(demo):
    """Every way from the page to the network goes by the proxy that it was started with, which nobody has come to."""
    with httpx.Client(base_url=f"{demo.address}gradio_api", trust_env=False, timeout=30) as client:
        config = httpx.get(f"{demo.address}config", trust_env=False).json()
        videos = {part["id"] for part in config["components"] if part["type"] == "video"}
        hold = next(deed for deed in config["dependencies"] if len(deed["inputs"]) == 1 and deed["inputs"][0] in videos)
        forged = {"path": "http://huggingface.co/a.mp4", "meta": {"_type": "gradio.FileData"}}
        body = {"data": [forged], "fn_index": hold["id"], "session_hash": "forger"}
        assert client.post("/queue/join", json=body).status_code == 200
        with client.stream("GET", "/queue/data", params={"session_hash": "forger"}) as told:
            events = [json.loads(line[5:]) for line in told.iter_lines() if line.startswith("data:")]
        (ended,) = [event for event in events if event["msg"] == "process_completed"]
        assert not ended["success"]
        assert client.get("/file=http://huggingface.co/a.mp4").status_code == 403
        assert client.post("/queue/join", content=b"x" * (MIB + 1)).status_code == 413
        assert client.post("/upload", content=(b"x" for _ in range(9))).status_code == 411
    demo.proxy.settimeout(0.5)
    with pytest.raises(TimeoutError):
        demo.proxy.accept()


def send_half_a_file(address):
    """Begin an upload, and go."""
    where = httpx.URL(address)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: page\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    with socket.create_connection((where.host, where.port)) as client:
        client.sendall(head + b"Content-Length: 500000\r\n\r\n" + part + b"x" * 100_000)


def test_uploads_that_nobody_holds_take_no_room_for_ever(tmp_path):
    """Files of 1 MiB at most, so that 4 MiB are there for all."""
    demo = start_demo(tmp_path / "demo", "--max_upload_mib", 1, command=[sys.executable, "-c", HASTY])
    try:
        send_half_a_file(demo.address)
        wait_until(lambda: len(demo.uploads()) == 1)
        with httpx.Client(base_url=f"{demo.address}gradio_api", timeout=30) as client:

            def send(letter, size=MIB):
                return client.post("/upload", files={"files": ("a.mp4", letter * size)}).status_code

            # The half of one and three whole ones fill it so far that a fourth has no room.
            assert [send(letter) for letter in (b"a", b"b", b"c", b"d")] == [200, 200, 200, 507]
            assert send(b"e", 2 * MIB) == 413
            assert len(demo.uploads()) == 4
            for path in demo.uploads():
                age(path)
            wait_until(lambda: not demo.uploads())
            assert send(b"d") == 200
    finally:
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(30) == 0
