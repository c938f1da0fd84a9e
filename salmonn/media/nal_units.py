"""NAL units of H.264 and HEVC: what their headers tell about a packet without decoding it."""

from collections.abc import Callable, Iterator
from typing import Any

# NAL unit types by their header. H.264, first byte: a slice of a non-reference frame; SEI, delimiter and filler, which
# change no frame. HEVC, first two bytes, in the lowest temporal layer: TRAIL_N, TSA_N, STSA_N, RADL_N and RASL_N;
# delimiter, filler and SEI.
_H264_SLICES = frozenset([0x01])
_H264_OTHERS = frozenset([0x06, 0x09, 0x0C])
_HEVC_SLICES = frozenset([0x0001, 0x0401, 0x0801, 0x0C01, 0x1001])
_HEVC_OTHERS = frozenset([0x4601, 0x4C01, 0x4E01, 0x5001])
_START_CODE = b"\0\0\1"


def _headers(packet: Any, setup: bytes, header_bytes: int) -> Iterator[int]:
    """Yield the headers of a packet's NAL units, stored with their lengths (MP4, Matroska) or after start codes."""
    data = memoryview(packet)
    if setup[:1] == b"\1":  # avcC or hvcC
        length_bytes = ((setup[4] if header_bytes == 1 else setup[21]) & 3) + 1
        position = 0
        while position < len(data):
            start = position + length_bytes
            yield int.from_bytes(data[start : start + header_bytes])
            position = start + int.from_bytes(data[position:start])
        return
    stream = bytes(data)
    position = stream.find(_START_CODE)
    while position >= 0:
        start = position + len(_START_CODE)
        yield int.from_bytes(stream[start : start + header_bytes])
        position = stream.find(_START_CODE, start)


def non_reference_test(codec: Any) -> Callable[[Any], bool]:
    """Return a test of packets: whether a packet holds nothing but a frame that no other frame refers to.

    Such frames need not be decoded. The test reads the headers of NAL units in H.264 and HEVC streams of MP4, MOV and
    Matroska, where units are stored with their lengths. It is false whenever that is not certain, so that damaged
    packets are decoded and noticed.

    Args:
        codec: the codec context of a stream.
    """
    setup = codec.extradata or b""
    if codec.name == "h264" and len(setup) > 4 and setup[0] == 1:
        header_bytes, slices, others = 1, _H264_SLICES, _H264_OTHERS
    # In HEVC, "not referred to" holds within a temporal layer only, so there must be only one.
    elif codec.name == "hevc" and len(setup) > 21 and setup[0] == 1 and setup[21] >> 3 & 7 == 1:
        header_bytes, slices, others = 2, _HEVC_SLICES, _HEVC_OTHERS
    else:
        return lambda packet: False

    def is_non_reference(packet: Any) -> bool:
        headers = set(_headers(packet, setup, header_bytes))
        return not headers.isdisjoint(slices) and headers <= slices | others

    return is_non_reference


def is_recovery_point(packet: Any, codec: Any) -> bool:
    """Return whether a keyframe of H.264 or HEVC is not an IDR frame: frames after it may refer to some before it."""
    setup = codec.extradata or b""
    if codec.name == "h264":
        return all(header & 31 != 5 for header in _headers(packet, setup, 1))
    if codec.name == "hevc":
        return all(header >> 9 & 63 not in (19, 20) for header in _headers(packet, setup, 2))
    return False
