"""Captioning on Ray with two actors on this machine; one is killed midway, and each video is captioned once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from salmonn.batch import ray_cluster
from salmonn.files import read_records
from salmonn.records import Caption
from tests.limits import RUN_SECONDS

pytest.importorskip("ray")

# Blocks of three videos, each slow enough to be killed midway.
RUN = """
import sys, time
from salmonn.batch import ray_cluster as cluster
from salmonn.cli import caption, main

load = caption.load_captioner

def load_slowly(values):
    captioner = load(values)
    batches = captioner.caption_batches

    def slow_batches(*args, **options):
        for batch in batches(*args, **options):
            time.sleep(0.3)
            yield batch

    captioner.caption_batches = slow_batches
    return captioner

cluster.BLOCK_VIDEOS = 3
caption.load_captioner = load_slowly
main(sys.argv[1:])
"""


@pytest.fixture
def folder(videos, tmp_path):
    """Thirty files, one of them broken."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(29):
        os.link(videos[number % 5], folder / f"{number:02d}.mp4")
    (folder / "29.mp4").write_bytes(videos[0].read_bytes()[:2000])
    return folder


def actors_of(driver: int) -> list[psutil.Process]:
    """Return the actor processes of a driver."""
    children = psutil.Process(driver).children(recursive=True)
    return [child for child in children if "ray::MapWorker" in " ".join(child.cmdline())]


class FakeDataset:
    """The part of ray.data that is needed, in this process."""

    def __init__(self, tables):
        self.tables = tables

    def map_batches(self, actor, *, fn_constructor_kwargs, **_):
        self.actor = actor(**fn_constructor_kwargs)
        return self

    def iter_rows(self):
        for table in self.tables:
            yield from ({"row": row} for row in self.actor(table.to_pydict())["row"])


@pytest.fixture
def fake_ray(monkeypatch):
    """Replace Ray by a cluster of one actor in this process."""
    ray, data = ModuleType("ray"), ModuleType("ray.data")
    ray.init, ray.shutdown, ray.cluster_resources = lambda **_: None, lambda: None, lambda: {"CPU": 2.0}
    ray.exceptions, ray.data = SimpleNamespace(RayError=ZeroDivisionError), data
    data.from_arrow, data.ActorPoolStrategy = FakeDataset, lambda **_: None
    data.DataContext = SimpleNamespace(get_current=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setattr(ray_cluster, "BLOCK_VIDEOS", 3)


def test_blocks_of_an_actor_are_captioned_as_without_ray(folder, random_model, tmp_path, call, fake_ray):
    """Seven files are three blocks."""
    for path in sorted(folder.iterdir())[:23]:
        path.unlink()
    results = []
    for name, more in (("ray", ("--engine", "ray", "--ray-actors", 1)), ("local", ())):
        out = tmp_path / f"{name}.jsonl"
        args = ("caption", folder, "--out", out, "--model", random_model, "--max-new-tokens", 4, "--workers", 0)
        code, _, err = call(*args, *more)
        assert code == 1 and "1 video failed" in err and "29.mp4" in err  # the broken file
        results.append({caption.video: caption for caption in read_records(out, Caption)})
    assert results[0] == results[1] and len(results[0]) == 6


@pytest.mark.slow
def test_an_actor_killed_midway(folder, random_model, tmp_path):
    out = tmp_path / "captions.jsonl"
    args = ["caption", folder, "--out", out, "--model", random_model, "--max-new-tokens", 4, "--workers", 1]
    command = [sys.executable, "-c", RUN, *map(str, args), "--engine", "ray", "--ray-actors", "2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": "/tmp"}
    )
    killed = None
    while process.poll() is None and killed is None:
        if out.exists() and len(out.read_bytes().splitlines()) >= 3 and len(found := actors_of(process.pid)) == 2:
            killed = found[0].pid
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.02)
    _, err = process.communicate(timeout=RUN_SECONDS)
    assert killed is not None, err
    assert process.returncode == 1, err  # the broken file
    captions = read_records(out, Caption)
    assert sorted(Path(caption.video).name for caption in captions) == [f"{number:02d}.mp4" for number in range(29)]
    assert "1 video failed" in err and "29.mp4" in err
    assert {caption.model for caption in captions} == {str(random_model)}
    assert json.loads((tmp_path / "captions.job.json").read_text())["max_new_tokens"] == 4
