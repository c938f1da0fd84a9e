"""Servers in a thread, a client's requests to them, a model whose steps a test controls, and a web server."""

import base64
import socket
import ssl
import threading
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
from salmonn.serve.api import Service
from salmonn.serve.server import Server
from tests.limits import STEP_SECONDS, wait_until

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class GatedCaptioner(Captioner):
    """A model that prefills prompts and makes decode steps only while its gate is open.

    `step_error` and `prefill_error` map the row of rows in the batch to the error that a step or a prefill raises.
    """

    def __init__(self, captioner: Captioner) -> None:
        super().__init__(captioner.network, captioner.processor, name=captioner.name)
        self.gate = threading.Event()
        self.gate.set()
        self.step_error: Callable[[int], Exception | None] = lambda size: None
        self.prefill_error: Callable[[int], Exception | None] = lambda size: None
        self.batches: list[int] = []
        self.num_steps = 0
        self.largest_batch = 0  # rows
        self.close_gate_at = -1  # row of steps

    def streaming_generator(self) -> StreamingGenerator:
        return GatedStreamingGenerator(self)


class GatedStreamingGenerator(StreamingGenerator):
    """See `GatedCaptioner`."""

    def __init__(self, model: GatedCaptioner) -> None:
        super().__init__(model.network, model.processor)
        self.model = model
        self.active_rows: set[int] = set()

    def clear(self) -> None:
        super().clear()
        self.active_rows = set()

    def add(self, clips: Any, prompts: Any, **options: Any) -> range:
        self.model.batches.append(len(clips))
        self.model.gate.wait(STEP_SECONDS)
        if error := self.model.prefill_error(len(self.active_rows) + len(clips)):
            raise error
        rows = super().add(clips, prompts, **options)
        self.active_rows |= set(rows)
        return rows

    def step(self, cancelled: Collection[int] = ()) -> dict[int, TextDelta]:
        self.model.gate.wait(STEP_SECONDS)
        self.active_rows -= {row for row in self.active_rows if row in cancelled}
        deltas = super().step(cancelled)
        if error := self.model.step_error(len(self.active_rows)):
            raise error
        self.model.num_steps += 1
        if self.model.num_steps == self.model.close_gate_at:
            self.model.gate.clear()
        self.model.largest_batch = max(self.model.largest_batch, len(self.active_rows))
        self.active_rows -= {row for row, delta in deltas.items() if delta.completion}
        return deltas


class RunningServer:
    """A server in a thread, on a free port."""

    def __init__(self, service: Service, **options: Any) -> None:
        self.service = service
        self.server = Server(service, **options)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def client(self, *, key: str = "none", timeout: float = STEP_SECONDS) -> openai.OpenAI:
        """Return OpenAI's client, without retries."""
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=timeout)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(STEP_SECONDS)
        assert not self.thread.is_alive()


@contextmanager
def web_server(
    respond: Callable[[BaseHTTPRequestHandler], None], *, tls: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Run a web server; yield its host:port, and the (Host, path) of each request so far."""
    requests: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.headers["Host"], self.path))
            with suppress(BrokenPipeError, ConnectionResetError):  # the client has closed the connection
                respond(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def user_message(url: str, prompt: str | None = None, *, kind: str = "video_url") -> list[dict]:
    parts: list[dict] = [{"type": kind, kind: {"url": url}}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": prompt}] if prompt else [])}]


def chat(client, url, prompt=None, **options):
    return client.chat.completions.create(
        model="", messages=user_message(url, prompt), **({"max_completion_tokens": 12} | options)
    )


def gather(chunks):
    """Return the text and the finish reason of each choice of a stream, and the last chunk."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    chunk = None
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, chunk


def read_metrics(running: RunningServer) -> dict[str, float]:
    """Return the value of each metric, keyed by its name followed by its label values."""
    text = httpx2.get(f"{running.url}/metrics", trust_env=False).text
    return {
        "".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
