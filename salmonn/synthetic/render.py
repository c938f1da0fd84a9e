"""Film synthetic scenes: frames and sound with numpy, encoded to MP4 (H.264 and AAC), with exact annotation.

    references = make_clips("data/synth", SynthConfig(clips=1000, seed=0))

writes `videos/clip_00000.mp4`, ... and `clips.jsonl` with one `Reference` a line. Clip i depends on the seed and i
alone, so a longer set begins like a shorter one, and any number of workers writes the same files.
"""

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from salmonn.records import Reference, write_json, write_records
from salmonn.synthetic.annotate import write_reference
from salmonn.synthetic.phrases import COLOURS
from salmonn.synthetic.scene import Scene, SceneEvent, SynthConfig, objects_at, sample_scene

__all__ = ["SynthConfig", "make_clips", "render_audio", "render_frames", "sample_clip", "write_video"]

LOW_HZ, HIGH_HZ, BEEP_HZ = 250, 1800, 1000
SWEEP_HZ = (300, 2500)
FADE_SECONDS = 0.03
CHUNK = 16  # clips a worker takes at once: large against the cost of a call, small against a run that is cut off
OVERSAMPLING = 4  # per side, for smooth edges

Floats = NDArray[np.float64]


def make_clips(
    out_dir: Path | str,
    config: SynthConfig,
    *,
    indices: Sequence[int] | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Reference]:
    """Write clips and their annotation; clips that are there already stay as they are.

    Args:
        out_dir: gets `videos/`, `clips.jsonl` (exactly the chosen clips) and `synth.json` (the config).
        config: sizes and seed; in a folder that was begun, only `clips` may differ.
        indices: the clips to write, all of them by default.
        workers: processes, by default one for each core that may be used; a handful of clips is made in this one.
            Scripts that start more need the usual `if __name__ == "__main__"`.
        progress: called with the number of clips just finished, for example `tqdm(...).update`.

    Raises:
        ValueError: the folder holds clips of another seed or config, or an index is out of range.
    """
    out_dir = Path(out_dir)
    indices = range(config.clips) if indices is None else indices
    if bad := [index for index in indices if not 0 <= index < config.clips]:
        raise ValueError(f"clip {bad[0]} is out of range: the config has {config.clips} clips")
    _claim_folder(out_dir, config=config)
    references = [sample_clip(config, index=index)[1] for index in indices]
    absent = [
        index for index, reference in zip(indices, references, strict=True) if not (out_dir / reference.video).exists()
    ]
    _report(progress, len(references) - len(absent))
    _film_all(absent, out_dir=out_dir, config=config, workers=workers, progress=progress)
    write_records(out_dir / "clips.jsonl", references)
    return references


def sample_clip(config: SynthConfig, *, index: int) -> tuple[Scene, Reference]:
    """Scene and annotation of one clip, without filming it."""
    scene = sample_scene(random.Random(f"scene {config.seed} {index}"), config=config)
    words = random.Random(f"words {config.seed} {index}")
    video = f"videos/clip_{index:05d}.mp4"
    return scene, write_reference(scene, words, video=video, index=index, num_questions=config.questions)


def render_frames(scene: Scene, *, config: SynthConfig) -> NDArray[np.uint8]:
    """Frames as (F, height, width, 3) RGB; frame k shows the moment k / fps."""
    size, number = config.size_pixels, round(scene.duration_seconds * config.fps)
    ramp = np.linspace(0, 1, size)
    slope = ((ramp[:, None] + ramp[None]) / 2)[..., None]
    first, last = (np.array(corner, dtype=float) for corner in scene.background)
    background = first + slope * (last - first)
    frames = np.empty((number, size, size, 3), dtype=np.uint8)
    drawn: list[object] = []
    for position in range(number):
        things = [thing for thing in objects_at(scene, position / config.fps + 1e-6) if thing.shown]
        # Most frames repeat the one before.
        if position and things == drawn:
            frames[position] = frames[position - 1]
            continue
        image = background.copy()
        for thing in things:
            _paint(image, mask=_mask(thing.shape, scene.diameter), place=thing.place, colour=COLOURS[thing.colour])
        frames[position] = image.round().astype(np.uint8)
        drawn = list(things)
    return frames


def render_audio(scene: Scene, rng: np.random.Generator, *, config: SynthConfig) -> NDArray[np.float32]:
    """Mono sound as (samples,) in -1..1; `rng` draws the noises."""
    rate = config.sample_rate_hz
    sound = scene.hiss * rng.standard_normal(round(scene.duration_seconds * rate))
    for happening in scene.happenings:
        if happening.kind == "sound":
            first, last = (round(seconds * rate) for seconds in (happening.start_seconds, happening.end_seconds))
            wave = _wave(happening, rng, seconds=np.arange(last - first) / rate)
            sound[first:last] += happening.level * wave[: len(sound) - first]
    return np.clip(sound, -1, 1).astype(np.float32)


def write_video(path: Path, frames: NDArray[np.uint8], sound: NDArray[np.float32], *, config: SynthConfig) -> None:
    """Encode (F, height, width, 3) frames and (samples,) sound; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
    # One thread: clips are small, and the workers fill the cores.
    with av.open(str(temporary), "w") as container:
        video = container.add_stream(
            "libx264",
            rate=config.fps,
            options={"preset": "veryfast", "crf": "18", "threads": "1", "x264-params": "mbtree=0"},
        )
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio = container.add_stream("aac", rate=config.sample_rate_hz, layout="mono")
        audio.bit_rate = 64_000
        for image in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts = config.sample_rate_hz, 0
        samples.time_base = Fraction(1, config.sample_rate_hz)
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))
    temporary.replace(path)


def _claim_folder(out_dir: Path, *, config: SynthConfig) -> None:
    """Refuse a folder of another config, `clips` aside since clip i does not depend on it; else leave the config."""
    path = out_dir / "synth.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))  # as the file holds it: tuples are lists
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        keys = (wanted.keys() | held.keys()) - {"clips"}
        if differing := sorted(key for key in keys if held.get(key) != wanted.get(key)):
            difference = ", ".join(f"{key} {held.get(key)} instead of {wanted.get(key)}" for key in differing)
            raise ValueError(f"{out_dir} holds clips of another config ({difference}): take another folder or empty it")
    (out_dir / "videos").mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _report(progress: Callable[[int], object] | None, number: int) -> None:
    if progress and number:
        progress(number)


def _film_all(
    indices: Sequence[int],
    *,
    out_dir: Path,
    config: SynthConfig,
    workers: int | None,
    progress: Callable[[int], object] | None,
) -> None:
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    film = functools.partial(_film, out_dir=out_dir, config=config)
    if workers <= 1:
        for chunk in chunks:
            _report(progress, film(chunk))
        return
    # Spawned, since a fork of a process with torch's or PyAV's threads may hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(film, chunk) for chunk in chunks]):
            _report(progress, done.result())


def _film(indices: Sequence[int], *, out_dir: Path, config: SynthConfig) -> int:
    """Film some clips and return how many."""
    for index in indices:
        scene, reference = sample_clip(config, index=index)
        sound = render_audio(scene, np.random.default_rng((config.seed, index)), config=config)
        write_video(out_dir / reference.video, render_frames(scene, config=config), sound, config=config)
    return len(indices)


def _paint(image: Floats, *, mask: Floats, place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    left, top = place[0] - mask.shape[1] // 2, place[1] - mask.shape[0] // 2
    part = image[top : top + mask.shape[0], left : left + mask.shape[1]]
    part += mask[..., None] * (np.array(colour, dtype=float) - part)


@functools.cache
def _mask(shape: str, diameter: int) -> Floats:
    """How much of each pixel the shape covers, (diameter, diameter) in 0..1."""
    axis = (np.arange(diameter * OVERSAMPLING) + 0.5) / (diameter * OVERSAMPLING) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.88
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.98)
    elif shape == "triangle":
        inside = _inside_polygon(x, y, corners=[(0, -0.95), (1, 0.9), (-1, 0.9)])
    else:
        radii, angles = (1, 0.48) * 5, [math.pi * (step / 5 - 0.5) for step in range(10)]
        inside = _inside_polygon(
            x, y, corners=[(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
        )
    return inside.reshape(diameter, OVERSAMPLING, diameter, OVERSAMPLING).mean(axis=(1, 3))


def _inside_polygon(x: Floats, y: Floats, *, corners: list[tuple[float, float]]) -> NDArray[np.bool_]:
    """Even-odd rule: a ray to the right crosses the outline an odd number of times."""
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return inside


def _wave(happening: SceneEvent, rng: np.random.Generator, *, seconds: Floats) -> Floats:
    """One sound at full amplitude over its time axis."""
    kind, length = happening.value, happening.end_seconds - happening.start_seconds
    if kind == "clicks":
        since = _since_pulse(seconds, length=length, number=min(max(round(length / 0.25), 4), 6))
        return rng.uniform(-1, 1, len(seconds)) * np.exp(-since / 0.015)
    if kind == "noise":
        wave = rng.uniform(-1, 1, len(seconds))
    elif kind == "beeps":
        number = 3 if length < 1.2 else 4
        since = _since_pulse(seconds, length=length, number=number)
        wave = np.sin(2 * np.pi * BEEP_HZ * seconds) * np.clip((0.55 * length / number - since) / 0.01, 0, 1)
    elif kind.endswith("sweep"):
        start, end = SWEEP_HZ if kind == "rising sweep" else SWEEP_HZ[::-1]
        # Phase of a pitch that climbs evenly, as the ear hears it: the integral of start * (end / start)^(t / length).
        rate = math.log(end / start) / length
        wave = np.sin(2 * np.pi * start * np.expm1(rate * seconds) / rate)
    else:
        hertz = happening.pitch * (LOW_HZ if kind == "low tone" else HIGH_HZ)
        wave = np.sin(2 * np.pi * hertz * seconds)
    return wave * np.clip(np.minimum(seconds, length - seconds) / FADE_SECONDS, 0, 1)


def _since_pulse(seconds: Floats, *, length: float, number: int) -> Floats:
    """Seconds since the last of `number` evenly spread pulses."""
    return seconds % (length / number)
