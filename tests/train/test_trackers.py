"""Experiment trackers, each with its real package in its offline mode."""

import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from salmonn.score.metrics import Rates
from salmonn.train import trackers
from salmonn.train.run_folder import RunConfig
from salmonn.train.run_log import RunSummary, StepLog, log_summary
from tests.limits import wait_until

RATES = Rates(0.5, 0.1, 0.6, 0.02, 0.7)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Keep the packages from the network, and their files in a temporary folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield
    trackers.stop_tracker()


def train(name: str, folder: Path, *, first_step: int) -> str:
    """Write what a run of two steps from `first_step` on writes; returns the id of the tracked run."""
    trackers.start_tracker(name, folder, {"seed": 0, "fit.steps": 2})
    steps = StepLog(folder / "round_1", first_step=first_step)
    for step in (first_step, first_step + 1):
        steps(step, {"loss": 0.5 - step / 8})
    steps.close()
    log_summary(folder, RunSummary(RATES, [RATES]))
    run_id = json.loads((folder / trackers.TRACKER_NAME).read_text())["run_id"]
    trackers.stop_tracker()
    return run_id


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "round_1").mkdir(parents=True)
    return tmp_path / "run"


def test_trackio(folder, tmp_path):
    pytest.importorskip("trackio")
    run_id = train("trackio", folder, first_step=0)
    assert train("trackio", folder, first_step=2) == run_id
    (path,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in rows} == {run_id}
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, one["round_1/loss"]) for step, one in values if "round_1/loss" in one] == [
        (0, 0.5), (1, 0.375), (2, 0.25), (3, 0.125),
    ]  # fmt: skip
    assert [(step, one["heldout/Total"]) for step, one in values if "heldout/Total" in one] == [(1, 0.6)] * 2


def test_mlflow(folder):
    client_module = pytest.importorskip("mlflow.tracking")
    run_id = train("mlflow", folder, first_step=0)
    assert train("mlflow", folder, first_step=2) == run_id
    client = client_module.MlflowClient()
    history = client.get_metric_history(run_id, "round_1/loss")
    assert sorted((one.step, one.value) for one in history) == [(0, 0.5), (1, 0.375), (2, 0.25), (3, 0.125)]
    assert client.get_run(run_id).data.params == {"seed": "0", "fit.steps": "2"}
    assert client.get_run(run_id).info.status == "FINISHED"
    trackers.start_tracker("mlflow", folder, {})
    trackers.report(folder.parent / "another_run", {"loss": 1.0}, step=0)  # ignored
    trackers.stop_tracker(failed=True)
    assert client.get_run(run_id).info.status == "FAILED" and "train/loss" not in client.get_run(run_id).data.metrics


def read_log(path: Path) -> bytes:
    """Return the records of a wandb file, a log of LevelDB: blocks of 32 KiB with chunks that have 7-byte headers."""
    data, records = path.read_bytes(), b""
    for start in range(0, len(data), 32768):
        block = data[start : start + 32768]
        place = 0 if start else 7  # of the file's own header
        while place + 7 <= len(block):
            size = int.from_bytes(block[place + 4 : place + 6], "little")
            records += block[place + 7 : place + 7 + size]
            place += 7 + size
    return records


def test_wandb(folder):
    pytest.importorskip("wandb")
    run_id = train("wandb", folder, first_step=0)
    (path,) = folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    expected = (b"round_1/loss", b"round_1/step", b"heldout/Total", b"fit.steps")
    # Another process writes the file.
    wait_until(lambda: all(text in read_log(path) for text in expected))
    assert train("wandb", folder, first_step=2) == run_id


def test_a_tracker_that_fails_does_not_stop_the_run(folder, monkeypatch, caplog):
    class Broken:
        run_id = "1"

        def __init__(self, *_):
            pass

        def log(self, *_, **__):
            raise OSError("no route to host")

        def close(self, *, failed):
            raise OSError("still no route")

    monkeypatch.setitem(trackers._TRACKERS, "wandb", Broken)
    with caplog.at_level(logging.WARNING):
        train("wandb", folder, first_step=0)
    assert len((folder / "round_1" / "steps.jsonl").read_text().splitlines()) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"the experiment tracker failed (no route to host); further metrics are written to {folder} only",
        "the experiment tracker could not send its last metrics: still no route",
    ]


def test_a_missing_package_is_reported_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to mlflow needs a package .* pip install mlflow-skinny"):
        RunConfig(out=tmp_path, model="m", report_to="mlflow")
