"""Training of models that do not fit on one GPU: each process loads, trains and merges its part (strategy fsdp2)."""

import gc
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from salmonn import dist
from salmonn.caption.captioner import Captioner, publish_half
from salmonn.caption.processor import Processor
from salmonn.files import read_json
from salmonn.model.loading import load_config
from salmonn.model.lora import LoraConfig, attach_lora, save_adapter, scale_adapter
from salmonn.model.sharding import build_empty, load_encoders, load_sharded, merge_files
from salmonn.model.weight_files import INDEX_NAME, WEIGHTS_NAME
from salmonn.system import flush
from salmonn.train.checkpoint import Checkpoint, load_trained, require_free_space
from salmonn.train.run_folder import RunConfig, report_rounding

if TYPE_CHECKING:
    from salmonn.train.mrdpo import MrDpoConfig

_VISIBLE_SECONDS, _POLL_SECONDS = 60.0, 0.5  # for files of other machines


def check_sharded(config: "MrDpoConfig") -> None:
    """Check the settings of a run whose model does not fit on one GPU.

    With `load_sharded`, each process loads a part of the weights. A server samples all captions, those of held-out
    clips too, and questions are not evaluated.

    Raises:
        ValueError: some setting needs the whole model.
    """
    needed = {
        "strategy": (config.strategy, "fsdp2"),
        "kl.num_clips": (config.kl.num_clips, 0),
        "rebirth": (config.rebirth and "set", None),
        "reference_policy": (config.reference_policy, "round_start"),
    }
    for name, (value, required) in needed.items():
        if value != required:
            text = "null" if required is None else required
            raise ValueError(f"load_sharded needs {name} {text}, got {value}; pass --{name.replace('_', '-')} {text}")
    if config.sampler.server is None:
        raise ValueError("load_sharded needs a server that samples captions; pass its URL as --sampler.server")
    if config.reward.kind == "model":
        raise ValueError(
            "load_sharded trains no reward model, whose features need the whole captioner; use --reward.kind judge"
        )


def load_encoding_model(path: Path | str, config: RunConfig) -> Captioner:
    """Load the encoders of a model on each process; the captioner encodes clips, and nothing else."""
    sizes = load_config(path, frames=config.frames)
    processor = Processor.load(path, config=sizes, reader=config.reader)
    return Captioner(load_encoders(path, placement=config.placement), processor, name=str(path))


def load_policy(captioner: Captioner, path: Path | str, config: RunConfig, *, lora: LoraConfig, seed: int) -> None:
    """Replace a captioner's network by the shards of a model with a fresh adapter."""
    del captioner.network
    gc.collect()
    captioner.network = load_sharded(path, placement=config.placement, lora=lora, seed=seed)


def merge_sharded(
    checkpoint: Checkpoint,
    *,
    base: Path | str,
    lora: LoraConfig,
    config: RunConfig,
    folder: Path,
    earlier: Sequence[Path] = (),
    weight: float = 1.0,
) -> Path:
    """Do what `merge_checkpoint` does, with the same arguments and result, without the whole model in any process.

    Raises:
        ValueError: the disk has too little free space for the model, or a file of another process does not appear.
    """
    gc.collect()
    network, half = build_empty(base, config.placement), folder / "merged" / ".half"
    if dist.is_main():
        num_bytes = sum(parameter.nbytes for parameter in network.parameters())
        attach_lora(network, lora, seed=0)
        tensors = load_trained(network, checkpoint)  # which checks them, and copies nothing into empty weights
        trained = {name: tensors[f"model.{name}"] for name, one in network.named_parameters() if one.requires_grad}
        network.load_state_dict(trained, strict=False, assign=True)
        scale_adapter(network, weight)
        save_adapter(network, folder / "adapter")
        shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
        half.mkdir(parents=True)
        require_free_space(half, num_bytes, what=f"the model {folder / 'merged'}")
    dist.barrier()
    rounding = merge_files(base, [*earlier, folder / "adapter"], half, placement=config.placement)
    dist.barrier()
    if dist.is_main():
        report_rounding(rounding, network.dtype, folder=folder)
        Processor.load(base, config=load_config(base)).save(half)
        wait_for_weights(half)
        for file in half.iterdir():
            flush(file)
        publish_half(half)
    dist.barrier()
    return folder / "merged"


def wait_for_weights(folder: Path) -> None:
    """Wait until all files of a model's weights are visible: NFS shows those of other machines late.

    Raises:
        ValueError: some are still missing after `_VISIBLE_SECONDS`.
    """
    index = folder / INDEX_NAME
    expected = set(read_json(index)["weight_map"].values()) if index.is_file() else {WEIGHTS_NAME}
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while missing := expected - {file.name for file in folder.iterdir()}:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{folder} lacks {', '.join(sorted(missing)[:8])}, which other processes should have written: use a "
                "folder on a file system that all machines share, and run again"
            )
        time.sleep(_POLL_SECONDS)
