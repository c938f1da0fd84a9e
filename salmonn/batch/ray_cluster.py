"""The same work on a Ray cluster: actors caption blocks of videos, the driver lists, passes over and writes.

    salmonn caption clips/ --out captions.jsonl --engine ray --ray-actors 16

The videos, and the model's folder, must be found under the same paths on every machine. There is one writer, so nothing
is written twice; a block whose actor died is done again by that actor's successor, or by the next run.
"""

import json
import logging
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from salmonn.batch.discovery import VideoFile
from salmonn.batch.job import IndexedVideo, JobConfig, VideoResult, caption_videos
from salmonn.batch.ledger_files import LedgerError
from salmonn.caption.captioner import Captioner
from salmonn.caption.loader import ClipReader, default_num_workers
from salmonn.caption.worker import WorkerLimits
from salmonn.records import Caption, Failure, parse_record

Load = Callable[[], Captioner]

ROUND_VIDEOS = 200_000  # whose paths the driver holds; actors begin anew for the next ones
BLOCK_VIDEOS = 64  # that an actor takes at a time, and that are done again where it dies
# An actor that dies more often has not met with an accident.
MOST_DEATHS = 8


@dataclass(frozen=True)
class RayConfig:
    """How the work is laid out.

    Args:
        actors: models at work; None: one for each GPU, or for each two CPUs.
        workers: processes that decode, for each actor; None: up to 8.
        limits: of reading one file.
    """

    actors: int | None = None
    workers: int | None = None
    limits: WorkerLimits = field(default_factory=WorkerLimits)

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"--ray-actors must be at least 1, got {self.actors}")


class _Actor:
    """A model and what reads ahead for it, in a process of the cluster."""

    def __init__(self, load: Load, task: JobConfig, cluster: RayConfig) -> None:
        workers = default_num_workers(BLOCK_VIDEOS) if cluster.workers is None else cluster.workers
        self._reader = ClipReader(workers=workers, limits=cluster.limits)
        self._captioner = load()
        self._task = task

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        videos = [(row["place"], VideoFile(**row["video"])) for row in map(json.loads, block["row"])]
        groups = caption_videos(self._captioner, videos, task=self._task, reader=self._reader)
        return {"row": [json.dumps(asdict(group)) for group in groups]}


def caption_on_cluster(
    videos: Iterator[IndexedVideo], *, load: Load, task: JobConfig, cluster: RayConfig
) -> Generator[VideoResult]:
    """Like `caption_videos`, on the cluster that Ray finds (RAY_ADDRESS), or on this machine alone.

    Args:
        videos: any number of them.
        load: gives each actor its model; the driver loads none.
        task: what is asked.
        cluster: how the work is laid out.

    Raises:
        LedgerError: an actor died again and again.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'salmonn[cluster]'") from error
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        while block := list(islice(videos, ROUND_VIDEOS)):
            yield from _caption_round(block, load=load, task=task, cluster=cluster)
    except ray.exceptions.RayError as error:
        raise LedgerError(
            f"the cluster's actors could not go on ({str(error).strip().splitlines()[-1]}): what was finished is kept, "
            "and the same command goes on from there"
        ) from error
    finally:
        ray.shutdown()


def _caption_round(
    block: list[IndexedVideo], *, load: Load, task: JobConfig, cluster: RayConfig
) -> Generator[VideoResult]:
    import pyarrow  # noqa: PLC0415 - comes with Ray
    import ray.data  # noqa: PLC0415 - an extra

    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    rows = [json.dumps({"place": place, "video": asdict(video)}) for place, video in block]
    tables = [pyarrow.table({"row": rows[start : start + BLOCK_VIDEOS]}) for start in range(0, len(rows), BLOCK_VIDEOS)]
    actors = min(cluster.actors or num_gpus or max(1, int(resources["CPU"]) // 2), len(tables))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # there is a bar of our own
    ray.data.DataContext.get_current().enable_progress_bars = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args`")  # which limit how often an actor may die
        results = ray.data.from_arrow(tables).map_batches(
            _Actor,
            fn_constructor_kwargs={"load": load, "task": task, "cluster": cluster},
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=actors),
            # Ray Data itself wants some of the CPUs: with none left over, it waits for ever.
            num_cpus=None if num_gpus else 0.5,
            num_gpus=1 if num_gpus else None,
            max_restarts=MOST_DEATHS,
            max_task_retries=MOST_DEATHS,
        )
    for row in results.iter_rows():
        yield _read_group(row["row"])


def _read_group(row: str) -> VideoResult:
    values = json.loads(row)
    results = tuple(map(_read_result, values["results"]))
    return VideoResult(values["place"], VideoFile(**values["video"]), results)


def _read_result(values: dict[str, Any]) -> Caption | Failure:
    return parse_record(values, Failure) if "reason" in values else parse_record(values, Caption)
