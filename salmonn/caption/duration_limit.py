"""What is read of a stranger's file: a clip of limited length.

Worker processes import this, so nothing here imports torch.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from salmonn.caption.loader import ReadSpec
from salmonn.media.clip import Clip
from salmonn.media.container import ClipError, open_source


@dataclass(frozen=True)
class LimitedReadSpec(ReadSpec):
    """What is read of a file, if the span is not too long.

    Args:
        max_seconds: that the span may last.
    """

    max_seconds: float = 3600.0

    def read(self, path: Path | str) -> Clip:
        """Read a file; raises as `read_clip`, and a ClipError where it is too long."""
        with ExitStack() as stack:
            source = open_source(path, stack, video=self.video, audio=self.audio)
            self._require_short(path, self._span_seconds(source.declared_end))
        # A file may state less than it holds, or nothing: a second more than is allowed is read, and no further.
        limit = (self.start_seconds or 0.0) + self.max_seconds + 1
        bounded = replace(self, end_seconds=min(limit, self.end_seconds or limit))
        clip = ReadSpec.read(bounded, path)
        self._require_short(path, clip.duration_seconds)
        return clip

    def _span_seconds(self, declared: float) -> float:
        return min(declared, self.end_seconds or declared) - (self.start_seconds or 0.0)

    def _require_short(self, path: Path | str, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise ClipError(
                f"{path}: more than {self.max_seconds:g} s are not taken here, and this is {seconds:.0f} s or more: "
                "name a part of it with start and end"
            )
