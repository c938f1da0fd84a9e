"""Uploaded files with OpenAI's client: stored, named in requests, limited, and deleted."""

import asyncio
import resource
import socket

import httpx2
import openai
import pytest
from starlette.requests import ClientDisconnect

from salmonn.caption.generator import Sampling
from salmonn.serve import files as files_module
from salmonn.serve.files import FileLimits, FileStore
from tests.limits import wait_until
from tests.serve.running import read_metrics

FORM = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\nabc\r\n--x--\r\n'
)
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


def ask(client, part):
    messages = [{"role": "user", "content": [part]}]
    return client.chat.completions.create(model="", messages=messages, max_tokens=12).choices[0].message.content


def test_a_file_is_used_in_requests(start, model, videos):
    """As `file`, and as any other kind of clip; the last request deletes it."""
    running = start()
    client = running.client()
    with videos[0].open("rb") as file:
        stored = client.files.create(file=file, purpose="user_data")
    size = videos[0].stat().st_size
    assert stored.id.startswith("file-") and (stored.bytes, stored.filename) == (size, videos[0].name)
    assert stored.expires_at - stored.created_at == 24 * 3600
    expected = model.caption(videos[0], sampling=Sampling(max_new_tokens=12)).text
    assert ask(client, {"type": "file", "file": {"file_id": stored.id}}) == expected
    assert ask(client, {"type": "video_url", "video_url": {"file_id": stored.id}}) == expected
    assert client.files.content(stored.id).read() == videos[0].read_bytes()
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError, match=r"^.*messages\[0\].content\[0\].file.file_id: no file"):
        ask(client, {"type": "file", "file": {"file_id": stored.id}})
    assert not list((running.service.uploads / "files").iterdir())
    assert read_metrics(running)["salmonn_received_bytes_totalfile"] == size


def test_files_are_listed_in_pages(start):
    running = start()
    client = running.client()
    ids = [client.files.create(file=(name, b"abc"), purpose="vision").id for name in ("a", "b", "c")]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]  # the client asks for the next page
    assert [file.filename for file in client.files.list(order="asc", after=ids[0])] == ["b", "c"]
    assert not client.files.list(purpose="user_data").data
    assert client.files.retrieve(ids[1]).filename == "b"
    with pytest.raises(openai.BadRequestError, match="limit: ") as caught:
        client.files.list(limit=0)
    assert caught.value.param == "limit"
    for file in ids:
        client.files.delete(file)


def test_files_belong_to_a_key(start):
    keys = "first key of two", "second key of two"
    running = start(keys=keys)
    first, second = (running.client(key=key) for key in keys)
    stored = first.files.create(file=("a", b"abc"), purpose="user_data")
    assert not second.files.list().data and len(first.files.list().data) == 1
    for use in (second.files.retrieve, second.files.delete, second.files.content):
        with pytest.raises(openai.NotFoundError, match="no file"):
            use(stored.id)
    with pytest.raises(openai.NotFoundError):
        ask(second, {"type": "file", "file": {"file_id": stored.id}})
    with pytest.raises(openai.AuthenticationError):
        running.client().files.create(file=("a", b"abc"), purpose="user_data")
    first.files.delete(stored.id)


def test_limits_of_files(start):
    """A file of 100 bytes, and 400 together; a form counts with its headers while it arrives."""
    running = start(files=FileLimits(100, 400))
    client = running.client()
    with pytest.raises(openai.APIStatusError, match="the file is larger than the maximum") as caught:
        client.files.create(file=("a", b"x" * 101), purpose="user_data")
    assert caught.value.status_code == 413
    first = client.files.create(file=("a", b"x" * 99), purpose="user_data")
    with pytest.raises(openai.InternalServerError, match="the space for files is full; delete some") as caught:
        client.files.create(file=("a", b"x" * 90), purpose="user_data")
    assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
    assert len(list((running.service.uploads / "files").iterdir())) == 1
    client.files.delete(first.id)
    client.files.delete(client.files.create(file=("a", b"x" * 90), purpose="user_data").id)


def test_files_expire(start):
    running = start(files=FileLimits(seconds=0.5))
    client = running.client()
    stored = client.files.create(
        file=("a", b"abc"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert stored.expires_at - stored.created_at <= 1  # no longer than the server allows
    wait_until(lambda: not list((running.service.uploads / "files").iterdir()))  # without another request
    with pytest.raises(openai.NotFoundError, match="it may have expired"):
        client.files.retrieve(stored.id)


def test_a_file_may_expire_earlier(tmp_path):
    async def parts():
        yield b'--x\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n60\r\n' + FORM

    now = [1000.0]
    store = FileStore(tmp_path / "files", FileLimits(), clock=lambda: now[0])
    file = asyncio.run(store.receive(MULTIPART["Content-Type"], parts(), owner=""))
    assert file.expires_at == 1060 and file.path.read_bytes() == b"abc" and store.files("") == [file]
    now[0] = 1060.0
    assert store.files("") == [] and not file.path.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FORM.replace(b"user_data", b"batch"), "purpose must be one of user_data"),
        (FORM.replace(b'name="purpose"', b'name="colour"'), "colour: unsupported field"),
        (FORM.replace(b"abc", b""), "file: it is empty"),
        (
            b'--x\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n00\r\n' + FORM,
            "needs the anchor",
        ),
        (FORM[: FORM.index(b"--x", 3)] + b"--x--\r\n", "file: the form has no such part"),
        (FORM[:-6], "its end is missing"),
        (FORM.replace(b"--x--\r\n", FORM[FORM.rindex(b"--x\r\n") :]), "send one file in each request"),
        (FORM.replace(b"user_data", b"a" * 1001), "more than 1000 bytes"),
        (FORM.replace(b"filename", b"f" * 1001), "more than 1000 bytes"),
        (b"no form", "the form is malformed"),
        (b"", "the form is malformed"),
    ],
)
def test_malformed_forms(start, body, message):
    running = start()
    response = httpx2.post(f"{running.url}/v1/files", content=body, headers=MULTIPART, trust_env=False)
    assert (response.status_code, message in response.json()["error"]["message"]) == (400, True), response.text
    assert not list((running.service.uploads / "files").iterdir())


def test_other_bodies_are_no_forms(start):
    for kind in ("application/json", "multipart/form-data"):
        response = httpx2.post(f"{start().url}/v1/files", content=FORM, headers={"Content-Type": kind}, trust_env=False)
        assert response.status_code == 415


def test_a_boundary_that_is_too_long(start):
    running = start()
    headers = {"Content-Type": f"multipart/form-data; boundary={'x' * 300}"}
    response = httpx2.post(f"{running.url}/v1/files", content=FORM, headers=headers, trust_env=False)
    assert (response.status_code, "Boundary" in response.text) == (400, True)
    assert not list((running.service.uploads / "files").iterdir())


def test_a_full_disk_takes_no_space(tmp_path, monkeypatch):
    """Of a client that leaves, nothing is counted, even if its last bytes cannot be written."""

    async def parts():
        yield FORM[:-9]
        raise ClientDisconnect

    monkeypatch.setattr(files_module, "_BLOCK_BYTES", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = FileStore(tmp_path / "files", FileLimits(max_bytes=len(FORM)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            asyncio.run(store.receive(MULTIPART["Content-Type"], parts(), owner=""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    async def complete():
        yield FORM

    assert asyncio.run(store.receive(MULTIPART["Content-Type"], complete(), owner="")).num_bytes == 3


def test_a_file_of_a_client_that_leaves_is_deleted(start):
    running = start()
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        connection.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode() + FORM[:-20])
        wait_until(lambda: list(running.service.uploads.rglob("file-*")))
    wait_until(lambda: not list(running.service.uploads.rglob("file-*")))


def test_nothing_is_stored_during_shutdown(start):
    running = start()
    running.service.num_requests += 1  # an active request, for which the server waits
    running.service.is_closing = True
    answer = httpx2.post(f"{running.url}/v1/files", content=FORM, headers=MULTIPART, trust_env=False)
    running.service.num_requests -= 1
    assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] and not running.service.files.files("")
