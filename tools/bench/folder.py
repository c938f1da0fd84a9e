"""Benchmark captioning a folder in batches with read-ahead against one clip at a time, with equal captions.

    python tools/bench/folder.py [--clips 24] [--seconds 5] [--repeats 3] [--out bench.json] [--quick]

Two folders: 1280 x 720 clips with a random model of 88 million parameters (prefix and answer about 20 : 1, so that
arithmetic dominates), and small synthetic clips with the toy model. The other sides are `Captioner.caption` on each
file in turn, and the same with transformers' generate(). All use all cores and load the model once.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from jsonargparse import ArgumentParser
from model import SHAPES, Shape, make_captioner
from naive import naive_answers
from rows import BenchRow, compare, emit_json, interleave, peak_mib, report_rows, run_isolated

from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.limits import BatchLimits
from salmonn.caption.loader import ClipReader, default_num_workers
from salmonn.records import Caption
from salmonn.synthetic.render import SynthConfig, make_clips

Kind = Literal["720p", "synthetic"]
# A clip of 5 s is 420 tokens with its prompt.
MID = Shape(
    width=768, layers=8, heads=12, kv_heads=4, intermediate=3072, tower_width=192, tower_layers=4, side=224
)  # fmt: skip
MID_NEW_TOKENS = 21
QUICK_NEW_TOKENS = 5
FPS = 30
SOUND_HZ = 44_100


@dataclass(frozen=True)
class FolderConfig:
    """Settings of the benchmark.

    Args:
        clips: number of 720p clips; the other folder has four times as many.
        seconds: length of each 720p clip.
        repeats: timed runs of each side; medians are reported.
        quick: whether to use small sizes, for testing.
    """

    clips: int = 24
    seconds: int = 5
    repeats: int = 3
    quick: bool = False


class FolderBench:
    """A model, a folder and the ways of captioning it."""

    def __init__(self, kind: Kind, paths: Sequence[Path], *, quick: bool) -> None:
        self.paths = paths
        self.waited = 0.0  # seconds in which the model waited for clips in the latest run
        if kind == "synthetic":
            self.captioner = Captioner.load(SHIPPED_MODEL)
            self.sampling = self.captioner.default_sampling()
        else:
            self.captioner = make_captioner(SHAPES["small"] if quick else MID)
            self.sampling = Sampling(max_new_tokens=QUICK_NEW_TOKENS if quick else MID_NEW_TOKENS)
        self.sides = {"ours": self.ours, "one at a time": self.one, "generate() one at a time": self.generate}

    def ours(self) -> list[str]:
        """Caption in batches with reader processes, whose start-up is timed too."""
        with ClipReader(workers=default_num_workers(len(self.paths))) as reader:
            requests = [CaptionRequest(path, sampling=self.sampling) for path in self.paths]
            results = list(self.captioner.caption_many(requests, reader=reader))
        self.waited = reader.waited_seconds
        return [result.text if isinstance(result, Caption) else result.reason for result in results]

    def one(self) -> list[str]:
        """Caption one file at a time with our captioner."""
        return [self.captioner.caption(path, sampling=self.sampling).text for path in self.paths]

    def generate(self) -> list[str]:
        """Caption one file at a time with our reader and encoders and transformers' generate()."""
        processor = self.captioner.processor
        generation: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": self.sampling.max_new_tokens,
            "eos_token_id": processor.stop_ids,
            "pad_token_id": processor.pad_id,
        }
        answer = partial(naive_answers, self.captioner.network, processor, num_samples=1, generation=generation)
        given = [answer(processor.read(path), self.captioner.default_prompt())[0] for path in self.paths]
        return [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in given]

    def parts(self) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
        """Return each stage as a pair of functions: in batches, and one clip at a time; nothing overlaps here."""
        captioner, one_token = self.captioner, replace(self.sampling, max_new_tokens=1)
        clips = [captioner.processor.read(path) for path in self.paths]
        features, size = captioner.encode(clips), captioner.processor.config.batch_size

        def generate(sampling: Sampling, *, batch_size: int) -> None:
            requests = [CaptionRequest(path, sampling=sampling) for path in self.paths]
            captioner.generate(requests, clips=features, limits=BatchLimits(batch_size))

        def read() -> None:
            for path in self.paths:
                captioner.processor.read(path)

        def both(run: Callable[..., object]) -> tuple[Callable[[], object], Callable[[], object]]:
            return partial(run, batch_size=size), partial(run, batch_size=1)

        return {
            "reading": (read, read),
            "encoders": both(partial(captioner.encode, clips)),
            "prefill and first token": both(partial(generate, one_token)),
            "prefill and all tokens": both(partial(generate, self.sampling)),
        }


def make_folder(kind: Kind, root: Path, config: FolderConfig) -> list[Path]:
    """Render different clips of a kind."""
    if kind == "synthetic":
        references = make_clips(root, SynthConfig(clips=4 * config.clips, seed=6), workers=1)
        return [root / reference.video for reference in references]
    root.mkdir(parents=True)
    paths = [root / f"{number:03d}.mp4" for number in range(config.clips)]
    for number, path in enumerate(paths):
        render(path, seconds=config.seconds, seed=number)
    return paths


def render(path: Path, *, seconds: int, width: int = 1280, height: int = 720, seed: int = 0) -> None:
    """Write an H.264/AAC clip that pans over a texture, which compresses badly; the seed sets colour and pitch."""
    rng = np.random.default_rng(seed)
    brightest, pitch_hz = rng.integers(32, 256, 3), int(rng.integers(110, 1760))
    features = rng.integers(0, brightest, (height // 4, width // 4, 3), dtype=np.uint8)
    texture = features.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=SOUND_HZ, layout="mono")
        sounds = _tone(seconds, pitch_hz)
        for number in range(seconds * FPS):
            top, left = 2 * number % height, 3 * number % width
            picture = np.ascontiguousarray(texture[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
            if number % FPS == 0:
                container.mux(audio.encode(next(sounds)))
        for stream in (video, audio):
            container.mux(stream.encode(None))


def _tone(seconds: int, pitch_hz: int) -> Iterator[av.AudioFrame]:
    """Yield the tone one second at a time."""
    wave = (8000 * np.sin(2 * np.pi * pitch_hz * np.arange(SOUND_HZ) / SOUND_HZ)).astype(np.int16)
    for second in range(seconds):
        sound = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        sound.sample_rate, sound.time_base, sound.pts = SOUND_HZ, Fraction(1, SOUND_HZ), second * SOUND_HZ
        yield sound


def check(bench: FolderBench) -> None:
    """Check that all sides give the same captions, and that captions differ between clips.

    Raises:
        ValueError: they do not.
    """
    captions = {name: side() for name, side in bench.sides.items()}
    for name, texts in captions.items():
        if texts != captions["ours"]:
            place = next(place for place, text in enumerate(texts) if text != captions["ours"][place])
            difference = f"{captions['ours'][place]!r} against {texts[place]!r}"
            raise ValueError(f"'{name}' captions {bench.paths[place].name} differently: {difference}")
    if len(set(captions["ours"])) < len(bench.paths) / 2:
        raise ValueError(f"most of {len(bench.paths)} clips have the same caption; the comparison would show little")


def run(config: FolderConfig) -> list[BenchRow]:
    """Measure both folders: ours against each other side."""
    rows: list[BenchRow] = []
    kinds: tuple[Kind, ...] = ("720p", "synthetic")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            paths = make_folder(kind, Path(folder) / kind, config)
            bench = FolderBench(kind, paths, quick=config.quick)
            check(bench)
            timings = interleave(bench.sides, repeats=config.repeats)
            # Of the first 8 clips; workers add 50 MiB each.
            arguments = [*(["--quick"] if config.quick else []), "--videos", *map(str, paths[:8])]
            memory = {side: run_isolated(__file__, *arguments, memory_of=side, kind=kind) for side in bench.sides}
            speed = {side: f"{60 * len(paths) / timing.seconds:.0f}" for side, timing in timings.items()}
            waited = f"the model waited {bench.waited / timings['ours'].seconds:.0%} of the time"
            for side in list(bench.sides)[1:]:
                row = compare(
                    f"{len(paths)} clips, {kind}, against {side}",
                    timings["ours"],
                    timings[side],
                    ours_mib=memory["ours"]["process_mib"],
                    other_mib=memory[side]["process_mib"],
                    note=f"{speed['ours']} against {speed[side]} clips a minute; {waited}",
                )
                # CPU time of worker processes is not counted.
                del row["cpu_ratio"]
                rows.append({"part": "folder captioning", **row})
            rows += stage_rows(bench, kind, repeats=config.repeats)
    return rows


def stage_rows(bench: FolderBench, kind: Kind, *, repeats: int) -> list[BenchRow]:
    """Measure each stage in batches against one clip at a time."""
    rows = []
    for name, (batched, single) in bench.parts().items():
        timings = interleave({"batched": batched, "single": single}, repeats=repeats)
        row = compare(f"{len(bench.paths)} clips, {kind}: {name}", timings["batched"], timings["single"])
        rows.append({"part": "folder captioning: where the time goes", **row})
    return rows


def main() -> None:
    """Parse flags, run, report."""
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(FolderConfig, None, skip={"quick"})
    parser.add_argument("--quick", action="store_true", help="small sizes, for testing")
    parser.add_argument("--out", type=Path | None, default=None, help="file of rows in JSON")
    parser.add_argument(
        "--memory_of", type=str | None, default=None, help="internal: measure the memory of one side in this process"
    )
    parser.add_argument("--kind", type=Kind, default="720p", help="internal: for --memory_of")
    parser.add_argument("--videos", type=Path, nargs="*", default=[], help="internal: for --memory_of")
    values = parser.parse_args()
    if values.memory_of:
        bench = FolderBench(values.kind, values.videos, quick=values.quick)
        emit_json(peak_mib(bench.sides[values.memory_of]))
        return
    config = FolderConfig(values.clips, values.seconds, values.repeats)
    report_rows(run(FolderConfig(4, 1, 2, quick=True) if values.quick else config), out=values.out)


if __name__ == "__main__":
    main()
