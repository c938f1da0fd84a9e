"""Assembly of decoded audio into one 16 kHz waveform, each part at its time."""

import math
from typing import Any

import av
import numpy as np

from salmonn.media.container import DecodeError, cause_of

SAMPLE_RATE_HZ = 16_000

# Muxers round audio timestamps (Matroska to 1 ms, AVI to a frame); only a larger step is a real gap or overlap.
_GAP_SECONDS = 0.05
# The resampler costs more per call than per sample, so frames are joined to about this many samples first.
_RESAMPLE_SAMPLES = 1 << 17
# Gains of channels in a mono mix; others (surround, height) have `_SURROUND_GAIN`. Speech in the center is as loud as
# the same speech in a mono file. The others are as if mixed down to stereo by BT.775, whose channels are averaged.
_GAINS = {"FL": 0.5, "FR": 0.5, "FC": 1.0, "FLC": 0.5, "FRC": 0.5, "LFE": 0.0, "LFE2": 0.0}
_SURROUND_GAIN = math.sqrt(0.5) / 2
# Files may leave channels unnamed; these numbers of channels are then taken for these layouts, as by libav.
_UNNAMED_LAYOUTS = {6: "5.1", 8: "7.1"}


class AudioBuffer:
    """Decoded audio as segments of 16 kHz mono samples, each with the time of its first sample.

    Attributes:
        end: end of the latest audio, in seconds from the start of the file.
    """

    def __init__(self) -> None:
        self.end = 0.0
        self._segments: list[tuple[float, list[np.ndarray]]] = []
        self._format: tuple[str, str, int] | None = None  # sample format, layout and rate of the last segment
        self._gains: np.ndarray | None = None
        self._packer = self._resampler = av.AudioResampler()
        self._pending: list[np.ndarray] = []
        self._pending_samples = 0
        self._segment_samples = 0

    def add(self, frame: Any, seconds: float) -> None:
        """Add a frame that starts at `seconds`; a gap, an overlap or a new format starts a new segment.

        Raises:
            DecodeError: the audio cannot be read or mixed down.
        """
        frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
        if frame_format != self._format or abs(seconds - self.end) > _GAP_SECONDS:
            self.flush()
            self._format, self._segment_samples = frame_format, 0
            self._gains, self._packer = mono_gains(frame.layout), av.AudioResampler(format="flt")
            # By default float audio is mixed down unscaled: equal channels would come out 1.41 times louder.
            self._resampler = av.AudioResampler(
                format="flt", layout="mono", rate=SAMPLE_RATE_HZ, options={"rematrix_maxval": "1.0"}
            )
            self._segments.append((seconds, []))
        try:
            self._pending.extend([frame.to_ndarray()] if self._gains is None else self._mix_down(frame, self._gains))
        except (av.error.FFmpegError, ValueError) as error:
            raise DecodeError(f"audio of {frame.layout.name} cannot be mixed down: {cause_of(error)}") from error
        self._pending_samples += frame.samples
        self._segment_samples += frame.samples
        self.end = self._segments[-1][0] + self._segment_samples / frame.sample_rate
        if self._pending_samples >= _RESAMPLE_SAMPLES:
            self._resample()

    def flush(self) -> None:
        """Append what the resampler still holds; the next frame starts a new segment. Raises as `add`."""
        if self._format is not None:
            self._resample()
            self._segments[-1][1].extend(out.to_ndarray()[0] for out in self._resampler.resample(None))
            self._format = None

    def waveform(self, *, start: float, end: float) -> np.ndarray | None:
        """Return (S,) float32 from `start` to `end` or the end of the audio, gaps as silence; None if there is none."""
        offsets = [round((time - start) * SAMPLE_RATE_HZ) for time, _ in self._segments]
        lengths = [sum(map(len, parts)) for _, parts in self._segments]
        last = max((offset + length for offset, length in zip(offsets, lengths, strict=True) if length), default=0)
        length = last if end == math.inf else min(last, round((end - start) * SAMPLE_RATE_HZ))
        if length <= 0:
            return None
        waveform = np.zeros(length, np.float32)
        for offset, (_, parts) in zip(offsets, self._segments, strict=True):
            for samples in parts:
                inside = samples[max(0, -offset) : max(0, length - offset)]
                waveform[max(0, offset) : max(0, offset) + len(inside)] = inside
                offset += len(samples)  # noqa: PLW2901
        return waveform

    def _mix_down(self, frame: Any, gains: np.ndarray) -> list[np.ndarray]:
        """Return (1, S) float32 mono, in parts."""
        # Interleaved first: PyAV 18 reads beyond the channels of planar frames that have eight or more.
        packed = [part.to_ndarray().reshape(-1, len(gains)) for part in self._packer.resample(frame)]
        return [(part @ gains)[None] for part in packed]

    def _resample(self) -> None:
        if not self._pending or self._format is None:
            return
        name, layout, rate = self._format
        if self._gains is not None:
            name, layout = "flt", "mono"
        try:
            joined = av.AudioFrame.from_ndarray(np.concatenate(self._pending, axis=1), format=name, layout=layout)
            joined.sample_rate = rate
            self._segments[-1][1].extend(out.to_ndarray()[0] for out in self._resampler.resample(joined))
        except (av.error.FFmpegError, ValueError) as error:
            raise DecodeError(f"audio of {layout} in {name} cannot be mixed down: {cause_of(error)}") from error
        finally:
            self._pending, self._pending_samples = [], 0


def mono_gains(layout: av.AudioLayout) -> np.ndarray | None:
    """Return the gains of a layout's channels in a mono mix.

    Samples of the mix may exceed 1, which Whisper's features have no limit for, so it is neither clipped nor scaled.

    Returns:
        (C,) float32, or None for mono and stereo, which libswresample mixes. Channels without names are averaged.
    """
    if layout.nb_channels <= 2:
        return None
    if all(channel.name == "NONE" for channel in layout.channels):
        if layout.nb_channels not in _UNNAMED_LAYOUTS:
            return np.full(layout.nb_channels, 1 / layout.nb_channels, np.float32)
        layout = av.AudioLayout(_UNNAMED_LAYOUTS[layout.nb_channels])
    return np.array([_GAINS.get(channel.name, _SURROUND_GAIN) for channel in layout.channels], np.float32)
