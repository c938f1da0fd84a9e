"""Training of models that do not fit on one GPU: each process loads, trains and merges its part (strategy fsdp2)."""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

from salmonn import dist
from salmonn.caption.captioner import Captioner, publish_half
from salmonn.caption.processor import Processor
from salmonn.model.loading import load_config
from salmonn.model.lora import LoraConfig, attach_lora, save_adapter
from salmonn.model.sharding import build_empty, load_encoders, load_sharded, merge_files
from salmonn.train.checkpoint import Checkpoint, load_trained, require_free_space
from salmonn.train.run_folder import RunConfig, report_rounding


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
) -> Path:
    """Do what `merge_checkpoint` does, with the same arguments and result, without the whole model in any process.

    Raises:
        ValueError: the disk has too little free space for the model.
    """
    gc.collect()
    network, half = build_empty(base, config.placement), folder / "merged" / ".half"
    if dist.is_main():
        num_bytes = sum(parameter.nbytes for parameter in network.parameters())
        attach_lora(network, lora, seed=0)
        tensors = load_trained(network, checkpoint)  # which checks them, and copies nothing into empty weights
        trained = {name: tensors[f"model.{name}"] for name, one in network.named_parameters() if one.requires_grad}
        network.load_state_dict(trained, strict=False, assign=True)
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
        publish_half(half)
    dist.barrier()
    return folder / "merged"
