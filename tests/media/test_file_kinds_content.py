"""Files with unusual streams or content: damaged or empty packets, several programs, mirrored frames, encryption.

Each test builds files of one kind, after public reports about such files.
"""

import struct
from pathlib import Path

import av
import numpy as np
import pytest

from salmonn.media.clip import ClipError
from tests.media.builders import (
    BASE,
    COLOURS,
    PALETTE,
    TONES,
    assert_colours,
    assert_loss_is_told,
    assert_seconds,
    assert_tones,
    assert_whole,
    colour_of,
    crc32,
    is_video,
    pid_of,
    pitch,
    read,
    regular,
    replaced,
    seconds_of,
    transport_packets,
    write_media,
)

OPEN_GOP = {"preset": "ultrafast", "bf": "2", "x264-params": "open-gop=1:keyint=25:b-adapt=0:scenecut=0"}


def with_cut_sei(packets):
    """Put a supplemental message that is cut short before the slices of each video packet."""
    return [insert_cut_sei(packet) if is_video(packet) else packet for packet in packets]


def insert_cut_sei(packet):
    """Insert an unregistered user message of 200 bytes, of which 20 follow, before the first slice."""
    hevc = packet.stream.codec_context.name == "libx265"
    message = (b"\x4e\x01" if hevc else b"\x06") + b"\x05\xc8" + bytes(range(1, 21))
    data = bytes(packet)
    position = data.index(b"\0\0\1")
    while not is_slice(data[position + 3], hevc):
        position = data.index(b"\0\0\1", position + 3)
    return replaced(packet, data[:position] + b"\0\0\1" + message + b"\0" + data[position:])


def is_slice(header, hevc) -> bool:
    """Return whether the first byte of a NAL unit is that of a slice."""
    return header >> 1 & 0x3F < 32 if hevc else header & 0x1F in (1, 5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_malformed_messages_between_frames(tmp_path, suffix, codec):
    path = write_media(tmp_path / f"camera.{suffix}", **BASE, video_codec=codec, edit=with_cut_sei)
    clip = read(path)
    assert_colours(clip)
    assert_tones(clip)
    assert_whole(clip)


@pytest.mark.parametrize(("kind", "share"), [("video", 0.3), ("video", 0.7), ("audio", 0.55)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])  # a frame of one packet, and of several
def test_a_lost_packet_of_a_transport_stream_is_told(tmp_path, kind, share, codec):
    path = write_media(
        tmp_path / "air.ts",
        frame_times=regular(0, 6),
        audio=(0, 6),
        video_codec=codec,
        codec_options={"g": "12", "bf": "0"},
    )
    with av.open(str(path)) as file:
        pid = file.streams.best(kind).id
    packets = transport_packets(path)
    places = [place for place, packet in enumerate(packets) if pid_of(packet) == pid]
    del packets[places[round(share * len(places))]]
    path.write_bytes(b"".join(packets))
    clip = read(path)
    assert_colours(clip)
    assert_seconds(clip, video=6, audio=6)
    assert pitch(clip.waveform, 0.1, 0.9) == pytest.approx(400, abs=5)
    assert pitch(clip.waveform, 5.1, 5.9) == pytest.approx(1400, abs=5)
    assert_loss_is_told(clip)


@pytest.mark.parametrize("swapped", [False, True])
def test_video_and_audio_are_of_one_program(tmp_path, swapped):
    coloured = write_media(tmp_path / "1.ts", **BASE, layout="mono")
    grey = write_media(
        tmp_path / "2.ts", **BASE, colours={0: "gray"}, tones={0: 3000}, layout="stereo",
        mpegts_start_pid="0x200", mpegts_pmt_start_pid="0x1010", mpegts_service_id="2",
    )  # fmt: skip
    programs = [(1, 0x1000), (2, 0x1010)]
    path = merge_programs(tmp_path / "two.ts", coloured, grey, programs[::-1] if swapped else programs)
    with av.open(str(path)) as file:
        assert len(file.streams.video) == len(file.streams.audio) == 2
    clip = read(path)
    if colour_of(clip.frames[0]) == "gray":
        assert_colours(clip, {0: "gray"})
        assert_tones(clip, dict.fromkeys(TONES, 3000))
    else:
        assert_colours(clip)
        assert_tones(clip)
    assert_whole(clip)


def merge_programs(path: Path, first: Path, second: Path, programs: list[tuple[int, int]]) -> Path:
    """Interleave two transport streams under one program table."""
    body = b"".join(struct.pack(">HH", number, 0xE000 | table) for number, table in programs)
    section = b"\x00" + struct.pack(">HHBBB", 0xB000 | 5 + len(body) + 4, 1, 0xC1, 0, 0) + body
    table = b"\0" + section + struct.pack(">I", crc32(section, 0xFFFFFFFF))
    parts = [transport_packets(first), transport_packets(second)]
    order = sorted(
        (number / len(packets), part, packet)
        for part, packets in enumerate(parts)
        for number, packet in enumerate(packets)
    )
    with path.open("wb") as out:
        for _, part, packet in sorted(order):
            if pid_of(packet) >= 0x100:
                out.write(packet)
            elif pid_of(packet) == 0 and part == 0:
                out.write(packet[:4] + table.ljust(184, b"\xff"))
    return path


@pytest.mark.parametrize(
    ("suffix", "known", "unknown", "first"),
    [("mov", b"mp4a", b"apac", False), ("mov", b"mp4a", b"apac", True), ("mkv", b"A_AAC", b"A_XXX", True)],
)
def test_a_audio_track_of_an_unknown_codec(tmp_path, suffix, known, unknown, first):
    source = write_media(tmp_path / f"one.{suffix}", **BASE, layout="mono")
    path = tmp_path / f"two.{suffix}"
    # The second track has more channels and bits, so that libav prefers it.
    other = write_media(tmp_path / f"other.{suffix}", audio=(0, 6), tones={0: 3000})
    with av.open(str(source)) as file, av.open(str(other)) as more, av.open(str(path), "w") as out:
        copies = {stream: out.add_stream_from_template(stream) for stream in file.streams.video}
        tracks = [file.streams.audio[0], more.streams.audio[0]]
        for stream in reversed(tracks) if first else tracks:
            copies[stream] = out.add_stream_from_template(stream)
            copies[stream].disposition = av.stream.Disposition.default
        packets = [packet for part in (file, more) for packet in part.demux() if packet.size]
        for packet in sorted(packets, key=seconds_of):
            packet.stream = copies[packet.stream]
            out.mux(packet)
    data = path.read_bytes()
    # The audio tracks follow the video track; each has its codec in its description.
    place = data.index(known)
    for _ in range(0 if first else 1):
        place = data.index(known, data.index(b"stsd" if suffix == "mov" else b"A_", place + 1))
    data = data[:place] + unknown + data[place + len(known) :]
    # MOV repeats the codec in a box of its own.
    place = data.find(b"esds", place)
    path.write_bytes(data if place < 0 else data[:place] + b"free" + data[place + 4 :])
    with av.open(str(path)) as file:
        assert sum(stream.codec_context is None for stream in file.streams.audio) == 1
    clip = read(path)
    assert_colours(clip)
    assert_tones(clip)
    assert clip.is_complete


QUADRANTS = [["red", "lime"], ["blue", "yellow"]]
# Matrices as the container stores them: a, b, c, d of (x, y) -> (ax + cy, bx + dy), and what they do to the frame.
MATRICES = {
    "mirrored left to right": ((-1, 0, 0, 1), [["lime", "red"], ["yellow", "blue"]]),
    "mirrored upside down": ((1, 0, 0, -1), [["blue", "yellow"], ["red", "lime"]]),
    "transposed": ((0, 1, 1, 0), [["red", "blue"], ["lime", "yellow"]]),
    "transposed at the other diagonal": ((0, -1, -1, 0), [["yellow", "lime"], ["blue", "red"]]),
    "turned by 90 degrees": ((0, 1, -1, 0), [["blue", "red"], ["yellow", "lime"]]),
    "turned by 180 degrees": ((-1, 0, 0, -1), [["yellow", "blue"], ["lime", "red"]]),
    "turned by 270 degrees": ((0, -1, 1, 0), [["lime", "yellow"], ["red", "blue"]]),
}


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("name", MATRICES)
def test_mirrored_and_turned_frames(tmp_path, suffix, name):
    (a, b, c, d), expected = MATRICES[name]
    path = tmp_path / f"selfie.{suffix}"
    image = np.array([[PALETTE[name] for name in row] for row in QUADRANTS], np.uint8).repeat(32, 0).repeat(48, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(25):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    place = data.index(b"tkhd") + 4 + 40
    data = (
        data[:place] + struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30) + data[place + 36 :]
    )
    path.write_bytes(data)
    clip = read(path)
    for frame in clip.frames:
        halves = [np.split(rows, 2, axis=1) for rows in np.split(frame, 2)]
        assert [[colour_of(part[2:-2, 2:-2]) for part in row] for row in halves] == expected
    assert_whole(clip)


@pytest.mark.parametrize(
    ("suffix", "codec", "codec_options", "start"),
    [
        *[("ts", "libx264", OPEN_GOP, start) for start in (0.2, 0.64, 0.88)],
        ("mkv", "libx264", OPEN_GOP, 0.64),
        ("ts", "libx264", {"preset": "ultrafast", "bf": "2", "g": "25", "b_strategy": "0"}, 0.88),
        ("ts", "libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:keyint=25:open-gop=1"}, 0.2),
        ("ts", "mpeg2video", {"bf": "2", "g": "25"}, 0.64),
    ],
)
def test_a_recording_that_starts_within_a_group_of_frames(tmp_path, suffix, codec, codec_options, start):
    origin = []

    def cut(packets):
        kept = [packet for packet in packets if packet.dts * packet.time_base >= start]
        origin.append(min(seconds_of(packet) for packet in kept))
        return kept

    path = write_media(
        tmp_path / f"capture.{suffix}", **BASE, video_codec=codec,
        codec_options=codec_options, edit=cut,
    )  # fmt: skip
    clip = read(path)
    colours = {second: colour for second, colour in COLOURS.items() if second > 0}
    # Videos between the leading ones and the first keyframe may be shown if they decode.
    first = next(number for number, frame in enumerate(clip.frames) if colour_of(frame) == "lime")
    assert clip.frame_times[first] + origin[0] < 1.5
    assert all(colour_of(frame) == "red" for frame in clip.frames[:first])
    for frame, seconds in zip(clip.frames[first:], clip.frame_times[first:] + origin[0], strict=True):
        nearby = [colours[min(max(1, int(seconds + slack)), 5)] for slack in (-0.09, 0.09)]
        assert colour_of(frame) in nearby, seconds
    assert {colour_of(frame) for frame in clip.frames} >= set(colours.values())
    assert_tones(clip, {second: tone for second, tone in TONES.items() if second > 0}, shift=-origin[0])
    assert clip.is_complete


# Luma and chroma of the base's colours, at least 19 from 128 or equal to it: all that the encoder below can write.
THEORA_COLOURS = [(81, 90, 240), (148, 54, 34), (41, 240, 108), (210, 16, 148), (106, 202, 222), (170, 166, 16)]


def bits(*fields: tuple[int, int]) -> str:
    """Return numbers, each with its count of bits, as binary digits."""
    return "".join(f"{value:0{count}b}" if count else "" for value, count in fields)


def to_bytes(digits: str) -> bytes:
    """Pack binary digits into bytes."""
    digits = digits.ljust(-(-len(digits) // 8) * 8, "0")
    return int(digits, 2).to_bytes(len(digits) // 8)


def theora_headers() -> list[bytes]:
    """Return the headers of a Theora stream of 64 x 64 pixels and 5 frames per second.

    The Huffman tables have three tokens: 0 is a run of ended blocks, 10 and 11 are coefficients.
    """
    identification = bytes([3, 2, 1]) + struct.pack(">HH", 4, 4) + bytes([0, 0, 64, 0, 0, 64, 0, 0])
    identification += struct.pack(">II", 5, 1) + bytes(10) + to_bytes(bits((0, 6), (6, 5), (0, 5)))
    # No loop filter; scales of 1; two base matrices of ones: all quantizers are at their minimum, 16 for DC.
    setup = bits((0, 3), (0, 4)) + "1" * 64 + bits((0, 4)) + "1" * 64 + bits((1, 9)) + bits((1, 8)) * 128
    # One range of quantizers between equal matrices, for all planes and frame types.
    setup += bits((0, 1), (62, 6), (0, 1)) + "0" * 2 + "00" * 3
    setup += ("0" + bits((1, 1), (6, 5)) + "0" + bits((1, 1), (21, 5)) + bits((1, 1), (22, 5))) * 80
    comment = struct.pack("<II", 0, 0)
    return [b"\x80theora" + identification, b"\x81theora" + comment, b"\x82theora" + to_bytes(setup)]


def theora_keyframe(colour: tuple[int, int, int]) -> bytes:
    """Return a Theora frame of one colour: the other blocks of a plane are predicted from its first."""
    digits, num_open = bits((0, 1), (0, 1), (0, 6), (0, 1), (0, 3), (0, 4), (0, 4)), 0
    for level, num_blocks in zip(colour, (64, 16, 16), strict=True):
        value = 2 * (level - 128)
        sign, size = value < 0, abs(value)
        digits += "11" + bits((sign, 1), (size - 69, 9)) if size > 68 else "10" + bits((sign, 1), (size - 37, 5))
        digits += "0" + bits((num_blocks - 1, 12))
        num_open += 1
    return to_bytes(digits + bits((0, 4), (0, 4)) + "0" + bits((num_open, 12)))


def ogg_page(packet: bytes, granule: int, number: int, flags: int = 0) -> bytes:
    """Return an Ogg page that holds one packet."""
    lacing = bytes([255] * (len(packet) // 255) + [len(packet) % 255])
    head = struct.pack("<4sBBqII", b"OggS", 0, flags, granule, 7, number)
    tail = bytes([len(lacing)]) + lacing + packet
    return head + struct.pack("<I", crc32(head + bytes(4) + tail, 0)) + tail


def write_theora(path: Path) -> Path:
    """Write the base's video as Theora: a keyframe each second, and empty packets that repeat it."""
    pages = [ogg_page(packet, 0, number, 2 * (number == 0)) for number, packet in enumerate(theora_headers())]
    for number in range(30):
        second, repeats = divmod(number, 5)
        packet = b"" if repeats else theora_keyframe(THEORA_COLOURS[second])
        pages.append(ogg_page(packet, (5 * second + 1) << 6 | repeats, len(pages), 4 * (number == 29)))
    path.write_bytes(b"".join(pages))
    return path


def test_theora_with_empty_packets(tmp_path):
    path = write_theora(tmp_path / "desktop.ogv")
    clip = read(path)
    assert_colours(clip)
    assert_seconds(clip, video=6)
    assert_whole(clip)
    part = read(path, start_seconds=2.5)
    assert_colours(part, {0: "blue"} | {second: COLOURS[second] for second in (3, 4, 5)})


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libx264"])
def test_dropped_frames_in_avi(tmp_path, codec):
    # The muxer writes an empty chunk for each frame that is not there.
    path = write_media(
        tmp_path / "dropped.avi", frame_times=[0.0, 0.04, 1.0, 2.0, 3.0, 4.0, 5.0, 5.96], audio=(0, 6),
        video_codec=codec, audio_codec="libmp3lame",
    )  # fmt: skip
    clip = read(path)
    assert_colours(clip)
    assert_seconds(clip, video=6)
    assert_whole(clip)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("audio", [None, (0, 2)])
def test_encrypted_files_are_refused_as_such(tmp_path, suffix, audio):
    for number in range(8):  # the initialization vector is random, and some noise decodes
        path = write_media(
            tmp_path / f"rented{number}.{suffix}", frame_times=regular(0, 2), audio=audio,
            encryption_scheme="cenc-aes-ctr", encryption_key="00112233445566778899aabbccddeeff",
            encryption_kid="a7e61c373e219033c21091fa607bf3b8",
        )  # fmt: skip
        with pytest.raises(ClipError, match=rf"rented{number}\.{suffix}: .*encrypted") as refusal:
            read(path)
        assert "download it again" not in str(refusal.value)
