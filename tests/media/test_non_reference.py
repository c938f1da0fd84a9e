"""Packets assembled by hand: which hold only frames that no other frame refers to."""

from types import SimpleNamespace

import pytest

from salmonn.media.nal_units import non_reference_test

# avcC and hvcC with lengths of 4 bytes (the last two bits are 3); hvcC's byte 21 tells of one temporal layer.
AVCC = bytes([1, 100, 0, 31, 0xFF, 0xE1])
HVCC = bytes([1, *[0] * 20, 0b00001111, 0])


def packet(*units: str, length_bytes: int = 4) -> bytes:
    """Units in hexadecimal, each after its length."""
    return b"".join((len(unit) // 2).to_bytes(length_bytes) + bytes.fromhex(unit) for unit in units)


def test_of(name: str, setup: bytes | None):
    return non_reference_test(SimpleNamespace(name=name, extradata=setup))


test_of.__test__ = False


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (["01aa"], True),  # nal_ref_idc 0, a slice of no IDR picture
        (["09f0", "0605", "01aa", "01bb", "0c"], True),  # delimiter, SEI, two slices, filler
        (["41aa"], False),  # nal_ref_idc 2
        (["61aa"], False),
        (["65aa"], False),  # IDR
        (["01aa", "41bb"], False),
        (["68aa", "01aa"], False),  # parameters of pictures to come
        (["0605"], False),  # no picture
        (["00aa"], False),  # no such unit: damage
        ([], False),
    ],
)
def test_h264(units, expected):
    assert test_of("h264", AVCC)(packet(*units)) is expected


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        *[([header + "01aa"], True) for header in ("00", "04", "08", "0c", "10")],  # TRAIL_N to RASL_N: types 0 to 8
        *[([header + "01aa"], False) for header in ("02", "06", "0a", "0e", "12", "26", "28", "2a")],  # _R, IDR, CRA
        (["4601", "4e01aa", "0001aa", "5001aa", "4c01"], True),  # delimiter, SEI, slice, SEI after it, filler
        (["0002aa"], False),  # the second temporal layer
        (["4401aa", "0001aa"], False),  # parameters
        (["0000aa"], False),  # damage
    ],
)
def test_hevc(units, expected):
    assert test_of("hevc", HVCC)(packet(*units)) is expected


def test_length_of_lengths_is_read():
    short = test_of("h264", bytes([1, 100, 0, 31, 0xFD]))  # the last two bits are 1: 2 bytes
    assert short(packet("01aa", "01bb", length_bytes=2))
    assert not short(packet("01aa", "41bb", length_bytes=2))


def test_a_length_beyond_the_packet_is_the_end_of_it():
    assert test_of("h264", AVCC)(packet("01aa")[:-1])


@pytest.mark.parametrize(
    ("name", "setup"),
    [
        ("vp9", AVCC),
        ("h264", None),
        ("h264", bytes([0, 0, 0, 1, 0x67])),  # start codes
        ("hevc", HVCC[:21]),
        ("hevc", HVCC[:21] + bytes([0b00010111, 0])),  # two temporal layers
        ("hevc", HVCC[:21] + bytes([0b00000111, 0])),  # unknown
    ],
)
def test_streams_that_cannot_be_told_are_decoded_whole(name, setup):
    assert not test_of(name, setup)(packet("01aa")) and not test_of(name, setup)(packet("0001aa"))
