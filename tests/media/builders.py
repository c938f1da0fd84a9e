"""Media files built at test time, with known colours and tones at known times, and checks of clips read from them.

The base content is six seconds: the video is red, lime, blue, yellow, magenta, cyan for a second each, the audio a
tone of 400, 600, 800, 1000, 1200, 1400 Hz.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from salmonn.media.clip import Clip, read_clip

PALETTE = {
    "red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "magenta": (255, 0, 255),
    "cyan": (0, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0),
}  # fmt: skip
COLOURS = dict(enumerate(["red", "lime", "blue", "yellow", "magenta", "cyan"]))
TONES = {second: 400 + 200 * second for second in range(6)}
# Times are compared this loosely: audio encoders put up to 50 ms of silence in front.
_SLACK_SECONDS = 0.06
_MILLISECONDS = Fraction(1, 1000)

Edit = Callable[[list[Any]], list[Any]]


def regular(start: float, end: float, rate: float = 25) -> list[float]:
    """Return the times of frames at a constant rate."""
    return [start + number / rate for number in range(round((end - start) * rate))]


BASE: dict[str, Any] = {"frame_times": regular(0, 6), "audio": (0, 6)}
# 25 frames in the first second, then one a second.
SPARSE = [*regular(0, 1), 1.0, 2.0, 3.0, 4.0, 5.0]


def at(changes: Mapping[float, Any], seconds: float) -> Any:
    """Return the value that was set last at a time."""
    return next((value for start, value in sorted(changes.items(), reverse=True) if start <= seconds), changes[0])


def write_media(
    path: Path,
    *,
    frame_times: Iterable[float] = (),
    audio: tuple[float, float] | None = None,
    colours: Mapping[float, Any] = COLOURS,
    tones: Mapping[float, float] = TONES,
    video_codec: str = "libx264",
    audio_codec: str = "aac",
    codec_options: Mapping[str, str] | None = None,
    size: int = 64,
    rate: int = 25,
    sample_rate: int = 48_000,
    layout: str = "mono",
    shift: float = 0.0,
    edit: Edit | None = None,
    container: str | None = None,
    **options: str,
) -> Path:
    """Write a file of frames of one colour and a tone.

    Args:
        path: file to write; its suffix selects the container if `container` does not.
        frame_times: times of the video frames.
        audio: start and end of the audio.
        colours, tones: colour (a name of the palette, or RGB) and frequency from each time on; frequency 0 is silence.
        shift: seconds added to all timestamps.
        edit: changes the list of packets, sorted by decoding time, before they are written.
        options: options of the container.
    """
    packets = []
    with av.open(str(path), "w", format=container, options=options) as out:
        if times := list(frame_times):
            packets += _encode_video(out, times, colours, video_codec, codec_options, size, rate)
        if audio is not None:
            packets += _encode_audio(out, audio, tones, audio_codec, sample_rate, layout)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            packet.pts += round(shift / packet.time_base)
            packet.dts += round(shift / packet.time_base)
        for packet in edit(packets) if edit else packets:
            out.mux(packet)
    return path


def _encode_video(out: Any, times: list[float], colours: Mapping, codec: str, options: Any, size: int, rate: int):
    preset = {"libx264": {"preset": "ultrafast", "bf": "0"}, "libx265": {"preset": "ultrafast"}}.get(codec, {})
    quiet = {"x265-params": "log-level=none:pools=1:frame-threads=1"} if codec == "libx265" else {}
    stream = out.add_stream(codec, rate=rate, options=quiet | (preset if options is None else dict(options)))
    stream.width = stream.height = size
    stream.codec_context.thread_count = 1
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    # AVI and MPEG-4 count frames; the others keep times.
    tick = Fraction(1, rate) if out.format.name == "avi" or codec.startswith("mpeg") else _MILLISECONDS
    stream.time_base = stream.codec_context.time_base = tick
    packets = []
    for seconds in times:
        colour = at(colours, seconds + 1e-6)
        colour = np.full((size, size, 3), PALETTE.get(colour, colour), np.uint8)
        frame = av.VideoFrame.from_ndarray(colour, format="rgb24")
        frame.pts, frame.time_base = round(seconds / tick), tick
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _encode_audio(out: Any, audio: tuple[float, float], tones: Mapping, codec: str, sample_rate: int, layout: str):
    fast = {"aac": {"aac_coder": "fast"}, "libopus": {"compression_level": "0"}}.get(codec, {})
    options = {"strict": "-2"} if codec in ("vorbis", "opus") else fast
    stream = out.add_stream(codec, rate=sample_rate, layout=layout, options=options)
    times = np.arange(round(audio[0] * sample_rate), round(audio[1] * sample_rate)) / sample_rate
    starts = sorted(tones)
    frequencies = np.array([tones[start] for start in starts])[np.searchsorted(starts, times, "right") - 1]
    # The phase continues where the frequency changes.
    samples = (0.5 * np.sin(2 * np.pi * np.cumsum(frequencies) / sample_rate)).astype(np.float32)
    channels = 1 if layout == "mono" else 2
    frame = av.AudioFrame.from_ndarray(np.repeat(samples[None], channels, axis=0), format="fltp", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), round(audio[0] * sample_rate)
    return stream.encode(frame) + stream.encode(None)


def seconds_of(packet: Any) -> float:
    """Return a packet's presentation time."""
    return float(packet.pts * packet.time_base)


def is_video(packet: Any) -> bool:
    """Return whether a packet holds video."""
    return packet.stream.type == "video"


def replaced(packet: Any, data: bytes) -> Any:
    """Return a packet of other content at the same place."""
    other = av.Packet(data)
    other.stream, other.time_base = packet.stream, packet.time_base
    other.pts, other.dts, other.duration = packet.pts, packet.dts, packet.duration
    other.is_keyframe = packet.is_keyframe
    return other


def without(start: float, end: float, kind: str | None = None) -> Edit:
    """Return an edit that leaves out the packets between two times, of both kinds of stream or of one."""
    return lambda packets: [
        packet for packet in packets if not (start <= seconds_of(packet) < end and kind in (None, packet.stream.type))
    ]


def concatenate(path: Path, parts: Iterable[Path]) -> Path:
    """Write the bytes of all parts into one file, as `cat` does."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@dataclass(frozen=True)
class Dense:
    """Sampler of 16 x 16 frames at a constant rate, and of the last frame."""

    frames_per_second: float

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        return np.unique([*np.arange(first, first + seconds, 1 / self.frames_per_second), first + seconds - 1e-3])

    def frame_size(self, height: int, width: int, num_sampled: int) -> tuple[int, int]:
        """See `FrameSampler`."""
        return 16, 16


def read(path: Path, frames_per_second: float = 4.0, **asked: Any) -> Clip:
    """Read a clip with frames of 16 x 16 pixels."""
    return read_clip(path, Dense(frames_per_second), **asked)


def colour_of(image: np.ndarray) -> str:
    """Return the name of the colour of an image, or its mean if that is none of the palette."""
    mean = image.reshape(-1, 3).mean(axis=0)
    name = min(PALETTE, key=lambda name: np.abs(mean - PALETTE[name]).max())
    return name if np.abs(mean - PALETTE[name]).max() < 50 else str(mean.round())


def assert_colours(
    clip: Clip, colours: Mapping[float, str] = COLOURS, *, shift: float = 0.0, slack: float = _SLACK_SECONDS
) -> None:
    """Assert that each frame has the colour of its time, and that all colours are seen."""
    seen = [colour_of(frame) for frame in clip.frames]
    for seconds, colour in zip(clip.frame_times - shift, seen, strict=True):
        nearby = {at(colours, seconds - slack), at(colours, seconds + slack)}
        assert colour in nearby, f"{colour} at {seconds:.2f} s; expected {nearby}; all: {seen}"
    assert set(seen) == set(colours.values()), seen


def pitch(waveform: np.ndarray, first: float, last: float) -> float:
    """Return the strongest frequency between two times, in Hz; 0 for silence."""
    part = waveform[round(first * 16_000) : round(last * 16_000)]
    assert len(part) > 0.9 * (last - first) * 16_000, f"the audio ends at {len(waveform) / 16_000:.2f} s"
    if np.sqrt(np.mean(part**2)) < 0.01:
        return 0.0
    strength = np.abs(np.fft.rfft(part * np.hanning(len(part))))
    return float(np.argmax(strength) * 16_000 / len(part))


def assert_tones(clip: Clip, tones: Mapping[float, float] = TONES, *, shift: float = 0.0) -> None:
    """Assert the frequency of the second that begins at each time."""
    heard = {second: pitch(clip.waveform, second + shift + 0.1, second + shift + 0.9) for second in tones}
    assert heard == {second: pytest.approx(frequency, abs=5) for second, frequency in tones.items()}


def assert_seconds(clip: Clip, *, video: float | None = None, audio: float | None = None, slack: float = 0.1) -> None:
    """Assert the durations of video and audio."""
    if video is not None:
        assert abs(clip.video_seconds - video) < slack, clip.video_seconds
    if audio is not None:
        assert abs(len(clip.waveform) / 16_000 - audio) < slack, len(clip.waveform) / 16_000


def assert_span(path: Path, *, video: bool = True, audio: bool = True, slack: float = _SLACK_SECONDS) -> None:
    """Assert that the base's span from 2.5 to 4.5 s has the content of these times."""
    clip = read(path, start_seconds=2.5, end_seconds=4.5)
    if video:
        assert_colours(clip, {0: "blue", 3: "yellow", 4: "magenta"}, slack=slack)
    if audio:
        heard = [pitch(clip.waveform, first, last) for first, last in ((0.1, 0.4), (0.65, 1.35), (1.65, 1.95))]
        assert heard == [pytest.approx(tone, abs=8) for tone in (800, 1000, 1200)]


def assert_whole(clip: Clip) -> None:
    """Assert that nothing is said to be lost."""
    assert clip.warnings == ()
    assert clip.is_complete


def assert_loss_is_told(clip: Clip) -> None:
    """Assert that the clip is marked as incomplete, and says so."""
    assert clip.warnings
    assert not clip.is_complete


def crc32(data: bytes, value: int) -> int:
    """Return the checksum of MPEG-TS (initial value 0xFFFFFFFF) and Ogg (0): CRC-32 with the highest bit first."""
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


def transport_packets(path: Path) -> list[bytes]:
    """Return the packets of a transport stream."""
    data = path.read_bytes()
    return [data[first : first + 188] for first in range(0, len(data), 188)]


def pid_of(packet: bytes) -> int:
    """Return the stream that a packet of a transport stream belongs to."""
    return int.from_bytes(packet[1:3]) & 0x1FFF


def with_pts(packets: list[bytes], pid: int, number: int, seconds: float) -> list[bytes]:
    """Return a transport stream's packets with another presentation timestamp at the `number`-th start of a frame."""
    starts = [place for place, packet in enumerate(packets) if pid_of(packet) == pid and packet[1] & 0x40]
    packet = bytearray(packets[starts[number]])
    first = packet.index(b"\0\0\1") + 9
    ticks = round(seconds * 90_000)
    packet[first] = packet[first] & 0xF0 | ticks >> 29 & 0x0E | 1
    packet[first + 1 : first + 3] = (ticks >> 15 << 1 & 0xFFFE | 1).to_bytes(2)
    packet[first + 3 : first + 5] = (ticks << 1 & 0xFFFE | 1).to_bytes(2)
    return [*packets[: starts[number]], bytes(packet), *packets[starts[number] + 1 :]]
