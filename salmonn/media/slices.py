"""Tells from the headers in a packet whether its picture can be left undecoded: no other picture refers to it.

H.264 and HEVC in MP4, MOV and Matroska, where units are stored with their lengths. Anything that is not surely such a
picture is to be decoded, so that damage comes to light.
"""

from collections.abc import Callable, Iterator
from typing import Any

# The header is the unit's first byte: a slice of such a picture; SEI, delimiter and filler, which change no picture.
_H264_SLICES = frozenset([0x01])
_H264_OTHERS = frozenset([0x06, 0x09, 0x0C])
# The first two bytes, in the lowest temporal layer: TRAIL_N, TSA_N, STSA_N, RADL_N and RASL_N; delimiter, filler, SEI.
_HEVC_SLICES = frozenset([0x0001, 0x0401, 0x0801, 0x0C01, 0x1001])
_HEVC_OTHERS = frozenset([0x4601, 0x4C01, 0x4E01, 0x5001])


def unreferenced_test(codec: Any) -> Callable[[Any], bool]:
    """What tells of a packet, as bytes, whether its picture is one that no other refers to.

    Args:
        codec: the codec context of a stream; of streams that cannot be told, the test says no to every packet.
    """
    setup = codec.extradata or b""
    if codec.name == "h264" and len(setup) > 4 and setup[0] == 1:
        return _test(setup[4], _H264_SLICES, _H264_OTHERS, header_bytes=1)
    # In HEVC, "not referred to" holds within a temporal layer only, so there must be one.
    if codec.name == "hevc" and len(setup) > 21 and setup[0] == 1 and setup[21] >> 3 & 7 == 1:
        return _test(setup[21], _HEVC_SLICES, _HEVC_OTHERS, header_bytes=2)
    return lambda packet: False


def _test(
    length_byte: int, slices: frozenset[int], others: frozenset[int], *, header_bytes: int
) -> Callable[[Any], bool]:
    length_bytes = (length_byte & 3) + 1

    def unreferenced(packet: Any) -> bool:
        headers = set(_headers(memoryview(packet), length_bytes, header_bytes))
        return not headers.isdisjoint(slices) and headers <= slices | others

    return unreferenced


def _headers(data: memoryview, length_bytes: int, header_bytes: int) -> Iterator[int]:
    at = 0
    while at < len(data):
        begin = at + length_bytes
        yield int.from_bytes(data[begin : begin + header_bytes])
        at = begin + int.from_bytes(data[at:begin])
