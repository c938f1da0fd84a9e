"""The HTTP API under load and attack: upload limits, time limits, disconnects, shutdown, keys and other web pages."""

import base64
import errno
import json
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from salmonn.caption.generator import Sampling
from salmonn.serve.fetch import FetchPolicy
from salmonn.serve.sources import MediaSources
from tests.limits import STEP_SECONDS, wait_until
from tests.serve.running import HEAD, chat, data_url, gather, read_metrics, user_message


def test_no_file_outside_the_allowed_folders(start, videos, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.mp4").symlink_to(videos[0])
    client = start(sources=MediaSources((root,), FetchPolicy())).client()
    for url in (str(videos[0]), "link.mp4", f"file://{root}/../{videos[0]}", "/etc/passwd"):
        with pytest.raises(openai.BadRequestError, match="no such file below the allowed folders"):
            chat(client, url)


def test_large_uploads_are_rejected(start, videos):
    """The limit is 8 KiB: 11 KiB of base64, and a MiB for the rest of the request."""
    running = start(sources=MediaSources((), FetchPolicy(max_bytes=8 << 10)))
    with pytest.raises(openai.APIStatusError, match=r"the file is larger than the maximum of 0.0078125 MiB") as caught:
        chat(running.client(), data_url(videos[0]))
    assert caught.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match="the request is larger than the maximum of 1 MiB") as caught:
        chat(running.client(), "data:;base64," + "A" * (2 << 20))
    assert caught.value.status_code == 413


def test_large_files_are_decoded_while_they_arrive(start, videos, model):
    """A long string is a file, wherever a clip may be; other long strings, and files that are too large, are errors."""
    running = start(sources=MediaSources((), FetchPolicy(max_bytes=4 << 20)))
    client, data = running.client(), videos[0].read_bytes()
    padded = data + (8 + 2_999_992).to_bytes(4, "big") + b"free" + bytes(2_999_992)  # a box that players skip
    encoded = base64.b64encode(padded).decode()
    expected = model.caption(videos[0], sampling=Sampling(max_new_tokens=12)).text
    assert chat(client, f"data:video/mp4;base64,{encoded}").choices[0].message.content == expected
    audio = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": encoded}}]}]
    answer = client.chat.completions.create(model="", messages=audio, max_tokens=12)
    assert answer.choices[0].message.content == expected
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[0\].content\[0\].video_url.url: .* not valid base64"
    ) as e:
        chat(client, f"data:video/mp4;base64,{encoded}!")
    assert e.value.param == "messages[0].content[0].video_url.url"
    with pytest.raises(openai.APIStatusError, match="the file is larger than the maximum of 4 MiB"):
        chat(client, f"data:video/mp4;base64,{encoded}{'A' * (2 << 20)}")
    with pytest.raises(openai.APIStatusError, match=r"messages\[0\].content\[1\].text: the string is too long"):
        chat(client, data_url(videos[0]), "x" * 3_000_000)
    with pytest.raises(openai.APIStatusError, match="more than 4,800,000 bytes in addition to its file"):
        chat(client, data_url(videos[0]), ["x" * 1_000_000] * 5)
    assert read_metrics(running)["salmonn_received_bytes_totalupload"] == 2 * len(padded)


def test_a_declared_large_upload_is_rejected_at_once(start):
    """Before any of it is sent."""
    running = start()
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(STEP_SECONDS)
        connection.sendall(f"{HEAD}Content-Length: {1 << 40}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_large_upload_is_rejected_while_it_arrives(start):
    """No length is declared, and the body has no end: the response comes before it."""
    running = start(sources=MediaSources((), FetchPolicy(max_bytes=1 << 20)))
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(STEP_SECONDS)
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        try:
            while sent < 40 << 20:
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 40 << 20 or b"413" in connection.recv(100)
    wait_until(lambda: read_metrics(running).get("salmonn_requests_totaltoo_large") == 1)


def test_space_for_uploads_is_limited(start, videos):
    """The limits are 2.43 MiB a request (10 / 7 for 1 MiB of file in base64, and 1 MiB), and 4 times that in total."""
    running = start(sources=MediaSources((videos[0].parent,), FetchPolicy(max_bytes=1 << 20)))
    size = int(2.425 * (1 << 20))
    connections = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(4)]
    try:
        for connection in connections:
            connection.sendall(f"{HEAD}Content-Length: {size + 1}\r\n\r\n".encode() + b" " * size)
        wait_until(lambda: running.service.upload_space.used_bytes == 4 * size)
        with pytest.raises(openai.RateLimitError, match="the space for uploads is full"):
            chat(running.client(), "data:;base64," + "A" * (1 << 17))
        assert chat(
            running.client(), videos[0].name, user="me" * 10_000
        ).choices  # 20 KB, more than the 15 KB that remain
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: running.service.upload_space.used_bytes == 0)
    assert chat(running.client(), data_url(videos[0])).choices


def test_rate_limit(start, model, videos):
    """At largest_batch 12 answers can be active."""
    running = start()
    model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, running.client(), videos[0].name, temperature=1, n=12)
        wait_until(lambda: model.batches == [12])
        with pytest.raises(openai.RateLimitError, match="12 answers are queued") as caught:
            chat(running.client(), videos[1].name)
        assert int(caught.value.response.headers["Retry-After"]) > 0
        model.gate.set()
        assert len(first.result(STEP_SECONDS).choices) == 12


def test_a_disconnect_cancels_only_its_request(start, engine, model, videos):
    """One client disconnects during its stream, one while it waits for its answer."""
    running = start()
    num_cancelled_before = engine.num_cancelled
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(chat, running.client(), videos[4].name)
        wait_until(lambda: model.batches == [1])
        streaming = pool.submit(chat, running.client(), videos[0].name, stream=True, max_completion_tokens=150)
        other = pool.submit(chat, running.client(), videos[1].name, max_completion_tokens=40)
        wait_until(lambda: engine.num_waiting == 2)
        body = json.dumps({"messages": user_message(videos[2].name)}).encode()
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: engine.num_waiting == 3)
        wait_until(lambda: engine.num_cancelled == num_cancelled_before + 1)
        model.gate.set()
        stream = streaming.result(STEP_SECONDS)
        next(stream)
        model.gate.clear()
        stream.close()
        wait_until(lambda: engine.num_cancelled == num_cancelled_before + 2)
        model.gate.set()
        assert first.result(STEP_SECONDS).choices
        answer = other.result(STEP_SECONDS).choices[0]
        assert answer.message.content == model.caption(videos[1], sampling=Sampling(max_new_tokens=40)).text
    wait_until(lambda: read_metrics(running)["salmonn_requests_totalcancelled"] == 2)


def test_request_timeout(start, engine, model, videos):
    running = start(request_seconds=0.3)
    model.gate.clear()
    with pytest.raises(openai.InternalServerError, match=r"took more than 0.3 s: use a part") as caught:
        chat(running.client(), videos[0].name)
    assert caught.value.status_code == 504
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(STEP_SECONDS)
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        assert b"504" in connection.recv(100)
    assert 0.15 < time.monotonic() - started < STEP_SECONDS
    model.gate.set()
    wait_until(lambda: not engine.num_active)


def test_shutdown_ends_active_requests_after_the_grace_period(start, own_engine, model, videos):
    """One is streaming, one is queued, one is being uploaded; new ones are rejected."""
    running, now = start(own_engine, grace_seconds=30.0), 1.0
    running.server.clock = lambda: now
    client = running.client()
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(chat, client, videos[0].name, stream=True, max_completion_tokens=500)
        wait_until(lambda: model.batches == [1])
        queued = pool.submit(chat, client, videos[1].name)
        wait_until(lambda: own_engine.num_waiting == 1)
        model.gate.set()
        with streaming.result(STEP_SECONDS) as chunks:
            next(chunks)
            model.gate.clear()
            uploading = socket.create_connection(("127.0.0.1", running.port))
            uploading.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
            wait_until(lambda: running.service.num_requests == 3)
            running.service.is_closing = True
            assert httpx2.get(f"{running.url}/health", trust_env=False).json()["status"] == "closing"
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                chat(client, videos[2].name)
            wait_until(lambda: running.server._closing_since)
            assert not own_engine._is_aborted.is_set()
            now += 30.0
            wait_until(own_engine._is_aborted.is_set)
            model.gate.set()
            with pytest.raises(openai.APIError, match="the server is shutting down; try again later"):
                gather(chunks)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            queued.result(STEP_SECONDS)
    with uploading:
        uploading.settimeout(STEP_SECONDS)
        assert b"503" in uploading.recv(100)
    running.thread.join(STEP_SECONDS)
    assert not running.thread.is_alive()


def test_a_full_disk_is_reported(start, videos, monkeypatch):
    """Creating a file's folder fails with ENOSPC."""
    running = start()

    def fail(*_, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("salmonn.serve.request.tempfile.mkdtemp", fail)
    with pytest.raises(openai.InternalServerError, match=r"cannot store the file \(No space left") as caught:
        chat(running.client(), data_url(videos[0]))
    assert caught.value.status_code == 507


def test_a_timeout_during_decoding_leaves_no_file(start, monkeypatch):
    """On a slow disk, the folder is created after the time limit."""
    running, made, mkdtemp = start(request_seconds=2.0), threading.Event(), tempfile.mkdtemp

    def make_slowly(**options):
        time.sleep(2.1)
        folder = mkdtemp(**options)
        made.set()
        return folder

    monkeypatch.setattr("salmonn.serve.request.tempfile.mkdtemp", make_slowly)
    with pytest.raises(openai.InternalServerError, match="took more than") as caught:
        chat(running.client(), "data:;base64," + "A" * (3 << 20))
    assert caught.value.status_code == 504 and made.wait(STEP_SECONDS)
    wait_until(lambda: not list(running.service.uploads.glob("tmp*")))


def test_keys(start, videos):
    running = start(keys=("first key of two", "second key of two"))
    assert chat(running.client(key="second key of two"), videos[0].name).choices
    for key in ("none", "first key of tw"):
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            chat(running.client(key=key), videos[0].name)
    for path, status in {"/v1/models": 401, "/metrics": 401, "/health": 200}.items():
        assert httpx2.get(running.url + path, trust_env=False).status_code == status
    response = httpx2.post(f"{running.url}/v1/chat/completions", content=b"x" * 1000, trust_env=False)
    assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
    assert "Bearer KEY" in response.json()["error"]["message"]


def test_other_web_pages_cannot_use_the_server(start, videos):
    """DNS rebinding and cross-origin requests are rejected."""
    running = start(hosts=("caption.example",))
    for host, status in {
        "localhost": 200,
        "127.0.0.1:1": 200,
        "[::1]": 200,
        "caption.example:8000": 200,
        "evil.example": 403,
        "localhost/docs?": 403,
        "evil@localhost": 403,
        "": 403,
        "[": 403,
    }.items():
        response = httpx2.get(f"{running.url}/health", headers={"Host": host}, trust_env=False)
        assert (host, response.status_code) == (host, status)
    body = json.dumps({"messages": user_message(videos[0].name)})
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        response = httpx2.post(
            f"{running.url}/v1/chat/completions", content=body, headers={"Content-Type": content_type}, trust_env=False
        )
        assert response.status_code == 415
    preflight = httpx2.options(
        f"{running.url}/v1/chat/completions",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        trust_env=False,
    )
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers
    # Browsers send a form without asking.
    form = {"files": {"file": ("a", b"abc")}, "data": {"purpose": "vision"}, "trust_env": False}
    for origin in ("https://evil.example", "null"):
        response = httpx2.post(f"{running.url}/v1/files", headers={"Origin": origin}, **form)
        assert response.status_code == 403 and "--allowed-origins" in response.text
    allowed = start(origins=("https://page.example",))
    for server, origin in ((running, running.url), (allowed, "https://page.example")):
        response = httpx2.post(f"{server.url}/v1/files", headers={"Origin": origin}, **form)
        assert response.status_code == 200
        server.client().files.delete(response.json()["id"])
