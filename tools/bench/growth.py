"""Benchmark how time and memory grow: of a step with the prefix length, and of a round with the number of clips.

    python tools/bench/growth.py [--out bench.json] [--quick] [--repeats 3]

Each size is measured in a separate process. The last row of each part gives the exponent p of the fit cost = c * size
** p: 1 is linear, attention alone would be 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from model import BenchConfig, make_pair, parse
from rows import BenchRow, Timing, emit_json, exponent, interleave, peak_mib, report_rows, run_isolated
from step import StepBench

from salmonn.model.layout import ClipFeatures
from salmonn.train.preference import PreferenceExample

FRAMES = (11, 22, 44, 88)  # 182 tokens each: prefixes of 2,000 to 16,000 tokens
CLIPS = (100, 300, 1000)
BATCH_SIZE = 4  # pairs per step of a round


def run(config: BenchConfig, *, frames: Sequence[int] = FRAMES, clips: Sequence[int] = CLIPS) -> list[BenchRow]:
    """Measure both kinds of growth."""
    lengths = [run_isolated(__file__, **vars(config), num_frames=count) for count in frames]
    rows = growth_rows(lengths, "prefix of {} tokens", f"growth with the prefix: one step on one pair, {config.family}")
    # A small model, since the arithmetic is not of interest here.
    small = replace(config, shape="small")
    rounds = [run_isolated(__file__, **vars(small), num_clips=count) for count in clips]
    rows += growth_rows(rounds, "{} clips", "growth with the clips: reference and one epoch, small model")
    return rows


def growth_rows(measures: Sequence[Mapping[str, float]], name: str, part: str) -> list[BenchRow]:
    """Make a row for each size and one for the fit."""
    rows: list[BenchRow] = [
        {
            "name": name.format(f"{one['size']:,}"),
            "part": part,
            "ours_seconds": one["seconds"],
            "other_seconds": None,
            "ratio": None,
            "ours_mib": one["step_mib"],
            "note": f"{1000 * one['seconds'] / one['size']:.3g} s per 1,000",
        }
        for one in measures
    ]
    sizes = [one["size"] for one in measures]
    time = exponent(sizes, [one["seconds"] for one in measures])
    memory = exponent(sizes, [max(one["step_mib"], 1) for one in measures])
    fit: BenchRow = {"name": "fit", "part": part, "ours_seconds": None, "other_seconds": None, "ratio": None}
    fit |= {"time_exponent": round(time, 2), "memory_exponent": round(memory, 2)}
    return [*rows, fit | {"note": f"time grows as size ** {time:.2f}, memory as size ** {memory:.2f}"}]


def measure_step(config: BenchConfig, num_frames: int) -> BenchRow:
    """Measure one step on a clip with `num_frames` frames."""
    warm = StepBench(replace(config, shape="small"))
    warm.compute_reference_logps()
    warm.ours()
    bench = StepBench(config, num_frames=num_frames)
    memory = peak_mib(bench.ours)
    seconds = interleave({"ours": bench.ours}, repeats=config.repeats)["ours"].seconds
    return memory | {"size": bench.prefix_tokens, "seconds": round(seconds, 3)}


def measure_round(config: BenchConfig, num_clips: int) -> BenchRow:
    """Measure the reference policy pass and one epoch over `num_clips` clips with cached features."""
    bench = StepBench(config)
    bench.compute_reference_logps()
    bench.ours()
    torch.manual_seed(0)
    names = [f"clip {number}" for number in range(num_clips)]
    bench.examples = [
        PreferenceExample(
            make_pair(config.sizes, video=name, seed=number),
            ClipFeatures(torch.randn_like(bench.features.tokens), bench.features.layout),
        )
        for number, name in enumerate(names)
    ]
    bench.batch_size = BATCH_SIZE
    timings: dict[str, Timing] = {}
    memory = peak_mib(lambda: timings.update(interleave({"round": lambda: epoch(bench)}, repeats=1)))
    return memory | {"size": num_clips, "seconds": round(timings["round"].seconds, 3)}


def epoch(bench: StepBench) -> None:
    """Run the reference policy on each pair, then train on each pair once."""
    bench.compute_reference_logps()
    for step in range(len(bench.examples) // BATCH_SIZE):
        bench.train_step(bench.batches.micro_batches(step)[0])


def main() -> None:
    """Parse flags, run, report."""
    config, values = parse(__doc__, num_frames=int, num_clips=int)
    if values.num_frames:
        emit_json(measure_step(config, values.num_frames))
    elif values.num_clips:
        emit_json(measure_round(config, values.num_clips))
    else:
        sizes: dict[str, Sequence[int]] = {"frames": (8, 16), "clips": (4, 8)} if values.quick else {}
        report_rows(run(config, **sizes), out=values.out)


if __name__ == "__main__":
    main()
