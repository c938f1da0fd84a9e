"""How our step grows: time and memory against the length of the prefix, and of a round against its number of clips.

    python tools/bench/growth.py [--out bench.json] [--quick] [--repeats 3]

Each size is measured in a process of its own. The last row of each part tells the p of cost = c * size ** p that fits
best: 1 is linear; attention alone would be 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from model import BenchConfig, make_pair, parse
from rows import BenchRow, Timing, alone, exponent, hand_in, interleave, peak_mib, tell
from step import Bench

from salmonn.model.layout import ClipFeatures
from salmonn.train.preference import PreferenceBatches

FRAMES = (11, 22, 44, 88)  # of 182 tokens: a prefix of 2,000 to 16,000
CLIPS = (100, 300, 1000)
BATCH_SIZE = 4  # pairs a step of a round


def run(config: BenchConfig, *, frames: Sequence[int] = FRAMES, clips: Sequence[int] = CLIPS) -> list[BenchRow]:
    """Rows of both kinds of growth."""
    rows = []
    lengths = [measured(config, "num_frames", count) for count in frames]
    rows += told(lengths, "prefix of {} tokens", f"growth with the prefix: one step on one pair, {config.family}")
    # A small model: what is looked for is not its arithmetic.
    rounds = [measured(replace(config, shape="small"), "num_clips", count) for count in clips]
    rows += told(rounds, "{} clips", "growth with the clips: reference and one epoch, small model")
    return rows


def told(measures: Sequence[Mapping[str, float]], name: str, part: str) -> list[BenchRow]:
    """A row for each size, and one for the fit."""
    rows: list[BenchRow] = [
        {
            "name": name.format(f"{one['size']:,}"),
            "part": part,
            "ours_seconds": one["seconds"],
            "other_seconds": None,
            "ratio": None,
            "ours_mib": one["step_mib"],
            "note": f"{1000 * one['seconds'] / one['size']:.3g} s a thousand",
        }
        for one in measures
    ]
    sizes = [one["size"] for one in measures]
    time = exponent(sizes, [one["seconds"] for one in measures])
    memory = exponent(sizes, [max(one["step_mib"], 1) for one in measures])
    fit: BenchRow = {"name": "fit", "part": part, "ours_seconds": None, "other_seconds": None, "ratio": None}
    fit |= {"time_exponent": round(time, 2), "memory_exponent": round(memory, 2)}
    return [*rows, fit | {"note": f"time grows as size ** {time:.2f}, memory as size ** {memory:.2f}"}]


def measured(config: BenchConfig, kind: str, count: int) -> BenchRow:
    """Size, seconds and memory of one size, in a process of its own."""
    flags = [f"--{name}={value}" for name, value in vars(config).items()]
    answer: BenchRow = alone(__file__, *flags, f"--{kind}={count}")
    return answer


def step_of(config: BenchConfig, num_frames: int) -> BenchRow:
    """One step on a clip of so many frames."""
    warm = Bench(replace(config, shape="small"))
    warm.compute_reference_logps()
    warm.ours()
    bench = Bench(config, num_frames=num_frames)
    bench.batches.reference_logps = [(0.0, 0.0)]
    memory = peak_mib(bench.ours)
    seconds = interleave({"ours": bench.ours}, repeats=config.repeats)["ours"].seconds
    return memory | {"size": bench.prefix_tokens, "seconds": round(seconds, 3)}


def round_of(config: BenchConfig, num_clips: int) -> BenchRow:
    """The reference pass and one epoch over so many clips, whose tokens are kept."""
    bench = Bench(config)
    bench.compute_reference_logps()
    bench.ours()
    clip_features = bench.features["noise"]
    torch.manual_seed(0)
    names = [f"clip {number}" for number in range(num_clips)]
    features = {name: ClipFeatures(torch.randn_like(clip_features.tokens), clip_features.layout) for name in names}
    pairs = [make_pair(config.sizes, video=name, seed=number) for number, name in enumerate(names)]
    bench.batches = PreferenceBatches(pairs, features, bench.processor, batch_size=BATCH_SIZE, seed=0)
    taken: dict[str, Timing] = {}
    memory = peak_mib(lambda: taken.update(interleave({"round": lambda: epoch(bench)}, repeats=1)))
    return memory | {"size": num_clips, "seconds": round(taken["round"].seconds, 3)}


def epoch(bench: Bench) -> None:
    """Ask the reference once for each pair, then see each pair once."""
    bench.compute_reference_logps()
    for step in range(len(bench.batches.pairs) // BATCH_SIZE):
        bench.learn(bench.batches(step)[0])


def main() -> None:
    """Parse, run, show."""
    config, values = parse(__doc__, num_frames=int, num_clips=int)
    if values.num_frames:
        tell(step_of(config, values.num_frames))
    elif values.num_clips:
        tell(round_of(config, values.num_clips))
    else:
        sizes: dict[str, Sequence[int]] = {"frames": (8, 16), "clips": (4, 8)} if values.quick else {}
        hand_in(run(config, **sizes), out=values.out)


if __name__ == "__main__":
    main()
