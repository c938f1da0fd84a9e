"""Check and measure the GPU path at full size: agreement of its passes, kernels, speed, memory.

    python tools/bench/gpu_check.py --device cuda --dtype bfloat16 --shape 7b [--family salmonn2-plus] [--out gpu.json]
    python tools/bench/gpu_check.py --quick                  # what the tests run, on a CPU

The weights are random, with key biases as large as those of Qwen2, which 16-bit scores would be too coarse for.
Each check runs by itself: one that fails is reported with its error, and the exit status is 1.
"""

import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from model import PROMPT, BenchConfig, make_captioner, make_clip, parse
from naive import naive_answers
from rich.console import Console
from rich.table import Table
from rows import machine
from step import StepBench, utilization
from torch.profiler import ProfilerActivity, profile

from salmonn.caption.captioner import Captioner
from salmonn.caption.generate import DecodeBatch
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.processor import PromptRow
from salmonn.model.layout import ClipFeatures, ClipInputs, ModelInputs
from salmonn.model.partial_attention import attention_kernel

GIB = 1 << 30
KEY_BIAS_NORM = 600.0  # of the first and the last layer of Qwen2-7B
MAX_LOGP_DIFFERENCE = 0.1  # nats per token between decoding and a packed pass in 16 bits
NUM_CLIPS, NUM_SAMPLES = 8, 8
DECODE_STEPS = 32
Figures = dict[str, Any]


@dataclass
class GpuCheck:
    """A model with random weights, and clips of it.

    Args:
        config: sizes, family, device and data type.
    """

    config: BenchConfig

    @cached_property
    def captioner(self) -> Captioner:
        """Model with large key biases in its first and last layer."""
        config = self.config
        captioner = make_captioner(
            config.sizes, family=config.family, device=config.device, dtype=getattr(torch, config.dtype)
        )
        layers = captioner.network.lm.get_decoder().layers
        for layer in (layers[0], layers[-1]):
            bias = layer.self_attn.k_proj.bias
            bias.data.normal_().mul_(KEY_BIAS_NORM / bias.norm())
        return captioner

    @cached_property
    def clips(self) -> list[ClipInputs]:
        """Clips of slightly different lengths."""
        sizes, processor = self.config.sizes, self.captioner.processor
        return [
            make_clip(processor, num_frames=sizes.num_frames - number % 4, side=sizes.side, seed=number)
            for number in range(NUM_CLIPS)
        ]

    @cached_property
    def features(self) -> list[ClipFeatures]:
        """Features of the clips."""
        return self.captioner.encode(self.clips, batch_size=1)

    def inputs(self, num_clips: int) -> ModelInputs:
        """Return the prompts of the first clips."""
        rows = [PromptRow(number, PROMPT) for number in range(num_clips)]
        return self.captioner.processor.collate(rows, self.features[:num_clips]).to(self.captioner.network.device)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.config.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], *, repeats: int = 3) -> float:
        """Return the median wall time of a run after a warm-up."""
        run()
        times = []
        for _ in range(repeats):
            self.synchronize()
            began = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def kernels(self, run: Callable[[], object]) -> tuple[Counter[str], float]:
        """Return the number of launches of each kernel (on a CPU, of each operator), and the seconds they took."""
        is_cpu = self.config.device == "cpu"
        with profile(activities=[ProfilerActivity.CPU if is_cpu else ProfilerActivity.CUDA]) as profiler:
            run()
            self.synchronize()
        events = profiler.key_averages()
        seconds = sum(event.self_cpu_time_total if is_cpu else event.self_device_time_total for event in events) / 1e6
        return Counter({event.key: event.count for event in events}), seconds


def check_agreement(check: GpuCheck) -> Figures:
    """Compare log-probabilities of sampled captions while decoding with those of a packed pass over the captions.

    Raises:
        ValueError: they differ by more than rounding.
    """
    captioner, sampling = check.captioner, Sampling(temperature=1.0, max_new_tokens=DECODE_STEPS, logprobs=0)
    requests = [CaptionRequest(Path("clip"), PROMPT, sampling, seed=seed, num_samples=2) for seed in range(2)]
    captions = [one for row in captioner.generate(requests, clips=check.features[:2]) for one in row]
    rows = [PromptRow(number // 2, PROMPT, one.text, finished=one.finished) for number, one in enumerate(captions)]
    inputs = captioner.processor.collate(rows, check.features[:2]).to(captioner.network.device)
    with torch.no_grad():
        packed = captioner.network(inputs).sum(1).tolist()
    differences = [abs(one.logprob - logp) / one.num_tokens for one, logp in zip(captions, packed, strict=True)]
    figures = {"nats a token, mean": statistics.fmean(differences), "nats a token, largest": max(differences)}
    if not all(one < MAX_LOGP_DIFFERENCE for one in differences):  # NaN is not
        raise ValueError(
            f"decoding and a packed pass differ by more than {MAX_LOGP_DIFFERENCE} nats a token: {figures}"
        )
    return figures


def measure_towers(check: GpuCheck) -> Figures:
    """Measure the encoders on one clip, and how much of that time the GPU is idle."""
    encode = partial(check.captioner.encode, check.clips[:1])
    seconds = check.seconds(encode)
    launches, busy = check.kernels(encode)
    return {"seconds a clip": seconds, "launches": launches.total(), "idle share": max(0.0, 1 - busy / seconds)}


def measure_prefill(check: GpuCheck) -> Figures:
    """Measure the prefill of one clip, and name the attention kernels."""
    inputs, network = check.inputs(1), check.captioner.network
    run = torch.no_grad()(partial(network.prefill, inputs))
    seconds = check.seconds(run)
    launches, _ = check.kernels(run)
    return {
        "tokens": inputs.num_tokens,
        "tokens/s": inputs.num_tokens / seconds,
        "attention kernels": attention_names(launches),
    }


def attention_names(launches: Counter[str]) -> list[str]:
    """Return the names of the attention kernels among all that were launched."""
    names = ("flash", "cudnn", "fmha", "attention")
    return sorted(name[:90] for name in launches if any(part in name.lower() for part in names))


def measure_decoding(check: GpuCheck) -> Figures:
    """Measure decode steps of 1, 8 and 64 rows, next to the limit that reading the weights sets, and name kernels."""
    network, figures = check.captioner.network, Figures()
    weights = sum(one.nbytes for one in network.lm.parameters())
    limit = bandwidth(check) / weights
    for num_clips, num_samples in ((1, 1), (1, NUM_SAMPLES), (NUM_CLIPS, NUM_SAMPLES)):
        sampling = Sampling(temperature=1.0, max_new_tokens=3 * DECODE_STEPS)
        batch = DecodeBatch(network, stop_ids=[])
        batch.add(check.inputs(num_clips), sampling=sampling, num_samples=num_samples, seeds=range(num_clips))
        batch.step()
        seconds = check.seconds(lambda batch=batch: [batch.step() for _ in range(DECODE_STEPS // 2)], repeats=2)  # type: ignore[misc]
        launches, _ = check.kernels(batch.step)
        rate = DECODE_STEPS // 2 / seconds
        figures[f"{num_clips * num_samples} rows"] = {
            "tokens/s": rate * num_clips * num_samples,
            "share of the bandwidth limit": rate / limit,
            "launches a step": launches.total(),
            "replayed as a CUDA graph": batch.decoder.num_replayed > 0,
        }
    config = network.lm.get_decoder().config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    chosen = attention_kernel(network.device, network.dtype, width)
    return figures | {"attention": chosen.__name__, "attention kernels": attention_names(launches)}


def measure_generate(check: GpuCheck) -> Figures:
    """Measure a token of transformers' generate() for one row, from the difference of two lengths."""
    ids = {"eos_token_id": check.captioner.processor.stop_ids, "pad_token_id": check.captioner.processor.pad_id}
    times = {
        count: check.seconds(
            partial(
                naive_answers, check.captioner.network, check.captioner.processor, check.clips[0], PROMPT,
                num_samples=1, generation={"do_sample": False, "max_new_tokens": count, **ids},
            ),
            repeats=1,
        )
        for count in (DECODE_STEPS, 2 * DECODE_STEPS)
    }  # fmt: skip
    return {"tokens/s of one row": DECODE_STEPS / (times[2 * DECODE_STEPS] - times[DECODE_STEPS])}


def measure_captioning(check: GpuCheck) -> Figures:
    """Measure whole captions: towers, prefill and decoding, one clip at a time and eight together."""
    length = 500 if check.config.shape == "7b" else DECODE_STEPS
    figures: Figures = {"tokens a caption": length}
    for count in (1, NUM_CLIPS):
        requests = [CaptionRequest(Path("clip"), PROMPT, Sampling(max_new_tokens=length))] * count
        run = partial(check.captioner.generate, requests, clips=check.clips[:count])
        figures[f"seconds a clip, {count} at a time"] = check.seconds(run, repeats=1) / count
    return figures


def measure_training(check: GpuCheck) -> Figures:
    """Measure a step of guided DPO with gradient checkpointing, its memory and MFU."""
    for name in ("captioner", "clips", "features"):
        vars(check).pop(name, None)
    gc.collect()
    on_gpu = check.config.device != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bench = StepBench(check.config)
    bench.compute_reference_logps()
    seconds = check.seconds(bench.checkpointed)
    figures: Figures = {"seconds a step": seconds, "tokens": bench.num_tokens}
    if on_gpu:
        figures |= utilization(bench, seconds) | {"peak GiB": torch.cuda.max_memory_allocated() / GIB}
    return figures


def bandwidth(check: GpuCheck) -> float:
    """Return the bytes a second that the device's memory delivers, measured by a copy."""
    source = torch.empty(
        GIB if check.config.device != "cpu" else 1 << 24, dtype=torch.uint8, device=check.config.device
    )
    target = torch.empty_like(source)
    return 2 * source.nbytes / check.seconds(lambda: target.copy_(source))


CHECKS: dict[str, Callable[[GpuCheck], Figures]] = {
    "agreement": check_agreement,
    "towers": measure_towers,
    "prefill": measure_prefill,
    "decoding": measure_decoding,
    "generate() of transformers": measure_generate,
    "captioning": measure_captioning,
    "training": measure_training,  # last: it needs the memory of the others
}


def run_checks(check: GpuCheck) -> dict[str, Figures]:
    """Run all checks; one that fails has its error for a figure."""
    results: dict[str, Figures] = {}
    for name, run in CHECKS.items():
        began = time.perf_counter()
        try:
            results[name] = run(check)
        except Exception as error:  # noqa: BLE001, each check is to run whatever becomes of the others
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["seconds of the check"] = time.perf_counter() - began
    return results


def report(results: dict[str, Figures]) -> None:
    """Print the figures as a table."""
    table = Table(title=machine())
    for column in ("check", "figure", "value"):
        table.add_column(column)
    for name, figures in results.items():
        for label, value in _flat(figures):
            table.add_row(name, label, f"{value:.4g}" if isinstance(value, float) else str(value))
        table.add_section()
    Console(width=120).print(table)


def _flat(figures: Figures, prefix: str = "") -> Sequence[tuple[str, object]]:
    return [
        pair
        for label, value in figures.items()
        for pair in (_flat(value, f"{label}: ") if isinstance(value, dict) else [(prefix + label, value)])
    ]


def main() -> int:
    """Run, print, write."""
    config, values = parse(__doc__)
    results = run_checks(GpuCheck(config))
    report(results)
    if values.out:
        values.out.write_text(json.dumps({"machine": machine(), "config": vars(config)} | results, indent=1) + "\n")
    return int(any("error" in figures for figures in results.values()))


if __name__ == "__main__":
    sys.exit(main())
