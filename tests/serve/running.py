"""Real servers in a thread of the test, requests to them, a model that waits for the test, and a web server."""

import base64
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import openai
from prometheus_client.parser import text_string_to_metric_families

from salmonn.caption.captioner import Captioner
from salmonn.caption.streaming import StreamingGenerator, TextDelta
from salmonn.serve.api import Server, Service

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Gated(Captioner):
    """A model that reads prompts, and makes each step, when its gate is open.

    `fail` is what it raises at its next step, by how many are side by side, `fail_to_read` what it raises in place of
    reading, by how many would be.
    """

    def __init__(self, captioner: Captioner) -> None:
        super().__init__(captioner.network, captioner.processor, name=captioner.name)
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Callable[[int], Exception | None] = lambda size: None
        self.fail_to_read: Callable[[int], Exception | None] = lambda size: None
        self.batches: list[int] = []
        self.num_steps = 0
        self.most = 0  # side by side so far
        self.stops_after = -1  # steps, after which it closes its gate itself

    def streaming_generator(self) -> StreamingGenerator:
        return GatedAnswers(self)


class GatedAnswers(StreamingGenerator):
    """See `Gated`."""

    def __init__(self, model: Gated) -> None:
        super().__init__(model.network, model.processor)
        self.model = model
        self.present: set[int] = set()

    def add(self, clips: Any, prompts: Any, **named: Any) -> range:
        self.model.batches.append(len(clips))
        self.model.gate.wait(120)
        if error := self.model.fail_to_read(len(self.present) + len(clips)):
            raise error
        numbers = super().add(clips, prompts, **named)
        self.present |= set(numbers)
        return numbers

    def step(self, cancelled: Collection[int] = ()) -> dict[int, TextDelta]:
        self.model.gate.wait(120)
        self.present -= {number for number in self.present if number in cancelled}
        pieces = super().step(cancelled)
        if error := self.model.fail(len(self.present)):
            raise error
        self.model.num_steps += 1
        if self.model.num_steps == self.model.stops_after:
            self.model.gate.clear()
        self.model.most = max(self.model.most, len(self.present))
        self.present -= {number for number, piece in pieces.items() if piece.completion}
        return pieces


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, service: Service, *, grace_seconds: float) -> None:
        self.service = service
        self.server = Server(service, grace_seconds=grace_seconds)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def client(self, *, key: str = "none", timeout: float = 60.0) -> openai.OpenAI:
        """OpenAI's own, which asks once."""
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=timeout)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(120)
        assert not self.thread.is_alive()


def wait_until(done: Callable[[], object], *, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


@contextmanager
def web_server(
    answer: Callable[[BaseHTTPRequestHandler], None], *, tls: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A web server; gives its host:port, and the (Host, path) that it was asked for so far."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.headers["Host"], self.path))
            with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has heard enough
                answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def about(url: str, words: str | None = None, *, kind: str = "video_url") -> list[dict]:
    parts: list[dict] = [{"type": kind, kind: {"url": url}}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": words}] if words else [])}]


def ask(client, url, words=None, **named):
    return client.chat.completions.create(
        model="", messages=about(url, words), **({"max_completion_tokens": 12} | named)
    )


def counts(running: Running) -> dict[str, float]:
    """The metrics, by name and what tells them apart."""
    text = httpx2.get(f"{running.url}/metrics", trust_env=False).text
    return {
        "".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
