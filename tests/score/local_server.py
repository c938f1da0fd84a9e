"""A real language model server on this machine: `transformers serve` with a tiny chat model of random weights.

To try it manually: make_chat_model(folder), then `transformers serve FOLDER --device cpu`.
"""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from salmonn.caption.prompt import train_tokenizer

# Mostly for importing transformers, which takes 7 s with two free cores.
_START_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class LocalServer:
    """A running server.

    Args:
        base_url: address for OpenAI clients.
        model: folder of the model, and its name in requests.
        log_path: file of the server's output.
    """

    base_url: str
    model: str
    log_path: Path

    @property
    def num_requests(self) -> int:
        """Return the number of chat requests in the server's log."""
        return self.log_path.read_text().count('"POST /v1/chat/completions')


def make_chat_model(folder: Path) -> None:
    """Save a chat model of 2 layers, 32 wide, whose tokens are bytes, so that they can be counted by hand."""
    tokenizer = train_tokenizer(["a"], vocab_size=263)  # 7 special tokens and 256 bytes
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # a fresh model gives almost the same reply to every request
    # The server samples, with seeds, only for models with this setting; published chat models have it.
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def serve_locally(model: Path, *, log_path: Path) -> Iterator[LocalServer]:
    """Start the server on a free port, offline, on the CPU, and stop it at the end.

    Raises:
        RuntimeError: the server ends or does not respond; the message has its output.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | env)
    try:
        _wait_until_healthy(process, port=port, log_path=log_path)
        yield LocalServer(f"http://127.0.0.1:{port}/v1", str(model), log_path)
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, *, port: int, log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while not _is_healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            state = "did not answer in time" if process.poll() is None else f"ended with {process.returncode}"
            raise RuntimeError(f"transformers serve {state}:\n{log_path.read_text()}")
        time.sleep(0.2)


def _is_healthy(port: int) -> bool:
    # A plain client, because others may go through a proxy.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:  # it waits for a generation that is no longer read
        process.kill()
        process.wait()
