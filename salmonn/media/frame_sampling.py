"""Which frames are taken of a video, and at what size: the published models' rules.

A rule names times, not numbers of frames: of videos with a steady rate these are the published frames, and a variable
rate comes out right.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class FrameSampler(Protocol):
    """Chooses the frames of a clip."""

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """When to look at the screen.

        Args:
            first: when the first frame is due.
            seconds: for how long the picture lasts from then.
            num_frames: frames that the video has in that time, at least 1.

        Returns:
            (F,) rising times from `first` on.
        """
        ...

    def frame_size(self, height: int, width: int, num_taken: int) -> tuple[int, int]:
        """Height and width that frames of this size are scaled to where so many are taken."""
        ...


@dataclass(frozen=True)
class FixedRateSampler:
    """video-SALMONN 2: each k-th frame from the first, k the whole number nearest to one every 1 / rate seconds.

    Of more than `max_frames`, so many are taken evenly from the first to the last. Frames become squares.

    Args:
        frames_per_second: rate.
        max_frames: the most frames taken.
        side: of the square in pixels.
    """

    frames_per_second: float = 1.0
    max_frames: int = 110
    side: int = 384

    @property
    def max_seconds(self) -> float:
        """Length of the longest video that is seen at the full rate."""
        return self.max_frames / self.frames_per_second

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        step = max(round(num_frames / seconds / self.frames_per_second), 1)
        places = np.arange(0, num_frames, step)
        if len(places) > self.max_frames:
            places = np.linspace(0, num_frames - 1, self.max_frames, dtype=int)
        return first + places * seconds / num_frames

    def frame_size(self, height: int, width: int, num_taken: int) -> tuple[int, int]:
        """See `FrameSampler`."""
        return self.side, self.side


@dataclass(frozen=True)
class UniformSampler:
    """Frames of video-SALMONN 2+: one every `interval_seconds`, evenly spaced, within a pixel budget.

    Args:
        interval_seconds: one frame for each of these.
        min_frames, max_frames: the fewest (if the video has them) and the most frames taken.
        min_pixels, max_pixels: of a frame.
        budget_fraction: where fewer than `max_frames` are taken, a frame may have this times max_frames / taken times
            as many pixels; 0 leaves `max_pixels` alone. A single frame is taken for a photograph and gets
            `max_pixels`.
        factor: height and width become multiples of it: patch size times merge size.
    """

    interval_seconds: float = 0.1
    min_frames: int = 16
    max_frames: int = 768
    min_pixels: int = 784
    max_pixels: int = 61_250
    budget_fraction: float = 0.95
    factor: int = 28

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        count = min(max(round(seconds / self.interval_seconds), self.min_frames), self.max_frames)
        places = np.unique(np.linspace(0, num_frames - 1, count, dtype=int))
        return first + places * seconds / num_frames

    def frame_size(self, height: int, width: int, num_taken: int) -> tuple[int, int]:
        """See `FrameSampler`; the rounding is that of Qwen2.5-VL's processor."""
        most = float(self.max_pixels)
        if self.budget_fraction and 1 < num_taken < self.max_frames:
            most = self.budget_fraction * self.max_frames / num_taken * self.max_pixels
        rows, columns = (max(round(side / self.factor), 1) * self.factor for side in (height, width))
        # Divided one after the other, as there: two sides that come out whole would round otherwise.
        if rows * columns > most:
            shrink = math.sqrt(height * width / most)
            return tuple(max(math.floor(side / shrink / self.factor), 1) * self.factor for side in (height, width))  # type: ignore[return-value]
        if rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return tuple(math.ceil(side * grow / self.factor) * self.factor for side in (height, width))  # type: ignore[return-value]
        return rows, columns
