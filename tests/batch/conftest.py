"""The files of a run, videos, the command that captions them, and servers of remote files."""

import os
from pathlib import Path

import av
import fsspec
import pytest

from salmonn.batch import remote
from salmonn.batch.ledger_files import LedgerFiles
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.model.loading import Placement
from tests.batch.stores import FileServer, HubServer, start_s3

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def files(tmp_path):
    """Names of the files of a run without shards."""
    return LedgerFiles(tmp_path / "captions.jsonl")


@pytest.fixture(scope="session")
def short_videos(videos, tmp_path_factory) -> list[Path]:
    """Paths of the first 2 seconds of the five clips: their packets are copied."""
    folder = tmp_path_factory.mktemp("short")
    for video in videos:
        with av.open(str(video)) as whole, av.open(str(folder / video.name), "w") as part:
            streams = {stream.index: part.add_stream_from_template(stream) for stream in whole.streams}
            for packet in whole.demux():
                if packet.dts is not None and packet.pts * packet.time_base < 2:
                    packet.stream = streams[packet.stream.index]
                    part.mux(packet)
    return [folder / video.name for video in videos]


@pytest.fixture
def folder(short_videos, tmp_path):
    """Three short clips, each under two names."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for number, video in enumerate(short_videos[:3]):
        os.link(video, folder / f"{number}.mp4")
        (folder / "more" / f"{number}.mp4").write_bytes(video.read_bytes())
    return folder


def reuse(model: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands in this process use a loaded model; with other options, or from another folder, they load one."""
    load, defaults = Captioner.load, dict(placement=Placement(), adapter=None, published_positions=False, reader="pyav")

    def load_or_reuse(path: Path | str, **options: object) -> Captioner:
        return model if Path(path) == Path(model.name) and options == defaults else load(path, **options)

    monkeypatch.setattr(Captioner, "load", load_or_reuse)


@pytest.fixture(scope="session")
def toy() -> Captioner:
    """The shipped model; tests do not change it."""
    return Captioner.load(SHIPPED_MODEL)


@pytest.fixture
def caption(call, random_model, loaded_model, tmp_path, monkeypatch):
    """Run the command and return exit code and stderr.

    The model is loaded once for all tests, and videos are read in this process, unless the test says otherwise.
    """
    reuse(loaded_model, monkeypatch)

    def caption(*args: object, out: str = "captions.jsonl") -> tuple[int, str]:
        model = ("--model", random_model, "--max-new-tokens", 6, "--workers", 0)
        code, _, err = call("caption", *model, *args, "--out", tmp_path / out)
        return code, err

    caption.model = ("--model", random_model, "--max-new-tokens", 6)
    return caption


@pytest.fixture(scope="session")
def s3_url():
    server, url = start_s3()
    yield url
    server.stop()


@pytest.fixture
def bucket(s3_url, monkeypatch):
    """A file system with an empty bucket named `bucket`."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3_url, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    remote.filesystem.cache_clear()
    store = remote.filesystem("s3")
    store.mkdir("bucket")
    yield store
    monkeypatch.undo()
    remote.filesystem.cache_clear()
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=s3_url)
    try:
        remote.filesystem("s3").rm("bucket", recursive=True)
    finally:
        for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL"):
            del os.environ[name]
        remote.filesystem.cache_clear()


@pytest.fixture
def web():
    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def hub(monkeypatch):
    server = HubServer()
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": "hf_test"})
    remote.filesystem.cache_clear()
    yield server
    server.close()
    remote.filesystem.cache_clear()
