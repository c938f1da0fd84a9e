"""Experiment trackers besides TensorBoard: Trackio, Weights & Biases and MLflow.

A run's own files have all metrics whatever happens to a tracker, so a server that cannot be reached is reported once
and does not stop the training. Only rank 0 reports. Servers, keys and offline modes are configured as each package
documents it, by its environment variables.
"""

import atexit
import importlib.util
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from uuid import uuid4

from salmonn.files import read_json, write_json

log = logging.getLogger(__name__)
TrackerName = Literal["trackio", "wandb", "mlflow"]
PROJECT = "salmonn"
TRACKER_NAME = "tracker.json"  # name and id of the tracked run, which a resumed run continues
PARAMS_PER_REQUEST = 100  # MLflow's limit


class Tracker(Protocol):
    """A run of an experiment tracker."""

    run_id: str

    def log(self, stage: str, metrics: Mapping[str, float], *, step: int) -> None:
        """Report the metrics of a step of a stage, such as round_1."""
        ...

    def close(self, *, failed: bool) -> None:
        """Send the remaining metrics and mark the run as ended or failed."""
        ...


class _Trackio:
    def __init__(self, name: str, run_id: str | None, settings: Mapping[str, Any], folder: Path) -> None:
        import trackio  # noqa: PLC0415 - an extra

        self.run_id = run_id or f"{name}-{uuid4().hex[:6]}"  # Trackio distinguishes runs by name
        self._run = trackio.init(project=PROJECT, name=self.run_id, config=dict(settings), resume="allow")

    def log(self, stage: str, metrics: Mapping[str, float], *, step: int) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()  # Trackio keeps no state of a run


class _Wandb:
    def __init__(self, name: str, run_id: str | None, settings: Mapping[str, Any], folder: Path) -> None:
        import wandb  # noqa: PLC0415 - an extra

        self.run_id = run_id or uuid4().hex
        self._stages = set[str]()
        self._run = wandb.init(
            project=PROJECT, name=name, id=self.run_id, config=dict(settings), resume="allow", dir=str(folder)
        )

    def log(self, stage: str, metrics: Mapping[str, float], *, step: int) -> None:
        if stage not in self._stages:  # each stage begins at step 0, and the steps of a wandb run may not fall
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/{name}": value for name, value in {**metrics, "step": step}.items()})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, name: str, run_id: str | None, settings: Mapping[str, Any], folder: Path) -> None:
        from mlflow.entities import Metric, Param  # noqa: PLC0415 - an extra
        from mlflow.tracking import MlflowClient  # noqa: PLC0415

        self._client, self._metric = MlflowClient(), Metric
        if run_id is None:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            run_id = self._client.create_run(experiment, run_name=name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in settings.items()]
            for start in range(0, len(params), PARAMS_PER_REQUEST):
                self._client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
        self.run_id = run_id

    def log(self, stage: str, metrics: Mapping[str, float], *, step: int) -> None:
        now = round(1000 * time.time())
        values = [self._metric(f"{stage}/{name}", value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values, synchronous=False)  # a slow server delays no step

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


_TRACKERS: Mapping[str, Any] = {"trackio": _Trackio, "wandb": _Wandb, "mlflow": _Mlflow}
_active: Tracker | None = None  # the packages keep one run per process, too
_folder = Path()


def require_tracker(name: TrackerName) -> None:
    """Raise a ValueError if a tracker's package is not installed."""
    assert name in get_args(TrackerName)
    if importlib.util.find_spec(name) is None:
        package = "mlflow-skinny" if name == "mlflow" else name
        raise ValueError(f"report_to {name} needs a package that is not installed: pip install {package}")


def start_tracker(name: TrackerName, folder: Path, settings: Mapping[str, Any]) -> None:
    """Start the run of a tracker for this process, or continue the one that an earlier process has started.

    Args:
        name: tracker.
        folder: folder of the training run; its name is the name of the tracked run.
        settings: configuration to show.
    """
    global _active, _folder
    if _active is not None:
        return
    path, run_id = folder / TRACKER_NAME, None
    if path.is_file() and (before := read_json(path)).get("tracker") == name:
        run_id = before["run_id"]
    try:
        tracker: Tracker = _TRACKERS[name](folder.resolve().name, run_id, settings, folder)
    except Exception as error:  # noqa: BLE001 - each package has its own, for servers, keys and files
        log.warning("%s cannot be used (%s); metrics are written to %s only", name, error, folder)
        return
    write_json(path, {"tracker": name, "run_id": tracker.run_id})
    _active, _folder = tracker, folder.resolve()
    atexit.register(stop_tracker, failed=True)  # a run that ends as it should has stopped it before


def report(folder: Path, metrics: Mapping[str, float], *, step: int) -> None:
    """Send metrics to the tracker, if there is one.

    Args:
        folder: folder of the stage that they belong to, within that of the run.
        metrics: name -> value.
        step: step of the stage.
    """
    if _active is None or not folder.resolve().is_relative_to(_folder):  # of another run in this process
        return
    stage = folder.resolve().relative_to(_folder).as_posix()
    try:
        _active.log("train" if stage == "." else stage, metrics, step=step)
    except Exception as error:  # noqa: BLE001
        log.warning("the experiment tracker failed (%s); further metrics are written to %s only", error, _folder)
        stop_tracker(failed=True)


def stop_tracker(*, failed: bool = False) -> None:
    """End the run of the tracker, if there is one.

    Args:
        failed: whether the training has stopped before its end.
    """
    global _active
    tracker, _active = _active, None
    if tracker:
        try:
            tracker.close(failed=failed)
        except Exception as error:  # noqa: BLE001
            log.warning("the experiment tracker could not send its last metrics: %s", error)
