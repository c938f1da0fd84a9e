"""Run folders: claim one for a config, resume from its files, and merge what a stage has trained.

Every stage writes its results to a folder of the run. A file appears whole or not at all, so a restarted run uses what
exists and computes the rest. The settings that results were made with are compared in `run_steps.py`.
"""

import gc
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.config import MAY_CHANGE, write_config
from salmonn.files import read_records, write_json, write_records
from salmonn.model.loading import CONFIG_NAME, Placement
from salmonn.model.lora import LoraConfig, MergeRounding, attach_lora, merge_in_float32, save_adapter, scale_adapter
from salmonn.train.checkpoint import Checkpoint, checkpointed, load_trained, require_free_space
from salmonn.train.feature_cache import FeatureCacheConfig
from salmonn.train.parallel import StrategyName
from salmonn.train.run_log import ROUNDING_NAME
from salmonn.train.run_steps import Step, flat_settings, open_steps
from salmonn.train.trackers import TrackerName, require_tracker, start_tracker

log = logging.getLogger(__name__)
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings shared by all recipes.

    Args:
        out: folder for all results.
        model: folder or hub id of the model to start from.
        strategy: how training is distributed over processes; may change when a run is resumed.
        placement: device and data type of the weights.
        frames: values of the model's frame sampler to override in training, such as `min_frames`.
        reader: decoder of video frames, see `read_clip`.
        feature_cache: where the outputs of the frozen encoders are stored; may change when a run is resumed.
        seed: random seed.
        max_failures: number of clips that may be unreadable; they are listed in `left_out.jsonl` and left out.
        redo_from: step, such as round_2/pairs, from which a resumed run makes results again where their settings have
            changed; results of earlier steps are kept with the settings that they were made with.
        deterministic: on a GPU, use algorithms that give the same result each time, where PyTorch has them; slower.
        report_to: experiment tracker that gets the metrics besides TensorBoard; may change when a run is resumed.
        dry_run: print the memory that the run would need, and exit.
    """

    out: Path
    model: str
    strategy: StrategyName = field(default="ddp", metadata=MAY_CHANGE)
    placement: Placement = field(default_factory=lambda: Placement(dtype="float32", attention="sdpa"))
    frames: dict[str, int | float] | None = None
    reader: str = "pyav"
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig, metadata=MAY_CHANGE)
    seed: int = 0
    max_failures: int = field(default=0, metadata=MAY_CHANGE)
    redo_from: str | None = field(default=None, metadata=MAY_CHANGE)
    deterministic: bool = field(default=False, metadata=MAY_CHANGE)
    report_to: TrackerName | None = field(default=None, metadata=MAY_CHANGE)
    dry_run: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        self.placement.require_trainable()
        if self.max_failures < 0:
            raise ValueError(f"max_failures must be at least 0, got {self.max_failures}")
        if self.report_to:
            require_tracker(self.report_to)

    def load_model(self, path: Path | str) -> Captioner:
        """Load a model with this run's placement and frame sampler."""
        return Captioner.load(path, placement=self.placement, frames=self.frames, reader=self.reader)


def open_run(config: RunConfig, steps: Sequence[Step], *, name: str) -> None:
    """Open a run's folder for a config, and delete the temporary files of a killed process.

    Args:
        config: configuration of the run; written to `<name>.yaml`.
        steps: all steps of the run, see `salmonn.train.run_steps`.
        name: name of the recipe.

    Raises:
        ValueError: the folder holds results of other settings, or a machine of this run does not see the folder.
    """
    folder = config.out
    if dist.is_main():
        open_steps(folder, steps, redo_from=config.redo_from)
        write_config(folder, config, name=name)
        if config.report_to:
            start_tracker(config.report_to, folder, flat_settings(config))
        # Other runs may have their folders inside this one, so only this run's stages are searched.
        stages = (path for name in ("sft", "round_*", "rebirth") for path in folder.glob(name))
        temporary = {*folder.glob(".*.tmp"), *(path for stage in stages for path in stage.rglob(".*.tmp"))}
        for path in sorted(temporary):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    dist.barrier()
    if not (folder / f"{name}.yaml").is_file():
        raise ValueError(
            f"process {dist.rank()} does not see {folder.resolve()}, which process 0 writes to; all machines of a run "
            "must share that folder"
        )


def is_missing(path: Path) -> bool:
    """Return whether a file does not exist, on all ranks; only rank 0 looks, since NFS caches that a file is absent."""
    return dist.gather([dist.is_main() and not path.is_file()])[0]


def is_complete(folder: Path) -> bool:
    """Return whether a stage has written its merged model; deletes checkpoints left by a kill just after that."""
    if is_missing(folder / "merged" / CONFIG_NAME):
        return False
    with checkpointed(folder):
        return True


def load_or_create(path: Path, record_type: type[Record], create: Callable[[], Sequence[Record]]) -> list[Record]:
    """Read the records of a stage, or create and write them if the file is missing."""
    if is_missing(path):
        records = create()
        if dist.is_main():
            write_records(path, records)
        dist.barrier()
    return read_records(path, record_type)


def merge_checkpoint(
    checkpoint: Checkpoint,
    *,
    base: Path | str,
    lora: LoraConfig,
    config: RunConfig,
    folder: Path,
    earlier: Sequence[Path] = (),
    weight: float = 1.0,
) -> Path:
    """Merge a trained adapter, and the adapters of earlier rounds, into the model that they start from, and write both.

    The base is loaded again, because training strategies take a network apart. The caller must have deleted its own
    network: a GPU may hold only one. The sum is rounded once (`merge_in_float32`); how much of the adapter's update
    remains in 16-bit weights goes to `rounding.json`.

    Args:
        checkpoint: the stage's last checkpoint, with the adapter.
        base: folder or hub id of the model that the first adapter was trained on.
        lora: configuration of the adapter.
        config: placement and frame sampler.
        folder: folder of the stage, which gets `adapter/` and `merged/`.
        earlier: folders of the adapters that were merged before, in their order.
        weight: factor of the adapter's update; the saved adapter contains it.

    Returns:
        Folder of the merged model.

    Raises:
        ValueError: the disk has too little free space for the model.
    """
    gc.collect()  # a network that was wrapped for training is part of reference cycles
    if dist.is_main():
        captioner = config.load_model(base)
        attach_lora(captioner.network, lora, seed=0)
        load_trained(captioner.network, checkpoint)
        scale_adapter(captioner.network, weight)
        save_adapter(captioner.network, folder / "adapter")
        captioner.network.lm = captioner.network.lm.unload()
        rounding = merge_in_float32(captioner.network, [*earlier, folder / "adapter"])
        report_rounding(rounding, captioner.network.dtype, folder=folder)
        write_model(captioner, folder / "merged")
    dist.barrier()
    return folder / "merged"


def report_rounding(rounding: MergeRounding, dtype: torch.dtype, *, folder: Path) -> None:
    """Log and write how much of an update remains in merged weights; in float32 it is all."""
    if dtype == torch.float32:
        return
    log.info(
        "%s: rounding to %s keeps %.0f %% of the update, with an error of %.0f %% of its norm",
        folder.name,
        str(dtype).removeprefix("torch."),
        100 * rounding.kept,
        100 * rounding.error,
    )
    write_json(folder / ROUNDING_NAME, asdict(rounding))


def save_model(captioner: Captioner, folder: Path) -> None:
    """Write a model; rank 0 writes, and all ranks wait for it.

    Raises:
        ValueError: the disk has too little free space.
    """
    if dist.is_main():
        write_model(captioner, folder)
    dist.barrier()


def write_model(captioner: Captioner, folder: Path) -> None:
    """Write a model; only rank 0 calls it.

    Raises:
        ValueError: the disk has too little free space.
    """
    require_free_space(folder.parent, num_bytes(captioner), what=f"the model {folder}")
    captioner.save(folder)


def num_bytes(captioner: Captioner) -> int:
    """Return the size of a model's weights."""
    return sum(parameter.nbytes for parameter in captioner.network.parameters())
