"""Benchmark several captions per clip against as many generate() calls of transformers.

    python tools/bench/sampling.py [--out bench.json] [--quick] [--repeats 3]
    python tools/bench/sampling.py --device cuda --dtype bfloat16 --shape 7b

Ours is one call with `num_samples=4`; the other side calls generate() once per caption, with its own encoder pass and
prefill. Greedy answers of both must be equal, token for token, before anything is timed.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from model import PROMPT, BenchConfig, make_captioner, make_clip, parse
from naive import naive_answers
from rows import BenchRow, compare, emit_json, interleave, peak_mib, report_rows, run_isolated

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.model.layout import ClipInputs

NUM_SAMPLES = 4
NUM_CLIPS = 2  # in the larger batch
NEW_TOKENS = {"small": 5, "mid": 200, "7b": 900}


class SamplingBench:
    """A model, clips of different lengths, and both ways of captioning them."""

    def __init__(self, config: BenchConfig) -> None:
        self.captioner: Captioner = make_captioner(
            config.sizes, family=config.family, device=config.device, dtype=getattr(torch, config.dtype)
        )
        frames = [config.sizes.num_frames - 2 * number for number in range(NUM_CLIPS)]
        self.clips: list[ClipInputs] = [
            make_clip(self.captioner.processor, num_frames=count, side=config.sizes.side, seed=count)
            for count in frames
        ]
        self.new_tokens = NEW_TOKENS[config.shape]

    def ours(self, *, num_clips: int, num_samples: int = NUM_SAMPLES, temperature: float = 1.0) -> list[list[int]]:
        """Return the token ids of all samples of the first clips, generated in one call."""
        sampling = Sampling(temperature=temperature, top_p=0.95, max_new_tokens=self.new_tokens)
        requests = [
            CaptionRequest(Path(), PROMPT, sampling, seed=seed, num_samples=num_samples) for seed in range(num_clips)
        ]
        samples = self.captioner.generate(requests, clips=self.clips[:num_clips])
        return [[int(word.removeprefix("w")) for word in caption.text.split()] for row in samples for caption in row]

    def other(self, *, num_clips: int, num_samples: int = NUM_SAMPLES, temperature: float = 1.0) -> list[list[int]]:
        """Return the same by one generate() call per sample."""
        random_args = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}
        stops = self.captioner.processor.stop_ids
        generation: dict[str, Any] = (random_args if temperature else {"do_sample": False}) | {
            "max_new_tokens": self.new_tokens,
            "eos_token_id": stops,
            "pad_token_id": self.captioner.processor.pad_id,
        }
        torch.manual_seed(0)
        answer = partial(naive_answers, self.captioner.network, self.captioner.processor)
        return [
            ids
            for clip in self.clips[:num_clips]
            for ids in answer(clip, PROMPT, num_samples=num_samples, generation=generation)
        ]


def check(bench: SamplingBench, *, exact: bool) -> None:
    """Check that both sides give the same greedy answers and that no answer ends early.

    Raises:
        ValueError: they differ (in 16 bits they may), or an answer ends early.
    """
    ours, other = (side(num_clips=NUM_CLIPS, num_samples=1, temperature=0) for side in (bench.ours, bench.other))
    if exact and ours != other:
        raise ValueError(
            "greedy answers differ from those of transformers' generate; the comparison would be meaningless"
        )
    answers = [*ours, *other, *bench.ours(num_clips=1)]
    if {len(ids) for ids in answers} != {bench.new_tokens}:
        raise ValueError(f"answers ended early, after {sorted(map(len, answers))} tokens; use another seed")


def run(config: BenchConfig) -> list[BenchRow]:
    """Measure one clip and several clips per batch."""
    bench = SamplingBench(config)
    check(bench, exact=config.dtype == "float32")
    sides = {
        (side.__name__, count): partial(side, num_clips=count)
        for count in (1, NUM_CLIPS)
        for side in (bench.ours, bench.other)
    }
    timings = interleave({f"{name} {count}": side for (name, count), side in sides.items()}, repeats=config.repeats)
    rows = []
    for count in (1, NUM_CLIPS):
        memory = {
            side: run_isolated(__file__, **vars(config), memory_of=side, num_clips=count) for side in ("ours", "other")
        }
        row = compare(
            f"{NUM_SAMPLES} captions of {'one clip' if count == 1 else f'each of {count} clips'}",
            timings[f"ours {count}"],
            timings[f"other {count}"],
            ours_mib=memory["ours"]["step_mib"],
            other_mib=memory["other"]["step_mib"],
            note=f"against {NUM_SAMPLES * count} generate() calls",
        )
        rows.append(row | {"ours_seconds_per_clip": round(timings[f"ours {count}"].seconds / count, 3)})
    part = f"sampling: {config.family}, {bench.new_tokens} new tokens each"
    return [row | {"part": part} for row in rows]


def report_memory(config: BenchConfig, side: str, num_clips: int) -> None:
    """Measure the peak memory of a side in this process and write it as JSON."""
    warm = SamplingBench(replace(config, shape="small"))
    bench = SamplingBench(config)
    if side == "ours":
        warm.ours(num_clips=num_clips)
        emit_json(peak_mib(partial(bench.ours, num_clips=num_clips)))
    else:
        warm.other(num_clips=1, num_samples=1)
        # Calls run one after the other, so the peak is that of one.
        emit_json(peak_mib(partial(bench.other, num_clips=1, num_samples=1)))


def main() -> None:
    """Parse flags, run, report."""
    config, values = parse(__doc__, memory_of=str, num_clips=int)
    if values.memory_of:
        report_memory(config, values.memory_of, values.num_clips)
        return
    report_rows(run(config), out=values.out)


if __name__ == "__main__":
    main()
