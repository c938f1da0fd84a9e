"""The edges of a stage: the run's folder, what of a stage is there already, and what it leaves to the next."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.config import claim_folder
from salmonn.model.loading import CONFIG_NAME, Placement
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter, save_adapter
from salmonn.records import Caption, read_records, write_records
from salmonn.train.checkpoint import Checkpoint, checkpointed, load_trained, require_free_space
from salmonn.train.evaluate import clear_parts

Record = TypeVar("Record")


def open_run(folder: Path, config: Any, *, name: str) -> None:
    """Claim a run's folder for a config, and clear what a killed process left half written.

    Raises:
        ValueError: the folder holds results of another config, or a machine of this run does not see it.
    """
    if dist.is_main():
        claim_folder(folder, config, name=name)
        # Other runs may have their folders in this one: only what is a stage's own is looked at.
        stages = (path for name in ("sft", "round_*", "rebirth") for path in folder.glob(name))
        for half in sorted({*folder.glob(".*.tmp"), *(path for stage in stages for path in stage.rglob(".*.tmp"))}):
            if half.is_dir():
                shutil.rmtree(half)
            else:
                half.unlink(missing_ok=True)
    dist.barrier()
    if not (folder / f"{name}.yaml").is_file():
        raise ValueError(
            f"process {dist.rank()} does not see {folder.resolve()}, which process 0 writes to: all machines of a run "
            "must share that folder"
        )


def is_missing(path: Path) -> bool:
    """Whether a file is still to be made. Rank 0 alone looks: others' disks would remember that it was not there."""
    return dist.gather([dist.is_main() and not path.is_file()])[0]


def load_or_create(path: Path, record_type: type[Record], make: Callable[[], Sequence[Record]]) -> list[Record]:
    """Records of a stage: read where a run before made them, else made and written."""
    if is_missing(path):
        records = make()
        if dist.is_main():
            write_records(path, records)
        dist.barrier()
    return read_records(path, record_type)


def load_or_create_captions(folder: Path, draw: Callable[..., list[Caption]]) -> list[Caption]:
    """Captions of a stage, likewise in captions.jsonl; `draw` takes the folder that it may keep its parts in."""
    parts = folder / "captions.parts"
    captions = load_or_create(folder / "captions.jsonl", Caption, lambda: draw(parts=parts))
    clear_parts(parts)
    return captions


def merge_trained(
    captioner: Captioner,
    folder: Path,
    done: Checkpoint,
    *,
    base: Path | str,
    lora: LoraConfig,
    placement: Placement,
    adapter: bool = False,
) -> None:
    """Put what a stage has learnt on the weights that it started from, read anew, and write the merged model.

    Args:
        captioner: whose network the training has used up; it becomes the merged model, and goes by its folder.
        folder: of the stage: `merged/` is written there.
        done: the stage's last checkpoint.
        base: model that the adapter was trained on.
        lora: the adapter.
        placement: of the weights.
        adapter: whether `adapter/` is written too.

    Raises:
        ValueError: the disk has no room for the model.
    """
    captioner.reload(base, placement=placement)
    attach_lora(captioner.network, lora, seed=0)
    load_trained(captioner.network, done)
    if adapter and dist.is_main():
        save_adapter(captioner.network, folder / "adapter")
    merge_adapter(captioner.network)
    save_merged(captioner, folder / "merged")


def save_merged(captioner: Captioner, folder: Path) -> None:
    """Write a model, which goes by its folder from now on."""
    captioner.name = str(folder)
    if dist.is_main():
        require_free_space(folder.parent, num_bytes(captioner), what=f"the model {folder}")
        captioner.save(folder)
    dist.barrier()


def num_bytes(captioner: Captioner) -> int:
    """Size of a model's weights on disk."""
    return sum(parameter.nbytes for parameter in captioner.network.parameters())


def is_complete(folder: Path) -> bool:
    """Whether a stage has come to its end; checkpoints that a kill just after it has left are then cleared."""
    if is_missing(folder / "merged" / CONFIG_NAME):
        return False
    with checkpointed(folder):
        return True
