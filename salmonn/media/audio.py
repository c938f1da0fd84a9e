"""Puts decoded sound together as one 16 kHz waveform, each part at its time."""

import math
from typing import Any

import av
import numpy as np

from salmonn.media.container import Damage, cause_of

SAMPLE_RATE_HZ = 16_000

# Muxers round sound times (Matroska to 1 ms, AVI to a frame); only a larger step is a real gap or overlap.
_GAP_SECONDS = 0.05
# The resampler costs more for each call than for each sample, so sound goes through it in blocks.
_BLOCK_SAMPLES = 1 << 17


class AudioBuffer:
    """Collects decoded sound as runs of 16 kHz mono samples, each with the time of its first sample.

    `end` is when the latest of it ends, in seconds from the start of the file.
    """

    def __init__(self) -> None:
        self.end = 0.0
        self._runs: list[tuple[float, list[np.ndarray]]] = []
        self._setup: tuple[str, str, int] | None = None
        self._resampler = av.AudioResampler()
        self._pending: list[np.ndarray] = []
        self._pending_samples = 0
        self._run_samples = 0

    def add(self, frame: Any, seconds: float) -> None:
        """Take in a frame that sounds at `seconds`; a gap, overlap or change of format begins a new run.

        Raises:
            Damage: the sound cannot be read or mixed down.
        """
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self._setup or abs(seconds - self.end) > _GAP_SECONDS:
            self.finish()
            self._setup, self._run_samples = setup, 0
            # Float sound is mixed down unscaled unless told: equal channels would come out 1.41 times louder.
            self._resampler = av.AudioResampler(
                format="flt", layout="mono", rate=SAMPLE_RATE_HZ, options={"rematrix_maxval": "1.0"}
            )
            self._runs.append((seconds, []))
        try:
            self._pending.append(frame.to_ndarray())
        except ValueError as error:
            raise Damage(f"its sound cannot be read: {error}") from error
        self._pending_samples += frame.samples
        self._run_samples += frame.samples
        self.end = self._runs[-1][0] + self._run_samples / frame.sample_rate
        if self._pending_samples >= _BLOCK_SAMPLES:
            self._resample()

    def finish(self) -> None:
        """Bring out what the resampler still holds; what is added next begins a new run. Raises as `add`."""
        if self._setup is not None:
            self._resample()
            self._runs[-1][1].extend(out.to_ndarray()[0] for out in self._resampler.resample(None))
            self._setup = None

    def waveform(self, *, start: float, end: float) -> np.ndarray | None:
        """(S,) float32 from `start` to `end` or the sound's end, gaps silent; None without sound there."""
        runs = [(round((at - start) * SAMPLE_RATE_HZ), np.concatenate(parts)) for at, parts in self._runs if parts]
        last = max((offset + len(samples) for offset, samples in runs), default=0)
        length = last if end == math.inf else min(last, round((end - start) * SAMPLE_RATE_HZ))
        if length <= 0:
            return None
        waveform = np.zeros(length, np.float32)
        for offset, samples in runs:
            piece = samples[max(0, -offset) : max(0, length - offset)]
            waveform[max(0, offset) : max(0, offset) + len(piece)] = piece
        return waveform

    def _resample(self) -> None:
        if not self._pending or self._setup is None:
            return
        name, layout, rate = self._setup
        try:
            samples = np.concatenate(self._pending, axis=1)
            block = av.AudioFrame.from_ndarray(samples, format=name, layout=layout)
            block.sample_rate = rate
            self._runs[-1][1].extend(out.to_ndarray()[0] for out in self._resampler.resample(block))
        except (av.error.FFmpegError, ValueError) as error:
            raise Damage(f"sound of {layout} in {name} cannot be mixed down: {cause_of(error)}") from error
        finally:
            self._pending, self._pending_samples = [], 0
