"""`salmonn serve` as a process: flags, signals, and removal of temporary files."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from salmonn.caption.generator import Sampling
from tests.launch import forked
from tests.limits import STEP_SECONDS, wait_until

KEY = "0123456789abcdef"


class ServerProcess:
    """A server in a separate process, with its temporary files in a temp_dir of the test."""

    def __init__(self, folder: Path, *flags: object, fresh: bool) -> None:
        self.temp_dir = folder / "temporary"
        self.temp_dir.mkdir(exist_ok=True)
        self.log_path = folder / "log"
        command = [Path(sys.executable).with_name("salmonn"), "serve", "--port", "0", "--workers", "1", *flags]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)) if fresh else forked(*command),
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(self.temp_dir), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        wait_until(lambda: self.process.poll() is not None or self.is_up(), seconds=300)
        assert self.process.poll() is None, self.log
        self.workers = self.find_workers()
        assert len(self.workers) == 1

    def find_workers(self) -> list[psutil.Process]:
        """Return the processes that have inherited the folder of temporary files."""
        workers = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self.temp_dir) and process.pid != self.process.pid:
                    workers.append(process)
        return workers

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def url(self) -> str:
        match = re.search(r"serving \S+ at (\S+)/v1\n", self.log)
        return match[1] if match else ""

    def is_up(self) -> bool:
        try:
            return bool(self.url) and self.health() == 200
        except httpx2.TransportError:
            return False

    def health(self) -> int:
        return httpx2.get(f"{self.url}/health", trust_env=False).status_code

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=STEP_SECONDS)

    def wait(self) -> int:
        """Wait for the process and return its exit code; no worker or temporary folder may be left."""
        code = self.process.wait(STEP_SECONDS)
        _, alive = psutil.wait_procs(self.workers, timeout=STEP_SECONDS)
        assert not alive and not list(self.temp_dir.glob("salmonn-*")), self.log
        return code


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "fresh"])
def run(request, tmp_path, random_model):
    """Start servers of the random model."""
    processes = []

    def start_server(*flags: object) -> ServerProcess:
        processes.append(ServerProcess(tmp_path, "--model", random_model, *flags, fresh=request.param))
        return processes[-1]

    yield start_server
    for server in processes:
        server.process.kill()
        server.process.wait()


def stream(client, video, *, tokens):
    url = "data:;base64," + base64.b64encode(video.read_bytes()).decode()
    messages = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]
    return client.chat.completions.create(model="mine", messages=messages, max_tokens=tokens, stream=True)


def test_graceful_shutdown_during_a_stream(run, model, videos, tmp_path):
    """The stream is finished, new requests are rejected, /health fails, and the exit code is 0."""
    (tmp_path / "keys").write_text(f"{KEY}\n\nanother key of it\n")
    server = run("--name", "mine", "--api-key-file", tmp_path / "keys")
    client = server.client(KEY)
    with pytest.raises(openai.AuthenticationError):
        server.client().models.list()
    chunks = stream(client, videos[0], tokens=250)
    next(chunks)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health() == 503)
    with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
        stream(client, videos[1], tokens=5)
    assert caught.value.status_code == 503
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == model.caption(videos[0], sampling=Sampling(max_new_tokens=250)).text
    assert server.wait() == 0
    assert "answered in" in server.log and "Traceback" not in server.log


def test_a_second_signal_ends_the_grace_period(run, videos):
    server = run("--served-model-name", "mine", "--grace-seconds", 60)
    chunks = stream(server.client(), videos[0], tokens=4000)
    next(chunks)
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: server.health() == 503)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is shutting down; try again later"):
        list(chunks)
    assert server.wait() == 0 and "shutting_down in" in server.log and "Traceback" not in server.log


def usage_error(call, *flags):
    code, _, err = call("serve", "--port", 0, *flags)
    assert code == 2
    return err


def test_invalid_flags_are_rejected_before_the_model_is_loaded(call, tmp_path):
    missing_model = ("--model", tmp_path / "none")
    assert "require a key with --api-key-file FILE" in usage_error(call, "--host", "0.0.0.0", *missing_model)
    (tmp_path / "keys").write_text("short\n")
    assert "must contain keys of at least 16 characters" in usage_error(
        call, "--api-key-file", tmp_path / "keys", *missing_model
    )
    assert "--max-seconds must be greater than 0" in usage_error(call, "--max-seconds", 0, *missing_model)
    assert "--allowed-dirs" in usage_error(call, "--allowed-dirs", tmp_path / "nowhere", *missing_model)
    assert "--lora-dirs" in usage_error(call, "--lora-dirs", tmp_path / "nowhere", *missing_model)
    assert "is not a host" in usage_error(call, "--allow-hosts", "https://example.org", *missing_model)
    assert "--ssl-keyfile needs --ssl-certfile" in usage_error(call, "--ssl-keyfile", tmp_path / "keys", *missing_model)
    assert "and its key cannot be used" in usage_error(call, "--ssl-certfile", tmp_path / "keys", *missing_model)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in usage_error(call, "--port", port, *missing_model)


def test_a_missing_extra_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "salmonn.serve.server", raising=False)
    assert "pip install 'salmonn[serve]'" in usage_error(call)
