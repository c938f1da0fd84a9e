"""Rules of the published models for which frames of a video are sampled, and at what size.

A sampler returns times, not frame numbers: at a constant frame rate they select the published frames, and a variable
frame rate is handled correctly.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class FrameOptions:
    """A request's own choice of frames, within the model's limits; None leaves the model's value.

    Args:
        frames_per_second: rate; above the model's maximum number of frames, that number is spread over the clip.
        num_frames: number of frames, spread over the clip; a clip with fewer gives all it has.
        max_pixels: maximum area of a frame.

    Raises:
        ValueError: a value is out of range, or both rate and number are given.
    """

    frames_per_second: float | None = None
    num_frames: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false with everything, is rejected too.
        if self.frames_per_second is not None and not 0.01 <= self.frames_per_second <= 1000:
            raise ValueError(f"fps must be from 0.01 to 1000, got {self.frames_per_second}")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if self.frames_per_second is not None and self.num_frames is not None:
            raise ValueError("fps and num_frames exclude each other: give one")

    def check(self, *, max_frames: int, min_pixels: int = 0) -> None:
        """Raise a ValueError if more frames, or smaller ones, are asked for than the model takes."""
        if (self.num_frames or 0) > max_frames:
            raise ValueError(f"num_frames is {self.num_frames}; the maximum of this model is {max_frames}")
        if self.max_pixels is not None and self.max_pixels < min_pixels:
            raise ValueError(f"max_pixels is {self.max_pixels}; the minimum of this model is {min_pixels}")


class FrameSampler(Protocol):
    """Rule that selects the frames of a clip."""

    def with_options(self, options: FrameOptions) -> "FrameSampler":
        """Return this rule with a request's options; raises a ValueError if it cannot follow them."""
        ...

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """Return the times of the frames to sample.

        Args:
            first: time of the first frame.
            seconds: duration of the video from then on.
            num_frames: number of frames that the video has in that time, at least 1.

        Returns:
            (F,) rising times from `first` on.
        """
        ...

    def frame_size(self, height: int, width: int, num_sampled: int) -> tuple[int, int]:
        """Return the height and width that frames of this size are scaled to if `num_sampled` frames are sampled."""
        ...


@dataclass(frozen=True)
class FixedRateSampler:
    """Frames of video-SALMONN 2: every k-th from the first, with k the integer nearest to the interval 1 / rate.

    If these are more than `max_frames`, `max_frames` are sampled evenly from the first to the last. Frames are scaled
    to squares.

    Args:
        frames_per_second: rate.
        max_frames: maximum number of frames.
        side: side of the square, in pixels.
    """

    frames_per_second: float = 1.0
    max_frames: int = 110
    side: int = 384

    @property
    def max_seconds(self) -> float:
        """Duration of the longest video that is sampled at the full rate."""
        return self.max_frames / self.frames_per_second

    def with_options(self, options: FrameOptions) -> "FixedRateSampler":
        """See `FrameSampler`."""
        options.check(max_frames=self.max_frames)
        if options.max_pixels is not None:
            raise ValueError(f"max_pixels cannot be set: this model scales all frames to {self.side} x {self.side}")
        if options.num_frames is not None:  # num_frames are sampled evenly from all frames
            return replace(self, frames_per_second=math.inf, max_frames=options.num_frames)
        return replace(self, frames_per_second=options.frames_per_second or self.frames_per_second)

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        step = max(round(num_frames / seconds / self.frames_per_second), 1)
        numbers = np.arange(0, num_frames, step)
        if len(numbers) > self.max_frames:
            numbers = np.linspace(0, num_frames - 1, self.max_frames, dtype=int)
        return first + numbers * seconds / num_frames

    def frame_size(self, height: int, width: int, num_sampled: int) -> tuple[int, int]:
        """See `FrameSampler`."""
        return self.side, self.side


@dataclass(frozen=True)
class UniformSampler:
    """Frames of video-SALMONN 2+: one every `interval_seconds`, evenly spaced, within a pixel budget.

    Args:
        interval_seconds: time between two frames.
        min_frames, max_frames: minimum (if the video has that many) and maximum number of frames.
        min_pixels, max_pixels: limits of a frame's area.
        budget_fraction: if fewer than `max_frames` are sampled, the area of a frame may grow to
            budget_fraction * max_frames / num_sampled * max_pixels; 0 keeps `max_pixels`. A single frame is taken for
            a photograph and limited to `max_pixels`.
        factor: divisor of height and width: patch size times merge size.
        frame_pixels: maximum area of a frame however few there are; None for no such maximum.
    """

    interval_seconds: float = 0.1
    min_frames: int = 16
    max_frames: int = 768
    min_pixels: int = 784
    max_pixels: int = 61_250
    budget_fraction: float = 0.95
    factor: int = 28
    frame_pixels: int | None = None

    def with_options(self, options: FrameOptions) -> "UniformSampler":
        """See `FrameSampler`."""
        options.check(max_frames=self.max_frames, min_pixels=self.min_pixels)
        changed = self
        if options.max_pixels is not None:
            changed = replace(changed, frame_pixels=options.max_pixels)
        if options.frames_per_second is not None:
            return replace(changed, interval_seconds=1 / options.frames_per_second, min_frames=1)
        if options.num_frames is not None:  # with an infinite interval, the minimum decides
            return replace(changed, interval_seconds=math.inf, min_frames=options.num_frames)
        return changed

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        count = min(max(round(seconds / self.interval_seconds), self.min_frames), self.max_frames)
        numbers = np.unique(np.linspace(0, num_frames - 1, count, dtype=int))
        return first + numbers * seconds / num_frames

    def frame_size(self, height: int, width: int, num_sampled: int) -> tuple[int, int]:
        """See `FrameSampler`."""
        max_pixels = float(self.max_pixels)
        if self.budget_fraction and 1 < num_sampled < self.max_frames:
            max_pixels = self.budget_fraction * self.max_frames / num_sampled * self.max_pixels
        max_pixels = min(max_pixels, self.frame_pixels or math.inf)
        return smart_resize(height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=max_pixels)


@dataclass(frozen=True)
class EvenCountSampler:
    """Frames of Qwen2.5-Omni: an even number, evenly spaced from the first to the last, within a pixel budget.

    Rules and defaults are those of `process_mm_info` in qwen-omni-utils, with which the published captioners are run.

    Args:
        frames_per_second: rate.
        min_frames, max_frames: minimum (if the video has that many) and maximum number of frames.
        min_pixels, max_pixels: limits of a frame's area.
        total_pixels: maximum area of all frames together, counted by half since two frames are merged; frames are not
            scaled below 1.05 * min_pixels for it.
        factor: divisor of height and width: patch size times merge size.
        num_frames: number of frames instead of a rate; a video with fewer gives all it has.
    """

    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 100_352
    max_pixels: int = 602_112
    total_pixels: int = 90_316_800
    factor: int = 28
    num_frames: int | None = None

    def with_options(self, options: FrameOptions) -> "EvenCountSampler":
        """See `FrameSampler`."""
        options.check(max_frames=self.max_frames, min_pixels=self.min_pixels)
        changed = self
        if options.max_pixels is not None:
            changed = replace(changed, max_pixels=min(self.max_pixels, options.max_pixels))
        if options.frames_per_second is not None:
            return replace(changed, frames_per_second=options.frames_per_second, min_frames=2, num_frames=None)
        return replace(changed, num_frames=options.num_frames or self.num_frames)

    def count_wanted(self, seconds: float) -> int:
        """Return the number of frames that the rate asks for in a video of this duration."""
        return int(max(seconds * self.frames_per_second + 1e-6, self.min_frames)) // 2 * 2  # 7.9999999 are 8

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        most = min(self.max_frames, num_frames)
        count = min(self.num_frames or max(min(self.count_wanted(seconds), most // 2 * 2), 1), most)
        # As torch.linspace computes it, in float32 from both ends, so that halves are rounded to the same frame.
        step = np.float32((num_frames - 1) / max(count - 1, 1))
        index = np.arange(count, dtype=np.float32)
        numbers = np.where(index < count // 2, step * index, np.float32(num_frames - 1) - step * (count - 1 - index))
        numbers = numbers.round() if count > 1 else np.zeros(1)
        return first + numbers * seconds / num_frames

    def frame_size(self, height: int, width: int, num_sampled: int) -> tuple[int, int]:
        """See `FrameSampler`."""
        share = max(min(self.max_pixels, self.total_pixels / num_sampled * 2), int(self.min_pixels * 1.05))
        return smart_resize(
            height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=min(self.max_pixels, share)
        )


@dataclass(frozen=True)
class BudgetSampler:
    """Frames of Qwen3-VL: evenly spaced from the first to the last, within a pixel budget for the whole clip.

    The rules are those of `Qwen3VLVideoProcessor` in transformers, with `cap_pixels_per_frame` unless `frame_pixels` is
    None. The defaults are the values of the published video_preprocessor_config.json.

    Args:
        frames_per_second: rate.
        min_frames, max_frames: minimum (if the video has that many) and maximum number of frames.
        min_pixels, max_pixels: limits of the area of all frames together.
        frame_pixels: maximum area of a frame; None for no such maximum. The default is that of Qwen's own preprocessing
            (qwen-vl-utils), 768 tokens.
        factor: divisor of height and width: patch size times merge size.
    """

    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 4096
    max_pixels: int = 25_165_824
    frame_pixels: int | None = 786_432
    factor: int = 32

    def with_options(self, options: FrameOptions) -> "BudgetSampler":
        """See `FrameSampler`."""
        options.check(max_frames=self.max_frames)
        changed = self
        if options.max_pixels is not None:
            if options.max_pixels < self.factor**2:
                raise ValueError(f"max_pixels is {options.max_pixels}; the minimum of this model is {self.factor**2}")
            changed = replace(changed, frame_pixels=options.max_pixels)
        if options.frames_per_second is not None:
            return replace(changed, frames_per_second=options.frames_per_second, min_frames=1)
        if options.num_frames is not None:  # with a rate of 0, the minimum decides
            return replace(changed, frames_per_second=0.0, min_frames=options.num_frames)
        return changed

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        wanted = int(seconds * self.frames_per_second + 1e-6)  # 7.9999999 are 8
        count = min(max(wanted, self.min_frames), self.max_frames, num_frames)
        numbers = np.linspace(0, num_frames - 1, count).round()
        return first + numbers * seconds / num_frames

    def frame_size(self, height: int, width: int, num_sampled: int) -> tuple[int, int]:
        """See `FrameSampler`. Rounds as `smart_resize` of Qwen3-VL's video processor in transformers."""
        # A single frame is repeated: a patch is two frames deep.
        count = max(num_sampled, 2)
        max_pixels = self.max_pixels
        if self.frame_pixels is not None:
            of_frame = max(min(self.frame_pixels, self.max_pixels // count), int(self.min_pixels * 1.05))
            max_pixels = of_frame * count
        if min(height, width) < self.factor:
            scale = max(self.factor / height, self.factor / width)
            height, width = int(height * scale), int(width * scale)
        rows, columns = (round(side / self.factor) * self.factor for side in (height, width))
        area = round(count / 2) * 2 * rows * columns
        if area > max_pixels:
            shrink = math.sqrt(count * height * width / max_pixels)
            return tuple(max(math.floor(side / shrink / self.factor), 1) * self.factor for side in (height, width))  # type: ignore[return-value]
        if area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (count * height * width))
            return tuple(math.ceil(side * grow / self.factor) * self.factor for side in (height, width))  # type: ignore[return-value]
        return rows, columns


@dataclass(frozen=True)
class IntervalBudgetSampler(BudgetSampler):
    """Frames of D-ORCA: those of `UniformSampler`, with the sizes of Qwen3-VL. The defaults are the published ones.

    Args:
        frames_per_second, min_frames, max_frames, min_pixels, frame_pixels, factor: see `BudgetSampler`.
        max_pixels: see there; 176,400 for each of 128 frames.
    """

    min_frames: int = 1
    max_frames: int = 128
    min_pixels: int = 784
    max_pixels: int = 128 * 176_400
    frame_pixels: int | None = None

    def sample_times(self, first: float, seconds: float, num_frames: int) -> np.ndarray:
        """See `FrameSampler`."""
        count = min(max(round(seconds * self.frames_per_second), self.min_frames), self.max_frames)
        numbers = np.unique(np.linspace(0, num_frames - 1, count, dtype=int))
        return first + numbers * seconds / num_frames


def smart_resize(height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Return height and width that are multiples of `factor`, with an area within limits and nearly the same aspect.

    Rounds as `smart_resize` of Qwen2.5-VL's processor in transformers.
    """
    rows, columns = (max(round(side / factor), 1) * factor for side in (height, width))
    # Two divisions in a row, as there: one division would round differently where a side comes out whole.
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(math.floor(side / shrink / factor), 1) * factor for side in (height, width))  # type: ignore[return-value]
    if rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))  # type: ignore[return-value]
    return rows, columns
