"""Benchmark reading sparse frames and audio: ours against its other readers and sequential PyAV decoding.

    python tools/bench/decoders.py [--out bench.json] [--quick] [--repeats 3] [--other_decord DIR]

The readers are those of `--reader`: decord and torchcodec where they are installed, and both also on a GPU where there
is one. decord 0.6.0 and decord2 have the same name in Python; to measure the one that is not installed as well, install
it into a folder: pip install --no-deps --target DIR decord==0.6.0

The clips show two textures panning over each other at 30 fps, with a tone. Each reader returns frames of 384 x 384 and
16 kHz audio, which PyAV decodes for all. Before a row counts, its frames are compared with ours.
"""

import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from jsonargparse import ArgumentParser
from PIL import Image
from rows import BenchRow, compare, emit_json, interleave, peak_mib, report_rows, run_isolated

from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FixedRateSampler

FPS = 30
SEGMENT_SECONDS = 10  # encoded once and repeated for longer clips
SOUND_HZ, SAMPLE_RATE_HZ = 44_100, 16_000
TONE_HZ = 440
SIDE = 384
# Faster colour conversion is up to 2 levels too dark; a frame that is 1/30 s off differs by 7 or more.
MAX_LEVEL_DIFFERENCE = 3.0
MAX_SOUND_DIFFERENCE = 0.01
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"preset": "veryfast"}),
    "hevc": ("libx265", {"preset": "ultrafast"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0"}),
    "av1": ("libsvtav1", {"preset": "12", "svtav1-params": "fast-decode=0"}),
    "mpeg4": ("mpeg4", {"b": "3000000"}),
}
Read = tuple[np.ndarray, np.ndarray]  # (F, 384, 384, 3) uint8, (S,) float32


class Unreadable(Exception):
    """A reader cannot read a clip."""


@dataclass(frozen=True)
class Case:
    """A clip and the frames to read from it.

    Args:
        codec: one of ENCODERS.
        height: 240 (320 x 240) or 720 (1280 x 720).
        key_seconds: keyframe interval in seconds.
        seconds: length of the clip.
        num_frames: frames spread over the whole clip, or 0 for one per second up to 110.
    """

    codec: str
    height: int
    key_seconds: int
    seconds: int
    num_frames: int = 0

    @property
    def name(self) -> str:
        """Name for the table."""
        frames = f"{self.num_frames} frames" if self.num_frames else "1 a second"
        return f"{self.codec} {self.height}p {self.seconds} s, key {self.key_seconds} s, {frames}"

    @property
    def width(self) -> int:
        """Frame width in pixels."""
        return 320 if self.height == 240 else 1280

    @property
    def sampler(self) -> FixedRateSampler:
        """Frame sampler for our reader."""
        return (
            FixedRateSampler(frames_per_second=FPS, max_frames=self.num_frames)
            if self.num_frames
            else FixedRateSampler()
        )

    @property
    def numbers(self) -> list[int]:
        """Indices of the same frames."""
        times = self.sampler.sample_times(0.0, float(self.seconds), self.seconds * FPS)
        return np.floor(times * FPS + 0.5).astype(int).tolist()


QUICK = [Case("h264", 240, 1, 10), Case("mpeg4", 240, 10, 10, 4)]
CASES = [
    *[Case(codec, height, key, SEGMENT_SECONDS) for height in (240, 720) for codec in ENCODERS for key in (1, 10)],
    *[Case("h264", 720, key, 30, frames) for key in (1, 10) for frames in (0, 16)],
    Case("h264", 720, 1, 120),
    Case("h264", 720, 10, 120, 16),
    Case("h264", 720, 10, 120),
]


def encode_segment(path: Path, case: Case) -> None:
    """Encode the first 10 s of video."""
    os.environ["SVT_LOG"] = "1"  # the AV1 encoder logs errors only
    texture = make_texture(case.height, case.width)
    encoder, options = ENCODERS[case.codec]
    interval = case.key_seconds * FPS
    if case.codec == "hevc":
        options = options | {"x265-params": f"keyint={interval}:min-keyint={interval}:open-gop=0:log-level=none"}
    with av.open(str(path), "w") as out:
        video: Any = out.add_stream(encoder, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = case.width, case.height, "yuv420p"
        video.codec_context.gop_size = interval
        if case.height > 576:  # the readers take HD of unknown colour space for SD
            video.codec_context.colorspace = Colorspace.ITU709
        for number in range(SEGMENT_SECONDS * FPS):
            top, left = 2 * number % case.height, 3 * number % case.width
            front = texture[top : top + case.height, left : left + case.width]
            back = texture[case.height - top :, case.width - left :][: case.height, : case.width]
            picture = ((3 * front.astype(np.uint16) + back) >> 2).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))


def make_texture(height: int, width: int) -> np.ndarray:
    """Return a texture (2 H, 2 W, 3) uint8 of noise at three scales."""
    rng, texture = np.random.default_rng(0), np.zeros((2 * height, 2 * width, 3))
    for pixels, share in ((4, 0.2), (16, 0.3), (64, 0.5)):
        blots = rng.integers(0, 256, (2 * height // pixels + 1, 2 * width // pixels + 1, 3), dtype=np.uint8)
        texture += share * np.asarray(Image.fromarray(blots).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    return texture.astype(np.uint8)


def write_clip(path: Path, segment: Path, *, seconds: int) -> None:
    """Repeat a segment that begins with a keyframe by remuxing, and add a tone."""
    at = np.arange(SOUND_HZ) / SOUND_HZ
    tone = np.repeat((8000 * np.sin(2 * np.pi * TONE_HZ * at)).astype(np.int16), 2)[None]
    with av.open(str(path), "w") as out:
        with av.open(str(segment)) as first:
            video = out.add_stream_from_template(first.streams.video[0], opaque=True)
        audio = out.add_stream("aac", rate=SOUND_HZ, layout="stereo")
        for begin in range(0, seconds, SEGMENT_SECONDS):
            with av.open(str(segment)) as source:
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None and packet.pts is not None:
                        shift = round(begin / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, video
                        out.mux(packet)
            for second in range(begin, begin + SEGMENT_SECONDS):
                sound = av.AudioFrame.from_ndarray(tone, format="s16", layout="stereo")
                sound.sample_rate, sound.time_base, sound.pts = SOUND_HZ, Fraction(1, SOUND_HZ), second * SOUND_HZ
                out.mux(audio.encode(sound))
        out.mux(audio.encode(None))


def scaled(frames: Iterator[np.ndarray] | np.ndarray) -> np.ndarray:
    """Scale frames one by one, as our reader does."""
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), bicubic)) for frame in frames])


def read_ours(path: Path, case: Case) -> Read:
    """Read with the project's reader."""
    clip = read_clip(path, case.sampler)
    assert clip.waveform is not None
    return clip.frames, clip.waveform


def read_sequentially(path: Path, case: Case) -> Read:
    """Decode the whole file with PyAV; selected frames are kept at full size and scaled at the end."""
    expected, count, frames, sound = set(case.numbers), 0, [], []
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ, options={"rematrix_maxval": "1.0"})
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        video.codec_context.thread_type = "AUTO"
        for frame in container.decode(video, audio):
            if isinstance(frame, av.AudioFrame):
                sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
                continue
            if count in expected:
                frames.append(frame.to_ndarray(format="rgb24"))
            count += 1
    sound += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return scaled(iter(frames)), np.concatenate(sound)


class _FallbackHandler(logging.Handler):
    """Raises an error where our reader would report that it decodes with PyAV instead of the requested reader."""

    def emit(self, record: logging.LogRecord) -> None:
        raise Unreadable(record.getMessage().partition(": ")[2])


def read_with(reader: str, path: Path, case: Case) -> Read:
    """Read with another reader than PyAV, without falling back to it."""
    logger, handler = logging.getLogger("salmonn.media.video"), _FallbackHandler(logging.DEBUG)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        clip = read_clip(path, case.sampler, reader=reader)
    except Unreadable as error:
        raise Unreadable(f"{reader} cannot read {case.codec}") from error
    except ValueError as error:
        raise Unreadable(str(error).partition(";")[0]) from error
    finally:
        logger.removeHandler(handler)
    assert clip.waveform is not None
    return clip.frames, clip.waveform


OTHERS = ("decord", "torchcodec", "decord:cuda", "torchcodec:cuda")
READERS: dict[str, Callable[[Path, Case], Read]] = {
    "ours": read_ours,
    "PyAV sequential": read_sequentially,
    **{name: partial(read_with, name) for name in OTHERS},
}


def installed() -> tuple[list[str], list[str]]:
    """Return the other readers that can be measured here, and reasons for those that cannot."""
    found, missing = [], []
    for name in OTHERS:
        if importlib.util.find_spec(name.partition(":")[0]) is None:
            missing.append(f"{name} is not installed")
        elif name.endswith(":cuda") and not torch.cuda.is_available():
            missing.append(f"{name} needs a GPU")
        else:
            found.append(name)
    return found, missing


def label(name: str) -> str:
    """Return the name of a reader for the table: decord with its version, since there are two packages of that name."""
    decord = sys.modules.get("decord")
    return name if decord is None else name.replace("decord", f"decord {decord.__version__}")


def differences(read: Read, ours: Read) -> str:
    """Describe how a result differs from ours; empty if it does not."""
    if read[0].shape != ours[0].shape:
        return f"{len(read[0])} frames for {len(ours[0])}"
    levels = max(np.abs(a.astype(int) - b).mean() for a, b in zip(read[0], ours[0], strict=True))
    if levels > MAX_LEVEL_DIFFERENCE:
        return f"wrong frames: up to {levels:.1f} levels away"
    shared = min(len(read[1]), len(ours[1]))
    # The last packet exceeds the end of the clip, and some readers cut it.
    if abs(len(read[1]) - len(ours[1])) > SAMPLE_RATE_HZ // 10:
        return f"sound of {len(read[1]) / SAMPLE_RATE_HZ:.2f} s for {len(ours[1]) / SAMPLE_RATE_HZ:.2f} s"
    if np.abs(read[1][:shared] - ours[1][:shared]).max() < MAX_SOUND_DIFFERENCE:
        return ""
    loud, right = (float(np.sqrt(np.mean(np.square(sound[:shared])))) for sound in (read[1], ours[1]))
    return f"other sound, {loud / right:.2f} times as loud"


def measure(case: Case, path: Path, names: list[str], *, repeats: int) -> list[BenchRow]:
    """Measure all readers on one clip; readers that fail get a note instead of a time.

    Raises:
        SystemExit: ours differs from sequential decoding.
    """
    last: dict[str, Read] = {}

    def read(name: str) -> None:
        last[name] = READERS[name](path, case)

    notes = {}
    for name in names:
        try:
            read(name)
            notes[name] = differences(last[name], last["ours"])
        except Unreadable as error:
            notes[name] = str(error)
    if note := notes.get("PyAV sequential"):
        raise SystemExit(f"{case.name}: PyAV sequential and ours differ ({note}); one of them is wrong")
    timings = interleave({name: partial(read, name) for name in last}, repeats=repeats)
    rows = []
    for name in names[1:]:
        row: BenchRow = {
            "part": "decoders",
            "name": f"{case.name}: {label(name)}",
            "ours_seconds": round(timings["ours"].seconds, 4),
        }
        if name in timings:
            row |= compare(row["name"], timings["ours"], timings[name])
        rows.append(row | ({"note": notes[name]} if notes[name] else {}))
    return rows


def measure_isolated(
    case: Case, path: Path, name: str, *, repeats: int, package_dir: Path | str = ""
) -> list[BenchRow]:
    """Measure one of the other readers in a separate process, since decord and torchcodec crash in the same one."""
    requested = asdict(case) | {"path": str(path), "reader": name, "repeats": repeats, "package_dir": str(package_dir)}
    rows: list[BenchRow] = run_isolated(__file__, only=json.dumps(requested))["rows"]
    return rows


def run(cases: list[Case], folder: Path, *, repeats: int, other_decord: Path | None = None) -> list[BenchRow]:
    """Measure all cases, and the memory of the last one."""
    others, missing = installed()
    rows: list[BenchRow] = [{"part": "decoders", "name": reason, "note": "not measured"} for reason in missing]
    for case in cases:
        segment = folder / f"{case.codec}_{case.height}_{case.key_seconds}.mp4"
        clip = segment.with_stem(f"{segment.stem}_{case.seconds}")
        if not segment.exists():
            encode_segment(segment, case)
        if not clip.exists():
            write_clip(clip, segment, seconds=case.seconds)
        if other_decord:
            rows += measure_isolated(case, clip, "decord", repeats=repeats, package_dir=other_decord)
        rows += measure(case, clip, ["ours", "PyAV sequential"], repeats=repeats)
        for name in others:
            rows += measure_isolated(case, clip, name, repeats=repeats)
    names = ("PyAV sequential", *others)
    measured = {name: row for name, row in zip(names, rows[-len(names) :], strict=True) if "ratio" in row}
    mib = {
        name: run_isolated(__file__, memory=json.dumps(asdict(case) | {"path": str(clip), "reader": name}))["step_mib"]
        for name in ("ours", *measured)
    }
    for name, row in measured.items():
        row.update(ours_mib=mib["ours"], other_mib=mib[name])
    return rows


def main() -> None:
    """Parse flags, run, report."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path | None, default=None, help="file of rows in JSON")
    parser.add_argument("--quick", action="store_true", help="two small clips, for testing")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each reader; the median is reported")
    parser.add_argument(
        "--memory", type=str | None, default=None, help="internal: measure the memory of one reader in this process"
    )
    parser.add_argument("--other_decord", type=Path | None, default=None, help="folder with another decord package")
    parser.add_argument("--only", type=str | None, default=None, help="internal: rows of one reader on one clip")
    values = parser.parse_args()
    if values.memory:
        requested = json.loads(values.memory)
        path, name = Path(requested.pop("path")), requested.pop("reader")
        emit_json(peak_mib(lambda: READERS[name](path, Case(**requested))))
        return
    if values.only:
        requested = json.loads(values.only)
        path, name, repeats = Path(requested.pop("path")), requested.pop("reader"), requested.pop("repeats")
        sys.path.insert(0, requested.pop("package_dir"))
        emit_json({"rows": measure(Case(**requested), path, ["ours", name], repeats=repeats)})
        return
    cases = QUICK if values.quick else CASES
    with tempfile.TemporaryDirectory() as folder:
        report_rows(run(cases, Path(folder), repeats=values.repeats, other_decord=values.other_decord), out=values.out)


if __name__ == "__main__":
    main()
