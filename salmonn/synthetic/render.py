"""Render synthetic scenes: frames and audio with numpy, encoded as MP4 (H.264 and AAC), with exact annotation.

    references = make_clips("data/synth", SynthConfig(clips=1000, seed=0))

writes `videos/clip_00000.mp4`, ... and `clips.jsonl` with one `Reference` per line. Clip i depends on the seed and i
only, so that sets can be extended and any number of workers writes the same files.
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

from salmonn import system
from salmonn.files import write_json, write_records
from salmonn.records import Reference
from salmonn.synthetic.annotate import write_reference
from salmonn.synthetic.lexicon import COLOURS
from salmonn.synthetic.scene import Scene, SceneEvent, SynthConfig, objects_at, sample_scene

__all__ = ["SynthConfig", "make_clips", "render_audio", "render_frames", "sample_clip", "write_video"]

LOW_HZ, HIGH_HZ, BEEP_HZ = 250, 1800, 1000
SWEEP_HZ = (300, 2500)
FADE_SECONDS = 0.03
CHUNK = 16  # clips per worker task: long compared with a call, short compared with an interrupted run
OVERSAMPLING = 4  # per side, for anti-aliased edges

Floats = NDArray[np.float64]


def make_clips(
    out_dir: Path | str,
    config: SynthConfig,
    *,
    indices: Sequence[int] | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Reference]:
    """Render clips and write their annotation; existing clips are kept.

    Args:
        out_dir: folder for `videos/`, `clips.jsonl` (the selected clips only) and `synth.json` (the config).
        config: sizes and seed; if the folder holds clips already, only `clips` may differ.
        indices: clips to write (default: all).
        workers: number of processes (default: one per available core; up to 16 clips are rendered in this process).
            Scripts that use several need the usual `if __name__ == "__main__"`.
        progress: callback with the number of clips just finished, for example `tqdm(...).update`.

    Raises:
        ValueError: the folder holds clips of another config, or an index is out of range.
    """
    out_dir, progress = Path(out_dir), progress or (lambda _: None)
    indices = range(config.clips) if indices is None else indices
    if bad := [index for index in indices if not 0 <= index < config.clips]:
        raise ValueError(f"clip {bad[0]} is out of range: the config has {config.clips} clips")
    _check_folder(out_dir, config=config)
    references = [sample_clip(config, index=index)[1] for index in indices]
    missing = [
        index for index, reference in zip(indices, references, strict=True) if not (out_dir / reference.video).exists()
    ]
    if len(missing) < len(references):
        progress(len(references) - len(missing))
    chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
    render = functools.partial(_render_clips, out_dir=out_dir, config=config)
    workers = min(workers or system.num_cpus(), len(chunks))
    if workers <= 1:
        for chunk in chunks:
            progress(render(chunk))
    else:
        # Spawned: a fork of a process with torch's or PyAV's threads may deadlock.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(render, chunk) for chunk in chunks]):
                progress(done.result())
    write_records(out_dir / "clips.jsonl", references)
    return references


def sample_clip(config: SynthConfig, *, index: int) -> tuple[Scene, Reference]:
    """Sample the scene and the annotation of one clip, without rendering it."""
    scene = sample_scene(random.Random(f"scene {config.seed} {index}"), config=config)
    rng = random.Random(f"words {config.seed} {index}")
    video = f"videos/clip_{index:05d}.mp4"
    return scene, write_reference(scene, rng, video=video, index=index, num_questions=config.questions)


def render_frames(scene: Scene, *, config: SynthConfig) -> NDArray[np.uint8]:
    """Render the frames, (F, height, width, 3) RGB; frame k shows the scene at k / fps seconds."""
    size, number = config.size_pixels, round(scene.duration_seconds * config.fps)
    ramp = np.linspace(0, 1, size)
    slope = ((ramp[:, None] + ramp[None]) / 2)[..., None]
    first, last = (np.array(corner, dtype=float) for corner in scene.background)
    background = first + slope * (last - first)
    frames = np.empty((number, size, size, 3), dtype=np.uint8)
    previous: list[object] = []
    for index in range(number):
        visible = [item for item in objects_at(scene, index / config.fps + 1e-6) if item.visible]
        # Most frames equal the one before.
        if index and visible == previous:
            frames[index] = frames[index - 1]
            continue
        image = background.copy()
        for item in visible:
            mask = _mask(item.shape, scene.diameter)
            left, top = item.position[0] - mask.shape[1] // 2, item.position[1] - mask.shape[0] // 2
            part = image[top : top + mask.shape[0], left : left + mask.shape[1]]
            part += mask[..., None] * (np.array(COLOURS[item.colour], dtype=float) - part)
        frames[index] = image.round().astype(np.uint8)
        previous = list(visible)
    return frames


def render_audio(scene: Scene, rng: np.random.Generator, *, config: SynthConfig) -> NDArray[np.float32]:
    """Render the mono audio, (samples,) in -1..1; `rng` generates the noise."""
    rate = config.sample_rate_hz
    audio = scene.noise_amplitude * rng.standard_normal(round(scene.duration_seconds * rate))
    for event in scene.events:
        if event.kind == "sound":
            first, last = (round(seconds * rate) for seconds in (event.start_seconds, event.end_seconds))
            wave = _wave(event, rng, seconds=np.arange(last - first) / rate)
            audio[first:last] += event.amplitude * wave[: len(audio) - first]
    return np.clip(audio, -1, 1).astype(np.float32)


def write_video(path: Path, frames: NDArray[np.uint8], audio: NDArray[np.float32], *, config: SynthConfig) -> None:
    """Encode frames, (F, height, width, 3), and audio, (samples,), to a file, which is written atomically."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
    # One thread: clips are small, and there is a worker per core.
    options = {"preset": "veryfast", "crf": "18", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(temporary), "w") as container:
        video_stream = container.add_stream("libx264", rate=config.fps, options=options)
        video_stream.width, video_stream.height, video_stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio_stream = container.add_stream("aac", rate=config.sample_rate_hz, layout="mono")
        audio_stream.bit_rate = 64_000
        for image in frames:
            container.mux(video_stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video_stream.encode(None))
        samples = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts = config.sample_rate_hz, 0
        samples.time_base = Fraction(1, config.sample_rate_hz)
        container.mux(audio_stream.encode(samples))
        container.mux(audio_stream.encode(None))
    temporary.replace(path)


def _check_folder(out_dir: Path, *, config: SynthConfig) -> None:
    """Refuse a folder with clips of another config, except for `clips`; create it and write the config."""
    path = out_dir / "synth.json"
    new = json.loads(json.dumps(dataclasses.asdict(config)))  # with lists for tuples, as in the file
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        keys = (new.keys() | old.keys()) - {"clips"}
        if differing := sorted(key for key in keys if old.get(key) != new.get(key)):
            difference = ", ".join(f"{key} {old.get(key)} instead of {new.get(key)}" for key in differing)
            raise ValueError(f"{out_dir} holds clips of another config ({difference}): use another folder or empty it")
    (out_dir / "videos").mkdir(parents=True, exist_ok=True)
    write_json(path, new)


def _render_clips(indices: Sequence[int], *, out_dir: Path, config: SynthConfig) -> int:
    """Render clips and return their number."""
    for index in indices:
        scene, reference = sample_clip(config, index=index)
        audio = render_audio(scene, np.random.default_rng((config.seed, index)), config=config)
        write_video(out_dir / reference.video, render_frames(scene, config=config), audio, config=config)
    return len(indices)


@functools.cache
def _mask(shape: str, diameter: int) -> Floats:
    """Return the share of each pixel that a shape covers, (diameter, diameter) in 0..1."""
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
    """Test points by the even-odd rule: a ray to the right crosses the outline an odd number of times."""
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return inside


def _wave(event: SceneEvent, rng: np.random.Generator, *, seconds: Floats) -> Floats:
    """Synthesize a sound at full amplitude; `seconds` (samples,) is the time since its start."""
    kind, length = event.value, event.end_seconds - event.start_seconds
    if kind == "clicks":
        period = length / event.num_pulses
        return rng.uniform(-1, 1, len(seconds)) * np.exp(-(seconds % period) / 0.015)
    if kind == "noise":
        wave = rng.uniform(-1, 1, len(seconds))
    elif kind == "beeps":
        period = length / event.num_pulses
        wave = np.sin(2 * np.pi * BEEP_HZ * seconds) * np.clip((0.55 * period - seconds % period) / 0.01, 0, 1)
    elif kind.endswith("sweep"):
        start, end = SWEEP_HZ if kind == "rising sweep" else SWEEP_HZ[::-1]
        # An exponential sweep; its phase is the integral of start * (end / start)^(t / length).
        rate = math.log(end / start) / length
        wave = np.sin(2 * np.pi * start * np.expm1(rate * seconds) / rate)
    else:
        hertz = event.pitch * (LOW_HZ if kind == "low tone" else HIGH_HZ)
        wave = np.sin(2 * np.pi * hertz * seconds)
    return wave * np.clip(np.minimum(seconds, length - seconds) / FADE_SECONDS, 0, 1)
