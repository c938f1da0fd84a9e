"""Conversion of decoded frames to the RGB image that a player displays.

A file states how its frames are to be displayed: orientation, pixel shape, colour encoding, transparency, interlacing.
The processors of the published models ignore most of it; docs/media.md compares. Frames that are upright, progressive,
opaque, SDR and tagged with their colour encoding are converted as there.
"""

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import ColorPrimaries, Colorspace, Interpolation, VideoReformatter
from PIL import Image

from salmonn.media.tone_mapping import HDR_TRANSFERS, tone_map

# Without the last two flags, libswscale's colours come out 0.5 (full size) to 1.8 (scaled) levels too dark.
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# AVCOL_SPC_UNSPECIFIED and AVCOL_TRC_UNSPECIFIED.
_UNSPECIFIED = 2
# Larger untagged frames are taken for BT.709, as by players.
_MAX_SD_WIDTH, _MAX_SD_HEIGHT = 1279, 576
# A sample aspect ratio beyond this is taken for an error.
_MAX_ASPECT = 10
# Types of side data that libav 62 has and PyAV 18 does not know: LCEVC, view ID, 3D displays and EXIF.
_UNKNOWN_SIDE_DATA = range(28, 32)


def display_size(frame: Any, sample_aspect_ratio: Fraction | None) -> tuple[int, int]:
    """Return the size at which a frame is displayed.

    Args:
        frame: a decoded frame.
        sample_aspect_ratio: width divided by height of a stored pixel; None if unknown.

    Returns:
        Height and width, upright. If pixels are not square, one side is greater than stored, none is smaller.
    """
    height, width = float(frame.height), float(frame.width)
    ratio = sample_aspect_ratio or Fraction(1)
    if 1 <= ratio <= _MAX_ASPECT:
        width *= ratio
    elif 1 <= 1 / ratio <= _MAX_ASPECT:
        height /= ratio
    is_transposed, _, _ = _orientation(frame)
    return (round(width), round(height)) if is_transposed else (round(height), round(width))


def to_rgb(frame: Any, height: int, width: int) -> np.ndarray:
    """Convert a decoded frame to the image that is displayed, scaled to this size.

    Bicubic with antialiasing, as the processors of the published models scale.

    Args:
        frame: a decoded frame.
        height, width: size of the upright image.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    is_transposed, flip_rows, flip_columns = _orientation(frame)
    rows, columns = (width, height) if is_transposed else (height, width)
    image = _hdr_to_rgb(frame, rows, columns) if frame.color_trc in HDR_TRANSFERS else _sdr_to_rgb(frame, rows, columns)
    if is_transposed:
        image = image.transpose(1, 0, 2)
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def is_untagged_hd(frame: Any) -> bool:
    """Return whether a frame states no colour encoding and is taken for BT.709 because of its size."""
    return frame.colorspace == _UNSPECIFIED and (frame.width > _MAX_SD_WIDTH or frame.height > _MAX_SD_HEIGHT)


def display_warning(frame: Any) -> str | None:
    """Return a sentence on what `to_rgb` cannot display correctly, None if there is nothing."""
    # In profile 5 the frames are in a colour space of Dolby's own, which only the metadata describes, so they have no
    # tags; in the other profiles they are tagged as PQ, HLG or SDR.
    is_dolby_vision = not {"DOVI_METADATA", "DOVI_RPU_BUFFER"}.isdisjoint(data.type.name for data in _side_data(frame))
    if is_dolby_vision and frame.color_trc == _UNSPECIFIED:
        return "its colours are wrong, as Dolby Vision profile 5 cannot be displayed; convert it to HDR10"
    return None


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Return whether to transpose, then to reverse the rows, then to reverse the columns, by the display matrix.

    The matrix maps stored coordinates, x to the right and y downwards, to displayed ones:

        x' = a x + c y        upright:  a, d > 0, b = c = 0
        y' = b x + d y        rotated by 90 or 270 degrees, perhaps mirrored:  a = d = 0

    Other angles are taken for the nearest right angle.
    """
    matrix = next((data for data in _side_data(frame) if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _side_data(frame: Any) -> Any:
    # Not frame.side_data, which refers to the frame that refers to it: frames would pile up until garbage collection.
    try:
        return SideDataContainer(frame)  # type: ignore[call-arg]
    except ValueError:  # of a type that PyAV does not know
        return _side_data(_filter(frame, *[("sidedata", f"mode=delete:type={n}") for n in _UNKNOWN_SIDE_DATA]))


def _filter(frame: Any, *filters: tuple[str, str]) -> Any:
    """Return the frame that results from libav filters, each given with its options."""
    graph = Graph()
    graph.threads = 1
    nodes = [graph.add(name, options) for name, options in filters]
    buffer = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, av.time_base)
    )
    graph.link_nodes(buffer, *nodes, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def _sdr_to_rgb(frame: Any, height: int, width: int) -> np.ndarray:
    """Convert a frame to (H, W, 3) uint8 RGB of this size, as stored in orientation."""
    if frame.interlaced_frame:
        image = _interpolate_rows(_full_size(_filter(frame, ("field", "type=top"))), frame.height)
    else:
        image = _full_size(frame)
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _full_size(frame: Any) -> np.ndarray:
    """Convert a frame to (H, W, 3) uint8 RGB of its own size, on black where transparent."""
    # Palettes may hold alpha.
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    image = (
        VideoReformatter()
        .reformat(
            frame,
            format="rgba" if has_alpha else "rgb24",
            src_colorspace=Colorspace.ITU709 if is_untagged_hd(frame) else None,
            interpolation=_INTERPOLATION,
            threads=1,
        )
        .to_ndarray()
    )
    if not has_alpha:
        return image
    color, alpha = image[..., :3], image[..., 3:].astype(np.uint16)
    # Some 32-bit recordings leave all of alpha at 0, although they are opaque.
    return ((color * alpha + 127) // 255).astype(np.uint8) if alpha.any() else color


def _interpolate_rows(field: np.ndarray, height: int) -> np.ndarray:
    """Restore a frame of this height from its top field: the rows between are the mean of those above and below."""
    below = np.concatenate([field[1:], field[-1:]])
    between = ((field.astype(np.uint16) + below + 1) // 2).astype(np.uint8)
    return np.stack([field, between], axis=1).reshape(-1, *field.shape[1:])[:height]


def _hdr_to_rgb(frame: Any, height: int, width: int) -> np.ndarray:
    """Convert an HDR frame to (H, W, 3) uint8 SDR of this size, as stored in orientation."""
    if frame.interlaced_frame:
        frame = _filter(frame, ("field", "type=top"))
    # Scaled first: the tone mapping is slower than the scaling.
    scaled = VideoReformatter().reformat(
        frame,
        width=width,
        height=height,
        format="rgb48le",
        src_colorspace=Colorspace.BT2020 if frame.colorspace == _UNSPECIFIED else None,
        interpolation=_INTERPOLATION,
        threads=1,
    )
    return tone_map(
        scaled.to_ndarray(),
        transfer=frame.color_trc,
        is_bt2020=frame.color_primaries in (ColorPrimaries.BT2020, ColorPrimaries.UNSPECIFIED),
    )
