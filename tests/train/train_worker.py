"""Train with guided DPO on a random model under one strategy; test_parallel.py starts this script.

    train_worker.py STRATEGY MODEL CLIPS OUT float32|bfloat16 [spoilt]

With `spoilt`, a pair of the last process has a loss that is not finite in step 3. With bfloat16, the base weights and
the computation are in bfloat16 and layers are checkpointed. Writes OUT/steps.jsonl, checkpoints/, adapter/ and merged/;
resumes from OUT/checkpoints/.
"""

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.model.loading import Placement
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.records import Comparison, Reference, read_records
from salmonn.train.checkpoint import Checkpoint, Checkpoints
from salmonn.train.evaluate import encode_clips
from salmonn.train.kl import KLProbe
from salmonn.train.loop import Callback, FitConfig, FitContext, autocast, fit
from salmonn.train.preference import DpoConfig, PreferenceBatch, PreferenceBatches, PreferenceLoss
from salmonn.train.references import CLIPS_NAME, ClipSet
from salmonn.train.run_folder import merge_trained

# No dropout: ranks draw their own, and losses are to be those of one process.
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
# All pairs in each step; three make ranks differ in how many pieces they have.
FIT = FitConfig(
    steps=10, learning_rate=1e-3, warmup_ratio=0.2, batch_size=3, gradient_accumulation_steps=2, checkpoint_every=4
)


class Spoilt(PreferenceBatches):
    """Deals out pairs with a reference that is no number, once and on one rank."""

    def __call__(self, step: int) -> list[PreferenceBatch]:
        pieces = super().__call__(step)
        if step != 3 or dist.rank() + 1 < dist.world_size():
            return pieces
        return [replace(piece, reference_chosen=piece.reference_chosen * float("nan")) for piece in pieces]


def train(
    captioner: Captioner, strategy: Any, clips: ClipSet, out: Path, *, config: FitConfig, deal: type[PreferenceBatches]
) -> Checkpoint:
    """Train on three pairs, a right and a wrong caption of each clip."""
    network, references, prompt = captioner.network, clips.references, captioner.default_prompt()
    network.max_logit_bytes = 4 * 400 * 20  # a few positions at a time: processes have different numbers of chunks
    (blocks,) = encode_clips(captioner, clips, name="clips")
    pairs = [
        Comparison(one.video, prompt, one.caption, other.caption, one.caption, margin=0.5)
        for one, other in zip(references, references[1:] + references[:1], strict=True)
    ]
    attach_lora(network, LORA, seed=0)
    by_video = {one.video: block for one, block in zip(references, blocks, strict=True)}
    batches = deal(
        pairs,
        by_video,
        captioner.processor,
        batch_size=config.batch_size,
        seed=0,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    with autocast(config.precision):
        batches.compute_reference_logps(network)
    fixed = KLProbe(references[:1], blocks[:1], captioner.processor, prompt=prompt)

    def measure(wrapped: nn.Module) -> dict[str, float]:
        with autocast(config.precision):
            return {"kl": fixed.kl_from_reference_policy(wrapped, network)}

    stage = FitContext(
        strategy, out, Checkpoints(out / "checkpoints"), strategy=strategy, callback=Callback(measure, every=5)
    )
    return fit(network, batches, PreferenceLoss(DpoConfig()), config, stage=stage)


def main(strategy: str, model: Path, root: Path, out: Path, precision: Any, *options: str) -> None:
    """Train and merge; nothing may hold the network that the training used up."""
    dist.setup(threads=1)
    placement = Placement(dtype=precision, attention="sdpa")
    config = replace(FIT, precision=precision, gradient_checkpointing=precision == "bfloat16")
    captioner = Captioner.load(model, placement=placement)
    used_up = weakref.ref(captioner.network)
    clips = ClipSet(read_records(root / CLIPS_NAME, Reference)[:3], root)
    done = train(captioner, strategy, clips, out, config=config, deal=Spoilt if options else PreferenceBatches)
    merge_trained(captioner, out, done, base=model, lora=LORA, placement=placement, adapter=True)
    left = used_up()
    assert left is None or not any(parameter.nbytes for parameter in left.parameters()), "a GPU has no room for two"
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]), *sys.argv[5:])
