"""Readers of sparse frames and sound: ours against decord, torchcodec and PyAV read plainly from start to end.

    python tools/bench/decoders.py [--out bench.json] [--quick] [--repeats 3]

decord and torchcodec are measured where they are installed. The clips are two textures that slide over each other, at
30 frames a second, with a tone. Each reader gives frames of 384 x 384 and 16 kHz sound; decord gets its sound from our
reader, for its own is out of step. Before a row counts, its frames are compared with ours.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from jsonargparse import ArgumentParser
from PIL import Image
from rows import BenchRow, alone, compare, hand_in, interleave, peak_mib, tell

from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FixedRateSampler

FPS = 30
PIECE_SECONDS = 10  # encoded once, and repeated to make a longer clip
SOUND_HZ, SAMPLE_RATE_HZ = 44_100, 16_000
TONE_HZ = 440
SIDE = 384
# The others' quicker conversion is up to 2 levels too dark; a picture 1/30 s too early or late is 7 or more away.
MOST_LEVELS = 3.0
SOUND_LEVEL = 0.01
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"preset": "veryfast"}),
    "hevc": ("libx265", {"preset": "ultrafast"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0"}),
    "av1": ("libsvtav1", {"preset": "12", "svtav1-params": "fast-decode=0"}),
    "mpeg4": ("mpeg4", {"b": "3000000"}),
}
Read = tuple[np.ndarray, np.ndarray]  # (F, 384, 384, 3) uint8, (S,) float32


class Unreadable(Exception):
    """A reader cannot read a clip; inside this file only."""


@dataclass(frozen=True)
class Case:
    """A clip and the frames that are wanted of it.

    Args:
        codec: one of ENCODERS.
        height: 240 (of 320 x 240) or 720 (of 1280 x 720).
        key_seconds: from one keyframe to the next.
        seconds: length.
        num_frames: so many over the whole clip, or 0 for one a second up to 110.
    """

    codec: str
    height: int
    key_seconds: int
    seconds: int
    num_frames: int = 0

    @property
    def name(self) -> str:
        """In words."""
        frames = f"{self.num_frames} frames" if self.num_frames else "1 a second"
        return f"{self.codec} {self.height}p {self.seconds} s, key {self.key_seconds} s, {frames}"

    @property
    def width(self) -> int:
        """Of the picture."""
        return 320 if self.height == 240 else 1280

    @property
    def sampler(self) -> FixedRateSampler:
        """Which frames our reader takes."""
        return (
            FixedRateSampler(frames_per_second=FPS, max_frames=self.num_frames)
            if self.num_frames
            else FixedRateSampler()
        )

    @property
    def numbers(self) -> list[int]:
        """The same frames, counted from 0."""
        times = self.sampler.sample_times(0.0, float(self.seconds), self.seconds * FPS)
        return np.floor(times * FPS + 0.5).astype(int).tolist()


QUICK = [Case("h264", 240, 1, 10), Case("mpeg4", 240, 10, 10, 4)]
CASES = [
    *[Case(codec, height, key, PIECE_SECONDS) for height in (240, 720) for codec in ENCODERS for key in (1, 10)],
    *[Case("h264", 720, key, 30, frames) for key in (1, 10) for frames in (0, 16)],
    Case("h264", 720, 1, 120),
    Case("h264", 720, 10, 120, 16),
    Case("h264", 720, 10, 120),
]


def encode_piece(path: Path, case: Case) -> None:
    """Write the first 10 s of a picture."""
    os.environ["SVT_LOG"] = "1"  # of the AV1 encoder: errors only
    texture = draw_texture(case.height, case.width)
    encoder, options = ENCODERS[case.codec]
    interval = case.key_seconds * FPS
    if case.codec == "hevc":
        options = options | {"x265-params": f"keyint={interval}:min-keyint={interval}:open-gop=0:log-level=none"}
    with av.open(str(path), "w") as out:
        video: Any = out.add_stream(encoder, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = case.width, case.height, "yuv420p"
        video.codec_context.gop_size = interval
        for number in range(PIECE_SECONDS * FPS):
            top, left = 2 * number % case.height, 3 * number % case.width
            front = texture[top : top + case.height, left : left + case.width]
            back = texture[case.height - top :, case.width - left :][: case.height, : case.width]
            picture = ((3 * front.astype(np.uint16) + back) >> 2).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))


def draw_texture(height: int, width: int) -> np.ndarray:
    """(2 H, 2 W, 3) uint8: coarse blots with finer ones on them."""
    draw, texture = np.random.default_rng(0), np.zeros((2 * height, 2 * width, 3))
    for pixels, share in ((4, 0.2), (16, 0.3), (64, 0.5)):
        blots = draw.integers(0, 256, (2 * height // pixels + 1, 2 * width // pixels + 1, 3), dtype=np.uint8)
        texture += share * np.asarray(Image.fromarray(blots).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    return texture.astype(np.uint8)


def write_clip(path: Path, piece: Path, *, seconds: int) -> None:
    """Repeat a piece, which begins with a keyframe, without encoding it again, and add a tone."""
    at = np.arange(SOUND_HZ) / SOUND_HZ
    tone = np.repeat((8000 * np.sin(2 * np.pi * TONE_HZ * at)).astype(np.int16), 2)[None]
    with av.open(str(path), "w") as out:
        with av.open(str(piece)) as first:
            video = out.add_stream_from_template(first.streams.video[0], opaque=True)
        audio = out.add_stream("aac", rate=SOUND_HZ, layout="stereo")
        for begin in range(0, seconds, PIECE_SECONDS):
            with av.open(str(piece)) as source:
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None and packet.pts is not None:
                        shift = round(begin / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, video
                        out.mux(packet)
            for second in range(begin, begin + PIECE_SECONDS):
                sound = av.AudioFrame.from_ndarray(tone, format="s16", layout="stereo")
                sound.sample_rate, sound.time_base, sound.pts = SOUND_HZ, Fraction(1, SOUND_HZ), second * SOUND_HZ
                out.mux(audio.encode(sound))
        out.mux(audio.encode(None))


def scaled(frames: Iterator[np.ndarray] | np.ndarray) -> np.ndarray:
    """As ours scales them, one after the other."""
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), bicubic)) for frame in frames])


def read_ours(path: Path, case: Case) -> Read:
    """Frames and sound by the project's reader."""
    clip = read_clip(path, case.sampler)
    assert clip.waveform is not None
    return clip.frames, clip.waveform


def read_plainly(path: Path, case: Case) -> Read:
    """PyAV from start to end; the wanted frames are kept at full size and scaled in the end."""
    wanted, count, frames, sound = set(case.numbers), 0, [], []
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ, options={"rematrix_maxval": "1.0"})
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        video.codec_context.thread_type = "AUTO"
        for frame in container.decode(video, audio):
            if isinstance(frame, av.AudioFrame):
                sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
                continue
            if count in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            count += 1
    sound += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return scaled(iter(frames)), np.concatenate(sound)


def read_decord(path: Path, case: Case) -> Read:
    """decord's batch of frames, with our sound."""
    decord = importlib.import_module("decord")
    try:
        frames = decord.VideoReader(str(path)).get_batch(case.numbers).asnumpy()
    except decord.DECORDError as error:
        raise Unreadable(f"decord cannot read {case.codec}") from error
    waveform = read_clip(path, case.sampler, video=False).waveform
    assert waveform is not None
    return scaled(frames), waveform


def read_torchcodec(path: Path, case: Case) -> Read:
    """torchcodec's batch of frames and its own sound, with as many threads as there are cores."""
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
    "PyAV plainly": read_plainly,
    "decord": read_decord,
    "torchcodec": read_torchcodec,
}


def installed() -> tuple[list[str], list[str]]:
    """Names of readers that can be measured here, and of those that cannot, with the reason."""
    found, missing = ["ours", "PyAV plainly"], []
    for name in ("decord", "torchcodec"):
        try:
            importlib.import_module("torchcodec.decoders" if name == "torchcodec" else name)
            found.append(name)
        except ImportError:
            missing.append(f"{name} is not installed")
        except (OSError, RuntimeError):
            missing.append(f"{name} finds no FFmpeg that it can load")
    return found, missing


def differences(read: Read, ours: Read) -> str:
    """What differs, in words; nothing where nothing does."""
    if read[0].shape != ours[0].shape:
        return f"{len(read[0])} frames for {len(ours[0])}"
    levels = max(np.abs(a.astype(int) - b).mean() for a, b in zip(read[0], ours[0], strict=True))
    if levels > MOST_LEVELS:
        return f"wrong frames: up to {levels:.1f} levels away"
    shared = min(len(read[1]), len(ours[1]))
    # The codec's last packet is whole, and some readers cut what is beyond the end.
    if abs(len(read[1]) - len(ours[1])) > SAMPLE_RATE_HZ // 10:
        return f"sound of {len(read[1]) / SAMPLE_RATE_HZ:.2f} s for {len(ours[1]) / SAMPLE_RATE_HZ:.2f} s"
    if np.abs(read[1][:shared] - ours[1][:shared]).max() < SOUND_LEVEL:
        return ""
    loud, right = (float(np.sqrt(np.mean(np.square(sound[:shared])))) for sound in (read[1], ours[1]))
    return f"other sound, {loud / right:.2f} times as loud"


def measure(case: Case, path: Path, names: list[str], *, repeats: int) -> list[BenchRow]:
    """A row for each other reader; those that fail say why and have no time.

    Raises:
        SystemExit: ours differs from the plain reading.
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
    if notes["PyAV plainly"]:
        raise SystemExit(f"{case.name}: PyAV plainly and ours differ ({notes['PyAV plainly']}): one of them is wrong")
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


def memory(case: Case, path: Path, name: str) -> int:
    """MiB that reading needs, in a process of its own."""
    asked: Mapping[str, Any] = asdict(case) | {"path": str(path), "reader": name}
    answer: BenchRow = alone(__file__, f"--memory={json.dumps(asked)}")
    return int(answer["step_mib"])


def run(cases: list[Case], folder: Path, *, repeats: int) -> list[BenchRow]:
    """Rows of all cases; memory of the last."""
    names, missing = installed()
    rows: list[BenchRow] = [{"part": "decoders", "name": reason, "note": "not measured"} for reason in missing]
    for case in cases:
        piece = folder / f"{case.codec}_{case.height}_{case.key_seconds}.mp4"
        clip = piece.with_stem(f"{piece.stem}_{case.seconds}")
        if not piece.exists():
            encode_piece(piece, case)
        if not clip.exists():
            write_clip(clip, piece, seconds=case.seconds)
        rows += measure(case, clip, names, repeats=repeats)
    mib = {name: memory(case, clip, name) for name in names}
    for row, name in zip(rows[-len(names) + 1 :], names[1:], strict=True):
        row.update(ours_mib=mib["ours"], other_mib=mib[name])
    return rows


def main() -> None:
    """Parse, run, show."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path | None, default=None, help="file of rows in JSON")
    parser.add_argument("--quick", action="store_true", help="two small clips, to see that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="of each reader, of which the median counts")
    parser.add_argument("--memory", type=str | None, default=None, help="what a process of its own is asked for")
    values = parser.parse_args()
    if values.memory:
        asked = json.loads(values.memory)
        path, name = Path(asked.pop("path")), asked.pop("reader")
        installed()
        tell(peak_mib(lambda: READERS[name](path, Case(**asked))))
        return
    with tempfile.TemporaryDirectory() as folder:
        hand_in(run(QUICK if values.quick else CASES, Path(folder), repeats=values.repeats), out=values.out)


if __name__ == "__main__":
    main()
