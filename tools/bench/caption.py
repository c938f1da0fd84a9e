"""How long `salmonn caption` takes on one long clip, and how much memory: start-up, decoding and model together.

    python tools/bench/caption.py [--seconds 5 30 120] [--model FOLDER_OR_ID]

The clips are 1280 x 720 at 30 frames a second, H.264 and AAC, a moving texture that no codec makes small. Each is
captioned by a process of its own, whose wall time, processor time and peak of resident memory are printed.
"""

import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

WIDTH, HEIGHT, FPS = 1280, 720, 30
SAMPLE_RATE_HZ = 44_100
MIB_IN_KIB = 1024


def main() -> None:
    """Render, caption, print."""
    parser = ArgumentParser(description="Time and memory of `salmonn caption` on long 720p clips.")
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 30, 120], help="lengths of the clips")
    parser.add_argument("--model", type=str | None, default=None, help="another model than the shipped one")
    values = parser.parse_args()
    table = Table("clip, s", "wall, s", "processor, s", "peak memory, MiB", title="salmonn caption, 1280 x 720")
    with tempfile.TemporaryDirectory() as folder:
        for seconds in values.seconds:
            clip = Path(folder) / f"{seconds}.mp4"
            render(clip, seconds=seconds)
            table.add_row(str(seconds), *caption(clip, values.model))
    Console().print(table)


def render(path: Path, *, seconds: int) -> None:
    """Write a clip whose picture slides over a texture, with a tone."""
    blocks = np.random.default_rng(0).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
    texture = blocks.repeat(8, axis=0).repeat(8, axis=1)
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ)).astype(np.int16)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        for number in range(seconds * FPS):
            top, left = 2 * number % HEIGHT, 3 * number % WIDTH
            picture = np.ascontiguousarray(texture[top : top + HEIGHT, left : left + WIDTH])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
            if number % FPS == 0:
                sound = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
                sound.sample_rate, sound.time_base = SAMPLE_RATE_HZ, Fraction(1, SAMPLE_RATE_HZ)
                sound.pts = number // FPS * SAMPLE_RATE_HZ
                container.mux(audio.encode(sound))
        for stream in (video, audio):
            container.mux(stream.encode(None))


def caption(clip: Path, model: str | None) -> list[str]:
    """Wall seconds, processor seconds and peak MiB of a process that captions the clip."""
    command = [str(Path(sys.executable).with_name("salmonn")), "caption", str(clip), "--out", str(clip) + ".jsonl"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, *(["--model", model] if model else [])], stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} failed: run it to see why")
    return [f"{wall:.1f}", f"{used.ru_utime + used.ru_stime:.1f}", f"{used.ru_maxrss / MIB_IN_KIB:.0f}"]


if __name__ == "__main__":
    main()
