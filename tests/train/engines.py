"""Guided DPO on a random model under one engine, started by the tests with torchrun: losses, checkpoint, merged weights.

engines.py ENGINE MODEL CLIPS OUT [STEPS]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.model.lora import LoraConfig, attach
from salmonn.prefer.loss import sequence_logps  # noqa: F401
from salmonn.records import Pair, Reference, read_records
from salmonn.train.checkpoint import Checkpoints
from salmonn.train.drift import DriftSet
from salmonn.train.evaluate import encode_clips
from salmonn.train.loop import FitConfig, Stage, Watch, fit
from salmonn.train.preference import DpoConfig, MixedLoss, PreferenceBatches
from salmonn.train.references import ClipSet
from salmonn.train.stages import merge_trained

# No dropout: ranks draw their own, and losses are to be those of one process.
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
FIT = FitConfig(steps=10, learning_rate=2e-3, warmup=0.2, batch_size=4, accumulation=2, checkpoint_every=4)


def main(engine: str, model: Path, root: Path, out: Path, *, num_steps: int) -> None:
    """Train four pairs, all of them in every step."""
    dist.setup(threads=1)
    captioner = Captioner.load(model)
    references = read_records(root / "clips.jsonl", Reference)[:4]
    blocks = encode_clips(captioner, ClipSet(references, root), name="clips")
    prompt = captioner.describe()
    pairs = [
        Pair(one.video, prompt, one.caption, other.caption, one.caption, gap=0.5)
        for one, other in zip(references, references[1:] + references[:1], strict=True)
    ]
    attach(captioner.network, LORA, seed=0)
    by_video = {one.video: block for one, block in zip(references, blocks, strict=True)}
    batches = PreferenceBatches(pairs, by_video, captioner.processor, batch_size=4, seed=0, accumulation=2)
    batches.refer(captioner.network)
    fixed, network = DriftSet(references[:2], blocks[:2], captioner.processor, prompt=prompt), captioner.network
    watch = Watch(lambda wrapped: {"kl": fixed.to_reference(wrapped, network)}, every=4)
    checkpoints = Checkpoints(out / "checkpoints")
    stage = Stage(engine, out, checkpoints, engine=engine, watch=watch)
    config = replace(FIT, steps=num_steps)
    done = fit(captioner.network, batches, MixedLoss(DpoConfig(), qa_share=0.0), config, stage=stage)
    merge_trained(captioner, out, done, base=model, lora=LORA, placement=captioner_placement(), adapter=True)
    if dist.is_main():
        (out / "done.json").write_text(json.dumps({"step": done.step}))


def captioner_placement():
    from salmonn.model.load import Placement

    return Placement(dtype="float32", attention="sdpa")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    engine, *paths = sys.argv[1:5]
    main(engine, *map(Path, paths), num_steps=int(sys.argv[5]) if len(sys.argv) > 5 else FIT.steps)
