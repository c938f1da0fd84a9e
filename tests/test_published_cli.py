"""`salmonn caption` with published checkpoints and real files: from a folder, from a hub, with every kind of media."""

import functools
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from peft import LoraConfig as PeftConfig
from safetensors import safe_open
from safetensors.torch import save_file

from salmonn import cli
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.files import read_records
from salmonn.model.families import salmonn2_plus
from salmonn.records import Caption
from tests.launch import forked
from tests.limits import RUN_SECONDS

MEDIA = Path(__file__).parents[2] / "shared" / "media"
pytestmark = pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no media in {MEDIA}")
SHARD = "model-{:05d}-of-00002.safetensors"
DAMAGED = r"corrupted\.mp4: \d+ damaged video frames? "
SALMONN = Path(sys.executable).with_name("salmonn")


class HubHandler(BaseHTTPRequestHandler):
    """As much of a hub as from_pretrained asks for: files of one repository, under its name and any revision."""

    def __init__(self, folder: Path, requested: list[str], *args) -> None:
        self.folder, self.requested = folder, requested
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.requested.append(self.path)
        name, _, file = self.path.partition("/resolve/")
        path = self.folder / file.partition("/")[2]
        files = sorted(file.name for file in self.folder.iterdir())
        if "/video-salmonn/tree/" in name:
            templates = "additional_chat_templates" in name
            listed = [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in files]
            body = json.dumps([] if templates else listed).encode()
        elif name.startswith("/api/models/someone/video-salmonn"):
            siblings = [{"rfilename": file} for file in files]
            body = json.dumps({"id": "someone/video-salmonn", "sha": "0" * 40, "siblings": siblings}).encode()
        elif name == "/someone/video-salmonn" and path.is_file():
            body = path.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/video-salmonn" in name else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def port():
    """The port that a test's hubs listen on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def home(port, tmp_path):
    """Environment of a process that uses the hub and has nothing on disk."""
    return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")}


@pytest.fixture
def requested(published, port, tmp_path):
    """Paths requested from a hub that has the 2+ fixture in two shards."""
    folder = tmp_path / "repository"
    folder.mkdir()
    source = published("salmonn2-plus")
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    with safe_open(source / "model.safetensors", framework="pt") as file:
        names = sorted(file.keys())
        shards = [names[::2], names[1::2]]
        for number, part in enumerate(shards, start=1):
            save_file(
                {name: file.get_tensor(name) for name in part}, folder / f"model-0000{number}-of-00002.safetensors"
            )
    index = {name: f"model-0000{number}-of-00002.safetensors" for number, part in enumerate(shards, 1) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with serve(folder, port) as requested:
        yield requested


@contextmanager
def serve(folder: Path, port: int) -> Iterator[list[str]]:
    """A hub that has this folder as someone/video-salmonn; gives the paths requested from it."""
    requested: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(HubHandler, folder, requested))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield requested
    server.shutdown()
    server.server_close()


def run(*line: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        list(map(str, line)), capture_output=True, text=True, timeout=RUN_SECONDS, check=False, env=env
    )


# `salmonn` in a fork of a process that imported huggingface_hub with other variables of the environment.
WITH_THIS_HUB = """
import importlib
from huggingface_hub import constants, hf_api
importlib.reload(constants)
hf_api.api.endpoint = constants.ENDPOINT
from salmonn.cli.main import main
main()
"""


def caption(*args: object, home: dict[str, str], fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `salmonn caption` in a fork of a process that has imported torch, or in a fresh process."""
    line = [SALMONN] if fresh else forked(sys.executable, "-c", WITH_THIS_HUB)
    return run(*line, "caption", *args, environment=home)


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hub_id_is_all_that_is_needed(capsys, requested, home, published, tmp_path, fresh):
    args = (MEDIA / "h265_video.mp4", "--max-new-tokens", 4, "--model", "someone/video-salmonn")
    result = caption(*args, "--out", tmp_path / "a.jsonl", home=home, fresh=fresh)
    assert result.returncode == 0, result.stderr
    assert any("model-00002-of-00002" in path for path in requested)
    (from_hub,) = read_records(tmp_path / "a.jsonl", Caption)
    assert from_hub.prompt == salmonn2_plus.Salmonn2Plus.prompts["both"]
    assert from_hub.model == "someone/video-salmonn"
    # The second time it is on disk, and nothing is requested.
    num_requested = len(requested)
    offline = caption(*args, "--out", tmp_path / "b.jsonl", home=home | {"HF_HUB_OFFLINE": "1"}, fresh=fresh)
    assert offline.returncode == 0, offline.stderr
    assert len(requested) == num_requested
    (again,) = read_records(tmp_path / "b.jsonl", Caption)
    assert call(capsys, *args[:3], "--model", published("salmonn2-plus"), "--out", tmp_path / "c.jsonl")[0] == 0
    (from_folder,) = read_records(tmp_path / "c.jsonl", Caption)
    assert from_hub.text == again.text == from_folder.text


def test_an_adapter_on_the_hub(published, port, home, tmp_path):
    """By its id; from disk if the hub is unreachable; with an error if it is used as a model."""
    base = published("salmonn2-plus")
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(
        (base / "model.safetensors").resolve().parent / "lora.safetensors", folder / "adapter_model.safetensors"
    )
    PeftConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]).save_pretrained(str(folder))
    args = (MEDIA / "h265_video.mp4", "--max-new-tokens", 4, "--end", 1)
    both = (*args, "--model", base, "--adapter", "someone/video-salmonn")
    with serve(folder, port):
        result = caption(*both, "--out", tmp_path / "a.jsonl", home=home)
        assert result.returncode == 0, result.stderr
        alone = caption(*args, "--model", "someone/video-salmonn", "--out", tmp_path / "b.jsonl", home=home)
    assert alone.returncode == 2 and "is an adapter, not a model; pass it with --adapter" in alone.stderr
    away = caption(*both, "--out", tmp_path / "c.jsonl", home=home)
    assert away.returncode == 0, away.stderr
    (first,), (again,) = (read_records(tmp_path / f"{name}.jsonl", Caption) for name in "ac")
    assert first.text == again.text


@pytest.mark.usefixtures("requested")
def test_a_model_that_the_hub_lacks(home, tmp_path):
    result = caption(MEDIA / "h265_video.mp4", "--model", "someone/other", "--out", tmp_path / "a.jsonl", home=home)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "no model someone/other: there is no such folder, and it cannot be fetched from the hub" in result.stderr
    assert not (tmp_path / "a.jsonl").exists()


def test_an_unknown_model_without_a_connection_fails_at_once(home, tmp_path):
    result = caption(MEDIA / "h265_video.mp4", "--model", "someone/other", "--out", tmp_path / "a.jsonl", home=home)
    assert result.returncode == 2 and "Retrying" not in result.stderr
    assert result.stderr.startswith("error: no model someone/other: ") and result.stderr.count("\n") == 1


def call(capsys, *args: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["caption", *map(str, args)])
    return caught.value.code, capsys.readouterr().err


# What holds of each file: H.264 with and without sound, HEVC, AV1, two rotations, sound alone, a damaged one.
EVERY_FILE = {
    "av1_video.mkv",
    "corrupted.mp4",
    "flipping_a_pancake.mkv",
    "h265_video.mp4",
    "jfk.flac",
    "nasa_13013.mp4",
    "video_0.mov",
    "video_90.mov",
}


@pytest.mark.parametrize("family", ["salmonn2", "salmonn2-plus"])
def test_every_real_file_is_captioned(capsys, caplog, published, tmp_path, family):
    assert {path.name for path in MEDIA.iterdir()} == EVERY_FILE
    out = tmp_path / "captions.jsonl"
    # At full size, five seconds of 720p take 2+ a minute; it sees whole files in the next test.
    span = ["--end", 1] if family == "salmonn2-plus" else []
    flags = ("--model", published(family), "--out", out, "--max-new-tokens", 2, "--batch-size", 1, *span)
    code, err = call(capsys, MEDIA, *flags)
    assert code == 0 and "8 captions" in err and "0 videos failed" in err
    captions = read_records(out, Caption)
    assert {Path(caption.video).name for caption in captions} == EVERY_FILE
    # The damaged one is captioned as far as it decodes, with a warning; its first second is intact.
    assert bool(re.search(DAMAGED, caplog.text)) is not bool(span)


def test_every_real_file_whole_by_2_plus(published, caplog):
    """Fewer and smaller frames than the published ones, of each file from beginning to end."""
    frames = {"interval_seconds": 1.0, "min_frames": 4, "max_frames": 8, "max_pixels": 16 * 28 * 28}
    captioner = Captioner.load(published("salmonn2-plus"), frames=frames)
    results = captioner.caption_many(
        CaptionRequest(path, sampling=Sampling(max_new_tokens=2)) for path in sorted(MEDIA.iterdir())
    )
    assert {Path(result.video).name for result in results if isinstance(result, Caption)} == EVERY_FILE
    assert re.search(DAMAGED, caplog.text)


@pytest.mark.parametrize(
    ("modality", "failed"),
    [
        ("visual", {"jfk.flac"}),
        ("audio", EVERY_FILE - {"jfk.flac", "nasa_13013.mp4", "flipping_a_pancake.mkv"}),
    ],
)
def test_what_a_file_lacks_is_told(capsys, random_model, tmp_path, modality, failed):
    out = tmp_path / "captions.jsonl"
    code, err = call(
        capsys, MEDIA, "--model", random_model, "--out", out, "--max-new-tokens", 2, "--modality", modality
    )
    assert code == 1
    captions = read_records(out, Caption)
    assert {Path(caption.video).name for caption in captions} == EVERY_FILE - failed
    lacking = {"visual": "video", "audio": "audio"}[modality]
    assert all(f"{name}: has no {lacking}; caption the rest of it" in err for name in failed)


def test_a_span_and_a_question(capsys, published, tmp_path):
    out = tmp_path / "captions.jsonl"
    args = ("--start", 2, "--end", 3, "--prompt", "What is said?", "--max-new-tokens", 2, "--out", out)
    code, err = call(capsys, MEDIA / "nasa_13013.mp4", "--model", published("salmonn2"), *args)
    assert code == 0, err
    (one,) = read_records(out, Caption)
    assert one.prompt == "What is said?"


@pytest.mark.parametrize(
    ("family", "flags", "words"),
    [
        ("salmonn2", ["--published-positions"], "published positions are not defined for a salmonn2 model"),
        ("salmonn2-plus", ["--adapter", "{empty}"], "has no readable adapter"),
        ("salmonn2-plus", ["--bits", "3"], "bits"),
        ("salmonn2-plus", ["--dtype", "int8"], "dtype"),
        ("salmonn2-plus", ["--device-map", "everywhere"], "device name"),
        ("salmonn2-plus", ["--device", "gpu"], "unknown device gpu"),
    ],
)
def test_mistakes_in_loading(capsys, published, tmp_path, family, flags, words):
    (tmp_path / "empty").mkdir()
    given = [flag.format(empty=tmp_path / "empty") for flag in flags]
    args = (MEDIA / "h265_video.mp4", "--model", published(family), "--out", tmp_path / "a.jsonl", *given)
    code, err = call(capsys, *args)
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "a.jsonl").exists()


def test_released_positions_reach_the_layout(capsys, monkeypatch, published, tmp_path):
    given = []
    plain = salmonn2_plus.interleave_by_time

    def note(*args, **named):
        given.append(named["published_positions"])
        return plain(*args, **named)

    monkeypatch.setattr(salmonn2_plus, "interleave_by_time", note)
    args = (MEDIA / "jfk.flac", "--model", published("salmonn2-plus"), "--max-new-tokens", 1)
    for number, flags in enumerate([[], ["--published-positions"]]):
        assert call(capsys, *args, "--out", tmp_path / f"{number}.jsonl", *flags)[0] == 0
        assert set(given) == {bool(flags)}
        given.clear()
