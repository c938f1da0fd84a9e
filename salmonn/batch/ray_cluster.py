"""Caption on a Ray cluster: actors caption blocks of videos, and the driver lists, skips and writes.

    salmonn caption clips/ --out captions.jsonl --engine ray --ray-actors 16

The videos and the model's folder must have the same paths on every machine. There is a single writer, so nothing is
written twice; the block of an actor that died is captioned again by its successor, or by the next run.
"""

import json
import logging
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from salmonn.batch.discovery import VideoFile
from salmonn.batch.fetch import FetchConfig, Fetcher
from salmonn.batch.job import IndexedVideo, JobConfig, VideoResult, caption_videos
from salmonn.batch.ledger_files import LedgerError
from salmonn.caption.loader import ClipReader, default_num_workers
from salmonn.caption.worker import WorkerLimits
from salmonn.files import parse_record
from salmonn.records import Caption, Failure

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner

LoadModel = Callable[[], "Captioner"]

ROUND_VIDEOS = 200_000  # paths that the driver holds at a time; actors are restarted for the next round
BLOCK_VIDEOS = 64  # videos that an actor takes at a time, and that are captioned again if it dies
MAX_RESTARTS = 8  # an actor that dies more often does not die by accident


@dataclass(frozen=True)
class RayConfig:
    """How work is distributed over a Ray cluster.

    Args:
        actors: number of models; None: one for each GPU, or for each two CPUs.
        workers: decoding processes per actor; None: up to 8.
        limits: limits for reading one file.
        fetch: how remote files are fetched.
    """

    actors: int | None = None
    workers: int | None = None
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    fetch: FetchConfig = field(default_factory=FetchConfig)

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"--ray-actors must be at least 1, got {self.actors}")


class _CaptionActor:
    """A model with its clip reader in a process of the cluster."""

    def __init__(self, load: LoadModel, config: JobConfig, ray_config: RayConfig) -> None:
        workers = default_num_workers(BLOCK_VIDEOS) if ray_config.workers is None else ray_config.workers
        self._fetcher = Fetcher(ray_config.fetch)
        share = self._fetcher.bucket_share
        self._reader = ClipReader(workers=workers, limits=ray_config.limits, bucket_share=share)
        self._captioner = load()
        self._config = config

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        videos = [(row["index"], VideoFile(**row["video"])) for row in map(json.loads, block["row"])]
        results = caption_videos(
            self._captioner, videos, config=self._config, reader=self._reader, fetcher=self._fetcher
        )
        return {"row": [json.dumps(asdict(result)) for result in results]}


def caption_on_cluster(
    videos: Iterator[IndexedVideo], *, load: LoadModel, config: JobConfig, ray_config: RayConfig
) -> Generator[VideoResult]:
    """Caption videos like `caption_videos`, on the cluster that Ray finds (RAY_ADDRESS) or on this machine alone.

    Args:
        videos: any number of videos.
        load: loads a model in each actor; the driver loads none.
        config: how videos are captioned.
        ray_config: how work is distributed.

    Raises:
        LedgerError: an actor died repeatedly.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'salmonn[cluster]'") from error
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        while block := list(islice(videos, ROUND_VIDEOS)):
            yield from _caption_round(block, load=load, config=config, ray_config=ray_config)
    except ray.exceptions.RayError as error:
        raise LedgerError(
            f"the actors of the cluster died repeatedly ({str(error).strip().splitlines()[-1]}). Finished work is "
            "saved; run the same command to resume"
        ) from error
    finally:
        ray.shutdown()


def _caption_round(
    block: list[IndexedVideo], *, load: LoadModel, config: JobConfig, ray_config: RayConfig
) -> Generator[VideoResult]:
    import pyarrow  # noqa: PLC0415 - comes with Ray
    import ray.data  # noqa: PLC0415 - an extra

    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    rows = [json.dumps({"index": index, "video": asdict(video)}) for index, video in block]
    tables = [pyarrow.table({"row": rows[start : start + BLOCK_VIDEOS]}) for start in range(0, len(rows), BLOCK_VIDEOS)]
    actors = min(ray_config.actors or num_gpus or max(1, int(resources["CPU"]) // 2), len(tables))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the run has a progress bar of its own
    ray.data.DataContext.get_current().enable_progress_bars = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args`")  # they limit how often an actor may die
        results = ray.data.from_arrow(tables).map_batches(
            _CaptionActor,
            fn_constructor_kwargs={"load": load, "config": config, "ray_config": ray_config},
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=actors),
            # Ray Data needs some of the CPUs itself; without any left it waits forever.
            num_cpus=None if num_gpus else 0.5,
            num_gpus=1 if num_gpus else None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
    for row in results.iter_rows():
        values = json.loads(row["row"])
        parts: list[Caption | Failure] = [
            parse_record(one, Failure) if "reason" in one else parse_record(one, Caption) for one in values["results"]
        ]
        yield VideoResult(values["index"], VideoFile(**values["video"]), tuple(parts))
