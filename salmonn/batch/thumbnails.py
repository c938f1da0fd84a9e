"""Thumbnails of clips: a frame of each as a small JPEG, read by worker processes with time and memory limits."""

import base64
import io
import math
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from salmonn.caption.loader import ClipReader
from salmonn.caption.read_spec import ReadSpec
from salmonn.media.clip import Clip
from salmonn.media.container import ClipError, open_media
from salmonn.media.frame_sampling import FrameSampler, UniformSampler

PIXELS = 160 * 120  # area of a thumbnail, whatever its shape
JPEG_QUALITY = 60
_SPAN_SECONDS = 1.0  # read around the middle of a clip
_FIRST_FRAME = UniformSampler(
    interval_seconds=math.inf, min_frames=1, max_frames=1, min_pixels=1, max_pixels=PIXELS, budget_fraction=0.0,
    factor=2,
)  # fmt: skip


@dataclass(frozen=True)
class ThumbnailSpec(ReadSpec):
    """Reads the frame in the middle of a span: first frames are often black."""

    sampler: FrameSampler = _FIRST_FRAME
    audio: bool = False

    def read(self, path: Path | str) -> Clip:
        """Read the frame in the middle, or the first one where there is none; raises what `read_clip` raises."""
        with ExitStack() as stack:
            declared = open_media(path, stack, video=True, audio=False).declared_end
        start = self.start_seconds or 0.0
        middle = (start + (self.end_seconds or max(declared, start))) / 2
        if middle > start:
            try:
                return ReadSpec.read(replace(self, start_seconds=middle, end_seconds=middle + _SPAN_SECONDS), path)
            except ClipError:  # damaged there, or shorter than stated
                pass
        return ReadSpec.read(self, path)


def submit_thumbnail(
    reader: ClipReader, path: Path, *, start_seconds: float | None = None, end_seconds: float | None = None
) -> "Future[bytes]":
    """Start making the thumbnail of a clip.

    Args:
        reader: worker processes with limits.
        path: video file.
        start_seconds, end_seconds: the part that the caption describes; None for an open end.

    Returns:
        A future of the JPEG file's content; it raises a ClipError if the file cannot be read or has no video.
    """
    return reader.submit(path, ThumbnailSpec(start_seconds=start_seconds, end_seconds=end_seconds), _to_jpeg)


def _to_jpeg(clip: Clip) -> bytes:
    if not clip.has_video:
        raise ClipError(f"{clip.path}: no frame could be read")
    content = io.BytesIO()
    Image.fromarray(clip.frames[0]).save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return content.getvalue()


def describe_missing(error: ClipError, path: Path) -> str:
    """Return why a clip has no thumbnail, without its path, which the page shows next to the thumbnail."""
    reason = str(error).replace(f"{path}: ", "").replace(str(path), path.name)
    return "sound only" if reason.startswith("has no video;") else reason


def to_data_url(jpeg: bytes) -> str:
    """Return a JPEG file as a data URL."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
