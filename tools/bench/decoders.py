"""Benchmark reading sparse frames and audio: ours against decord, torchcodec and sequential PyAV decoding.

    python tools/bench/decoders.py [--out bench.json] [--quick] [--repeats 3]

decord and torchcodec are measured where they are installed. The clips show two textures panning over each other at 30
fps, with a tone. Each reader returns frames of 384 x 384 and 16 kHz audio; decord uses the audio of our reader, since
its own is out of sync. Before a row counts, its frames are compared with ours.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
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


def read_decord(path: Path, case: Case) -> Read:
    """Read frames with decord's get_batch, audio with our reader."""
    decord = importlib.import_module("decord")
    try:
        frames = decord.VideoReader(str(path)).get_batch(case.numbers).asnumpy()
    except decord.DECORDError as error:
        raise Unreadable(f"decord cannot read {case.codec}") from error
    waveform = read_clip(path, case.sampler, video=False).waveform
    assert waveform is not None
    return scaled(frames), waveform


def read_torchcodec(path: Path, case: Case) -> Read:
    """Read frames and audio with torchcodec, with one thread per core."""
    decoders = importlib.import_module("torchcodec.decoders")
    try:
        video = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0)
        frames = video.get_frames_at(indices=case.numbers).data.numpy()
        sound = decoders.AudioDecoder(str(path), sample_rate=SAMPLE_RATE_HZ, num_channels=1).get_all_samples()
    except RuntimeError as error:
        raise Unreadable(f"torchcodec cannot read {case.codec}") from error
    return scaled(frames), sound.data[0].numpy()


READERS: dict[str, Callable[[Path, Case], Read]] = {
    "ours": read_ours,
    "PyAV sequential": read_sequentially,
    "decord": read_decord,
    "torchcodec": read_torchcodec,
}


def installed() -> tuple[list[str], list[str]]:
    """Return the names of readers that can be measured here, and reasons for those that cannot."""
    found, missing = ["ours", "PyAV sequential"], []
    for name in ("decord", "torchcodec"):
        try:
            importlib.import_module("torchcodec.decoders" if name == "torchcodec" else name)
            found.append(name)
        except ImportError:
            missing.append(f"{name} is not installed")
        except (OSError, RuntimeError):
            missing.append(f"{name} cannot load FFmpeg")
    return found, missing


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
    if notes["PyAV sequential"]:
        raise SystemExit(
            f"{case.name}: PyAV sequential and ours differ ({notes['PyAV sequential']}); one of them is wrong"
        )
    timings = interleave({name: partial(read, name) for name in last}, repeats=repeats)
    rows = []
    for name in names[1:]:
        row: BenchRow = {
            "part": "decoders",
            "name": f"{case.name}: {name}",
            "ours_seconds": round(timings["ours"].seconds, 4),
        }
        if name in timings:
            row |= compare(row["name"], timings["ours"], timings[name])
        rows.append(row | ({"note": notes[name]} if notes[name] else {}))
    return rows


def run(cases: list[Case], folder: Path, *, repeats: int) -> list[BenchRow]:
    """Measure all cases, and the memory of the last one."""
    names, missing = installed()
    rows: list[BenchRow] = [{"part": "decoders", "name": reason, "note": "not measured"} for reason in missing]
    for case in cases:
        segment = folder / f"{case.codec}_{case.height}_{case.key_seconds}.mp4"
        clip = segment.with_stem(f"{segment.stem}_{case.seconds}")
        if not segment.exists():
            encode_segment(segment, case)
        if not clip.exists():
            write_clip(clip, segment, seconds=case.seconds)
        rows += measure(case, clip, names, repeats=repeats)
    mib = {
        name: run_isolated(__file__, memory=json.dumps(asdict(case) | {"path": str(clip), "reader": name}))["step_mib"]
        for name in names
    }
    for row, name in zip(rows[-len(names) + 1 :], names[1:], strict=True):
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
    values = parser.parse_args()
    if values.memory:
        requested = json.loads(values.memory)
        path, name = Path(requested.pop("path")), requested.pop("reader")
        installed()
        emit_json(peak_mib(lambda: READERS[name](path, Case(**requested))))
        return
    with tempfile.TemporaryDirectory() as folder:
        report_rows(run(QUICK if values.quick else CASES, Path(folder), repeats=values.repeats), out=values.out)


if __name__ == "__main__":
    main()
