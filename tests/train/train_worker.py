"""Train with guided DPO on a random model under one strategy; test_parallel.py starts this script.

    train_worker.py STRATEGY MODEL CLIPS OUT float32|bfloat16 [nan|sharded|short]

With `nan`, the last process has a NaN loss in step 1. With `short`, there are two steps. With `sharded`, no process
loads the whole model; OUT/read_R.json has the bytes that rank R has read and holds. With bfloat16, the base weights and
the computation are in bfloat16 and layers are checkpointed; OUT/dtypes.json has the types that rank 0 has trained with.
Writes OUT/steps.jsonl, checkpoints/, adapter/ and merged/; resumes from OUT/checkpoints/.
"""

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.files import read_records, write_json
from salmonn.model.loading import Placement
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.weight_files import WeightFiles
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.records import Comparison, Reference
from salmonn.train.checkpoint import Checkpoint
from salmonn.train.data import CLIPS_NAME, ClipSet
from salmonn.train.encoding import cache_features
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.kl import KLProbe
from salmonn.train.loop import Callback, FitConfig, FitContext, autocast, fit
from salmonn.train.preference import PreferenceBatch, PreferenceBatches, PreferenceBatchLoss, PreferenceExample
from salmonn.train.reference_logps import compute_reference_logps
from salmonn.train.run_folder import RunConfig, merge_checkpoint
from salmonn.train.sharded import load_encoding_model, load_policy, merge_sharded

# No dropout: its masks differ between ranks, but losses must equal those of one process.
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
# All pairs in each step; with three pairs, ranks have different numbers of micro-batches.
FIT = FitConfig(
    steps=6, learning_rate=2e-3, warmup_ratio=0.2, batch_size=3, gradient_accumulation_steps=2, checkpoint_every=4
)


class NanReferences(PreferenceBatches):
    """Preference batches with NaN reference log-probabilities in step 1 on the last rank."""

    def micro_batches(self, step: int) -> list[PreferenceBatch]:
        batches = super().micro_batches(step)
        if step != 1 or dist.rank() + 1 < dist.world_size():
            return batches
        nan = float("nan")
        return [
            replace(batch, reference_logps={role: logps * nan for role, logps in batch.reference_logps.items()})
            for batch in batches
        ]


def train(
    captioner: Captioner,
    strategy: Any,
    clips: ClipSet,
    out: Path,
    *,
    config: FitConfig,
    batches_class: type[PreferenceBatches],
    load: Callable[[Captioner], None],
) -> Checkpoint:
    """Train on three pairs: the reference caption of each clip, and that of another clip."""
    references, prompt = clips.references, captioner.default_prompt()
    cache = open_feature_cache(FeatureCacheConfig(out / "features"), captioner)
    (clips,) = cache_features(captioner, clips, name="clips", cache=cache)
    examples = [
        PreferenceExample(
            Comparison(reference.video, prompt, reference.caption, other.caption, reference.caption, margin=0.5),
            clips.features_of(reference),
        )
        for reference, other in zip(references, references[1:] + references[:1], strict=True)
    ]
    load(captioner)
    network = captioner.network
    loss = make_loss(LossConfig())
    with autocast(config.precision):
        logps = compute_reference_logps(
            network, examples, captioner.processor, roles=loss.reference_roles, batch_size=config.micro_batch_size
        )
    batches = batches_class(
        examples,
        logps,
        captioner.processor,
        roles=loss.roles,
        batch_size=config.batch_size,
        seed=0,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    kl_probe = KLProbe(clips.head(1), captioner.processor, prompt=prompt)

    def measure(wrapped: nn.Module) -> dict[str, float]:
        with autocast(config.precision):
            return {"kl": kl_probe.kl_from_reference_policy(wrapped, network)}

    context = FitContext(strategy, out, strategy=strategy, callback=Callback(measure, every=5))
    return fit(network, batches, PreferenceBatchLoss(loss), config, context=context)


def count_bytes_read() -> list[int]:
    """Return a list that gets the bytes of each tensor that is read from the model's files."""
    counted: list[int] = []
    read = WeightFiles.read

    def count(self: WeightFiles, *args: Any) -> Tensor:
        value = read(self, *args)
        counted.append(value.nbytes)
        return value

    WeightFiles.read = count  # type: ignore[method-assign]
    return counted


def record_dtypes(network: nn.Module) -> dict[str, set[str]]:
    """Return a dict that gets the types of the weights and products of linear layers in training, and of autocast."""
    found: dict[str, set[str]] = defaultdict(set)

    def record(module: nn.Linear, inputs: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            kind = output.device.type
            found["weights"].add(str(module.weight.dtype))
            found["products"].add(str(output.dtype))
            found["autocast"].add(str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off")

    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(record)
    return found


def main(strategy: str, model: Path, root: Path, out: Path, precision: Any, *options: str) -> None:
    """Train and merge; the trained network must have been freed before merging."""
    dist.setup(threads=1)
    placement = Placement(dtype=precision, attention="sdpa")
    config = FIT
    if precision == "bfloat16":  # few steps: many CPUs take 40 times as long for a product as in float32
        config = replace(FIT, steps=5, learning_rate=2e-3, precision=precision, gradient_checkpointing=True)
    if "short" in options:
        config = replace(config, steps=2)
    run_config = RunConfig(out=out, model=str(model), placement=placement, frames={"max_frames": 4})
    is_sharded, is_nan = "sharded" in options, "nan" in options
    captioner = load_encoding_model(model, run_config) if is_sharded else run_config.load_model(model)
    bytes_read = count_bytes_read() if is_sharded else []
    dtypes: list[dict[str, set[str]]] = []

    def load(captioner: Captioner) -> None:
        if is_sharded:
            bytes_read.clear()
            load_policy(captioner, model, run_config, lora=LORA, seed=0)
            held = {name: value.to_local().nbytes for name, value in captioner.network.named_parameters()}
            write_json(out / f"read_{dist.rank()}.json", {"read": list(bytes_read), "held": held})
        else:
            attach_lora(captioner.network, LORA, seed=0)
        if precision == "bfloat16":
            dtypes.append(record_dtypes(captioner.network))

    clips = ClipSet(read_records(root / CLIPS_NAME, Reference)[:3], root)
    batches_class = NanReferences if is_nan else PreferenceBatches
    checkpoint = train(captioner, strategy, clips, out, config=config, batches_class=batches_class, load=load)
    if dtypes and dist.is_main():
        write_json(out / "dtypes.json", {name: sorted(found) for name, found in dtypes[0].items()})
    network_ref = weakref.ref(captioner.network)
    del captioner
    merge = merge_sharded if is_sharded else merge_checkpoint
    merge(checkpoint, base=model, lora=LORA, config=run_config, folder=out, weight=0.5)
    network = network_ref()
    assert network is None or not any(parameter.nbytes for parameter in network.parameters()), (
        "a GPU has no memory for two networks"
    )
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]), *sys.argv[5:])
