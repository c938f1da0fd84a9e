"""What a file says that it holds, asked in a worker process: nothing of a stranger's file is opened in this one."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from salmonn.caption.loader import ClipReader, ReadSpec
from salmonn.media.clip import Clip
from salmonn.media.container import open_source


@dataclass(frozen=True)
class MediaInfo:
    """Of a file.

    Args:
        seconds: that it states to last; 0 where it states none.
        has_picture, has_sound: whether it has such a stream that can be decoded.
    """

    seconds: float
    has_video: bool = True
    has_audio: bool = True


@dataclass(frozen=True)
class ProbeSpec(ReadSpec):
    """In the place of a file's clip a blank one of its length: one frame where it has a picture, no time of sound."""

    def read(self, path: Path | str) -> Clip:
        """Open a file and read how long it is; raises ClipError where it cannot be opened."""
        with ExitStack() as stack:
            source = open_source(path, stack, video=True, audio=True)
            return Clip(
                path=str(path),
                frames=np.zeros((int(source.video is not None), 1, 1, 3), np.uint8),
                frame_times=np.zeros(int(source.video is not None)),
                waveform=None if source.audio is None else np.zeros(0, np.float32),
                start_seconds=0.0,
                video_seconds=source.declared_end if source.video is not None else 0.0,
                duration_seconds=source.declared_end,
            )


def probe_media(path: Path, reader: ClipReader, read_spec: ReadSpec) -> MediaInfo:
    """What a file holds.

    Args:
        path: of the file.
        reader: whose worker opens it.
        wanted: anything that is wanted of it.

    Raises:
        ClipError: it is no video or sound.
    """
    clip = reader.submit(path, ProbeSpec(read_spec.sampler), lambda clip: clip).result()
    return MediaInfo(clip.duration_seconds, clip.has_video, clip.has_audio)
