"""Measure the peak memory of one guided-DPO step or one caption, for test_dry_run.py.

    python tests/train/measure.py SMALL MODEL training|captioning [checkpointed]

SMALL and MODEL are folders with config.json and tokenizer; their weights are random. SMALL runs first, so that the
memory of the libraries is not counted. Prints two numbers of bytes: the estimate and the measurement.
"""

import ctypes
import gc
import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.processor import Processor
from salmonn.media.clip import Clip
from salmonn.model.layout import ClipInputs
from salmonn.model.loading import Placement, load_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import Network
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.records import Comparison
from salmonn.train.dry_run import ClipShape, MemoryPlan, Workload, build_on_meta
from salmonn.train.loop import FitConfig, FitContext, fit
from salmonn.train.preference import PreferenceBatches, PreferenceBatchLoss, PreferenceExample
from salmonn.train.reference_logps import compute_reference_logps

SHAPE = ClipShape(seconds=12.0, width=320, height=180, frames_per_second=10.0)
LORA = LoraConfig(rank=32, alpha=64, dropout=0.0)
M_MMAP_THRESHOLD = -3  # as <malloc.h> has it
ANSWER = "a red star appears and a low tone is heard " * 12


def process_bytes(kind: str) -> int:
    """Return the resident memory (VmRSS) or its peak (VmHWM) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def make_inputs(processor: Processor) -> ClipInputs:
    """Return the inputs of a clip of noise that is sampled by the model's rule."""
    num_source_frames = round(SHAPE.seconds * SHAPE.frames_per_second)
    sampler = processor.family.frame_sampler
    num_frames = len(sampler.sample_times(0.0, SHAPE.seconds, num_source_frames))
    rows, columns = sampler.frame_size(SHAPE.height, SHAPE.width, num_frames)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (num_frames, rows, columns, 3), np.uint8)
    wave = rng.normal(size=round(SHAPE.seconds * 16_000)).astype(np.float32)
    times = np.arange(num_frames) * SHAPE.seconds / num_frames
    return processor.clip_inputs(Clip("noise", frames, times, wave, 0.0, SHAPE.seconds, SHAPE.seconds))


def train_step(captioner: Captioner, fit_config: FitConfig, folder: str) -> None:
    """Train for one step of guided DPO on one clip, in a new folder."""
    work = Path(mkdtemp(dir=folder))
    media = make_inputs(captioner.processor)
    (features,) = captioner.encode([media])
    attach_lora(captioner.network, LORA, seed=0)
    pair = Comparison("noise", "Tell.", ANSWER, f"two {ANSWER}", f"three {ANSWER}")
    examples, loss, processor = [PreferenceExample(pair, features)], make_loss(LossConfig()), captioner.processor
    logps = compute_reference_logps(captioner.network, examples, processor, roles=loss.reference_roles, batch_size=1)
    batches = PreferenceBatches(examples, logps, processor, roles=loss.roles, batch_size=1, seed=0)
    fit(captioner.network, batches, PreferenceBatchLoss(loss), fit_config, context=FitContext("step", work))


def run(folder: str, mode: str, fit_config: FitConfig) -> None:
    """Run the step or the caption."""
    torch.manual_seed(0)
    config = load_config(folder)
    captioner = Captioner(Network(config).eval(), Processor.load(folder, config=config))
    if mode == "training":
        train_step(captioner, fit_config, folder)
    else:
        request = CaptionRequest(Path("clip"), "Tell.", Sampling(max_new_tokens=16))
        captioner.generate([request], clips=[make_inputs(captioner.processor)])


def main(warm_up_folder: str, folder: str, mode: str, checkpointed: bool) -> None:
    """Print the estimate and the measurement."""
    # Freed memory goes back at once, or else the peak would count it.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    placement = Placement(dtype="float32")
    config = load_config(folder)
    processor = Processor.load(folder, config=config)
    fit_config = FitConfig(steps=1, batch_size=1, warmup_ratio=1.0, gradient_checkpointing=checkpointed)
    network = build_on_meta(config)
    if mode == "training":
        with torch.device("meta"):
            attach_lora(network, LORA, seed=0)
    tokens = len(processor.tokenizer.encode(ANSWER))
    work = Workload(clips=1, answers=3, answer_tokens=tokens, prompt_tokens=40, cached_features=True)
    budget = MemoryPlan(network, config, placement=placement, fit=fit_config, work=work, shape=SHAPE)
    memory = budget.training(checkpointed=checkpointed) if mode == "training" else budget.captioning(max_new_tokens=16)
    run(warm_up_folder, mode, fit_config)
    gc.collect()
    before = process_bytes("VmRSS")
    run(folder, mode, fit_config)
    sys.stdout.write(f"{memory.peak} {process_bytes('VmHWM') - before}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:] == ["checkpointed"])
