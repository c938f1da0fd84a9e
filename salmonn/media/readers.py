"""Other decoders of video frames than PyAV: decord and torchcodec, on the CPU or on a GPU.

PyAV makes the first pass over every file (index, audio, damage), whatever the reader is. It also decodes the frames of
files that the others are known to read wrongly or differently.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from PIL import Image

from salmonn.media.display import display_warning, is_untagged_hd
from salmonn.media.index import SLACK_SECONDS, StreamIndex
from salmonn.media.tone_mapping import HDR_TRANSFERS

# Full-size frames that are decoded at a time; as many are scaled meanwhile.
_BATCH_FRAMES = 8
# decord states times as 32-bit floats; frames are further apart than this.
_DECORD_SLACK_SECONDS = 1e-3
# Mean difference of a frame in levels; GPUs convert to RGB in another way than libav.
_MAX_MEAN_DIFFERENCE = 2.0
# Signatures of MP4, QuickTime and Matroska files, which state the presentation times of all frames. Of MPEG-TS, AVI,
# ASF and others, the readers return wrong frames.
_BOX_TYPES = frozenset([b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"uuid"])
_EBML_HEADER = b"\x1a\x45\xdf\xa3"


class ReaderError(Exception):
    """A reader does not return the right frames of a file, so PyAV has to decode it."""


def load_reader(reader: str) -> tuple[Any, str]:
    """Import a reader's package.

    Args:
        reader: decord or torchcodec, with a device if that is not the CPU: "torchcodec:cuda", "decord:cuda:1".

    Returns:
        The module with the video decoder, and the device.

    Raises:
        ValueError: there is no such reader, or its package cannot be used here.
    """
    package, _, device = reader.partition(":")
    if package not in ("decord", "torchcodec") or device.partition(":")[0] not in ("", "cpu", "cuda"):
        raise ValueError(f"there is no reader {reader!r}; use pyav, decord, torchcodec, decord:cuda or torchcodec:cuda")
    if package == "torchcodec" and "decord" in sys.modules:
        # decord makes the symbols of its libraries global, so that torchcodec calls some of them instead of its own.
        raise ValueError(
            "decord is loaded already, and torchcodec crashes in the same process; use one reader per process"
        )
    try:
        return importlib.import_module("torchcodec.decoders" if package == "torchcodec" else package), device or "cpu"
    except (ImportError, OSError, RuntimeError) as error:  # torchcodec raises a RuntimeError if it finds no FFmpeg
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the reader {package} cannot be loaded ({cause}); install it with pip install 'salmonn[{package}]', or "
            "use --reader pyav"
        ) from error


def find_obstacle(index: StreamIndex, reader: str) -> str | None:
    """Return what in a file only PyAV handles correctly, or None.

    Args:
        index: result of the first pass.
        reader: see `load_reader`.
    """
    times = index.frame_times
    damage = (index.is_truncated, index.error, index.missing, index.video_damage)
    obstacles = {
        "its container": not _has_plain_signature(index.file.path) or not index.is_continuous or not index.keyframes,
        "damage": any(damage),
        "frames with equal times": len(set(times)) < len(times),
        # decord cannot select one.
        "several video streams": len(index.file.container.streams.video) > 1 and reader.startswith("decord"),
        "its pixel aspect ratio": index.file.video.sample_aspect_ratio not in (None, 0, 1),
    }
    return next((name for name, applies in obstacles.items() if applies), None)


def find_frame_obstacle(frame: Any) -> str | None:
    """Return what in a frame, decoded by PyAV, a reader would display in another way, or None."""
    try:
        side_data = {data.type.name for data in SideDataContainer(frame)}  # type: ignore[call-arg]
    except ValueError:  # a type that PyAV does not know
        return "its side data"
    obstacles = {
        "its display matrix": "DISPLAYMATRIX" in side_data,
        "its dynamic range": frame.color_trc in HDR_TRANSFERS or display_warning(frame) is not None,
        "its unknown colour space": is_untagged_hd(frame),  # which the readers take for BT.601
        "its transparency": frame.format.has_palette or any(part.is_alpha for part in frame.format.components),
        "its interlacing": frame.interlaced_frame,
    }
    return next((name for name, applies in obstacles.items() if applies), None)


def _has_plain_signature(path: str) -> bool:
    """Return whether a file starts like MP4, QuickTime or Matroska.

    That PyAV found it to be one is not enough: a reader may have an older libav, which takes some of these files for a
    playlist and opens the files and URLs in it.
    """
    with Path(path).open("rb") as file:
        start = file.read(8)
    return start[4:] in _BOX_TYPES or start[:4] == _EBML_HEADER


def read_images(
    reader: str, index: StreamIndex, due: Sequence[float], *, size: tuple[int, int], first_frame: Any
) -> list[np.ndarray]:
    """Decode and scale frames.

    Args:
        reader: see `load_reader`.
        index: result of the first pass.
        due: presentation times of the frames, rising; may repeat.
        size: height and width to scale to.
        first_frame: the first of the frames, decoded by PyAV.

    Returns:
        (H, W, 3) uint8 RGB images, one for each element of `due`.

    Raises:
        ReaderError: the reader cannot decode the file, or decodes it differently.
        ValueError: see `load_reader`.
    """
    module, device = load_reader(reader)
    is_decord = reader.startswith("decord")
    decode = _decode_with_decord if is_decord else _decode_with_torchcodec
    errors = (RuntimeError, ValueError, IndexError, AssertionError, *([module.DECORDError] if is_decord else []))
    distinct, images = sorted(set(due)), list[np.ndarray]()
    # One batch is scaled while the next is decoded.
    with ThreadPoolExecutor(1) as pool:
        scaling = pool.submit(list[np.ndarray])
        try:
            for frames in decode(module, device, index, distinct):
                images += scaling.result()
                if not images:
                    _check_frame(frames[0], first_frame)
                scaling = pool.submit(_scale, frames, *size)
        except errors as error:
            raise ReaderError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
        images += scaling.result()
    by_time = dict(zip(distinct, images, strict=True))
    return [by_time[time] for time in due]


def _check_frame(frame: np.ndarray, expected: Any) -> None:
    """Raise a ReaderError if a frame differs from PyAV's in more than its conversion to RGB."""
    # Converted as the readers do it: fast, and without interpolation of chroma.
    image = expected.to_ndarray(format="rgb24")
    if frame.shape != image.shape:
        raise ReaderError(f"its first frame has the shape {frame.shape} instead of {image.shape}")
    difference = float(np.abs(frame.astype(int) - image).mean())
    if difference > _MAX_MEAN_DIFFERENCE:
        raise ReaderError(f"its first frame differs by {difference:.1f} levels from PyAV's")


def _scale(frames: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    bicubic = Image.Resampling.BICUBIC
    return [np.asarray(Image.fromarray(frame).resize((width, height), bicubic)) for frame in frames]


def _decode_with_decord(module: Any, device: str, index: StreamIndex, due: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield (N, H, W, 3) uint8 frames at full size; raises a ReaderError if decord would return others."""
    module.logging.set_level(module.logging.QUIET)
    kind, _, number = device.partition(":")
    context = module.gpu(int(number or 0)) if kind == "cuda" else module.cpu()
    video = module.VideoReader(str(Path(index.file.path).absolute()), ctx=context)
    stream = index.file.video
    first = index.file.seconds(stream.start_time or 0, stream)
    times = first + video.get_frame_timestamp(range(len(video)))[:, 0].astype(float)
    if times[0] < first - _DECORD_SLACK_SECONDS:
        raise ReaderError("it counts frames that are never shown")
    numbers = np.searchsorted(times, np.subtract(due, _DECORD_SLACK_SECONDS)).clip(max=len(times) - 1)
    if np.abs(times[numbers] - due).max() > _DECORD_SLACK_SECONDS:
        raise ReaderError("its frames have other times")
    # decord numbers keyframes in decoding order: it seeks to the wrong frame after one that is stored before frames
    # shown earlier (open GOP).
    keyframe_times = times[video.get_key_indices()]
    distances = [np.abs(keyframe_times - seconds).min() for seconds, _ in index.keyframes]
    if max(distances) > _DECORD_SLACK_SECONDS:
        raise ReaderError("its keyframes have other times")
    for place in range(0, len(numbers), _BATCH_FRAMES):
        yield video.get_batch(numbers[place : place + _BATCH_FRAMES]).asnumpy()


def _decode_with_torchcodec(module: Any, device: str, index: StreamIndex, due: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield (N, H, W, 3) uint8 frames at full size; raises a ReaderError if torchcodec returns others."""
    file = index.file
    video = module.VideoDecoder(
        str(Path(file.path).absolute()),
        stream_index=file.video.index,
        dimension_order="NHWC",
        num_ffmpeg_threads=0,
        device=device,
    )
    times = np.add(due, file.origin)
    # A last frame without a duration is never played.
    num_played = int(np.searchsorted(times, video.metadata.end_stream_seconds - SLACK_SECONDS))
    for place in range(0, num_played, _BATCH_FRAMES):
        seconds = times[place : min(place + _BATCH_FRAMES, num_played)]
        yield _check_times(video.get_frames_played_at((seconds + SLACK_SECONDS).tolist()), seconds)
    if num_played < len(times):
        yield _check_times(video.get_frames_at([len(video) - 1]), times[num_played:])


def _check_times(frames: Any, seconds: np.ndarray) -> np.ndarray:
    """Return torchcodec's frames as an array; raises a ReaderError if their times are not these."""
    if np.abs(frames.pts_seconds.cpu().numpy() - seconds).max() > SLACK_SECONDS:
        raise ReaderError("its frames have other times")
    return frames.data.cpu().numpy()
