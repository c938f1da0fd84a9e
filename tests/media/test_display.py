"""Decoded frames are converted to what a player displays."""

import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from salmonn.media.clip import read_clip
from salmonn.media.display import display_size, display_warning, to_rgb
from salmonn.media.frame_sampling import UniformSampler

RED, LIME, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
COLOURS = {"R": RED, "L": LIME, "B": BLUE, "Y": YELLOW}
# Value range of a 10-bit component, limited, and its offset.
LUMA, CHROMA, BLACK, NEUTRAL = 876, 896, 64, 512


def quadrants(height=64, width=96):
    """Red and lime above blue and yellow."""
    image = np.zeros((height, width, 3), np.uint8)
    top, left = slice(height // 2), slice(width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    image[top, left], image[top, right], image[bottom, left], image[bottom, right] = RED, LIME, BLUE, YELLOW
    return image


def name_quadrants(image):
    """Return the letters of the four quadrants, by rows."""
    height, width = image.shape[:2]
    centers = [image[y, x].astype(int) for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)]
    return "".join(min(COLOURS, key=lambda name: np.abs(COLOURS[name] - center).sum()) for center in centers)


def write(path, images, *, codec="libx264", pix_fmt="yuv420p", prepare=lambda stream: None):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=5)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        prepare(stream)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 5)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def first_frame(path):
    with av.open(str(path)) as file:
        return next(file.decode(video=0))


def fill(format_name, *values, width=64, height=64):
    """Return a frame with these values of its planes, in full width and height."""
    frame = av.VideoFrame(width, height, format_name)
    dtype = np.uint8 if max(values) < 256 and "10" not in format_name else np.uint16
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(np.full(plane.buffer_size // np.dtype(dtype).itemsize, value, dtype).tobytes())
    return frame


def filtered(frame, name, options):
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add(name, options), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def convert_as_published(frame, height, width):
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    image = VideoReformatter().reformat(frame, format="rgb24", interpolation=flags, threads=1).to_ndarray()
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def noise(format_name, width, height):
    rng = np.random.default_rng(0)
    frame = av.VideoFrame(width, height, format_name)
    for plane in frame.planes:
        words = rng.integers(0, 1024, plane.buffer_size // 2, np.uint16).tobytes()
        data = rng.integers(0, 256, plane.buffer_size, np.uint8).tobytes()
        plane.update(words if "10" in format_name else data)
    return frame


@pytest.mark.parametrize("size", [(1280, 720), (320, 240)])
@pytest.mark.parametrize("format_name", ["yuv420p", "yuv420p10le", "yuvj422p", "rgb24", "bgr0", "gbrp", "gray"])
def test_tagged_frames_are_converted_as_published(format_name, size):
    frame = noise(format_name, *size)
    frame.colorspace = Colorspace.ITU601 if size[0] == 320 else Colorspace.ITU709
    assert display_size(frame, None) == display_size(frame, Fraction(1)) == size[::-1]
    np.testing.assert_array_equal(to_rgb(frame, 168, 280), convert_as_published(frame, 168, 280))
    np.testing.assert_array_equal(to_rgb(frame, *size[::-1]), convert_as_published(frame, *size[::-1]))


# Counter-clockwise angle, then mirrored left-right and top-bottom: the quadrants, worked out on paper.
ORIENTATIONS = [
    (0, False, False, "RLBY"),
    (90, False, False, "LYRB"),
    (180, False, False, "YBLR"),
    (270, False, False, "BRYL"),
    (0, True, False, "LRYB"),
    (0, False, True, "BYRL"),
    (90, True, False, "YLBR"),
    (270, True, False, "RBLY"),
    (30, False, False, "RLBY"),
    (-120, False, False, "BRYL"),
    (160, True, False, "BYRL"),
]


@pytest.mark.parametrize(("degrees", "mirror", "flip", "names"), ORIENTATIONS)
def test_display_matrix_is_applied(tmp_path, degrees, mirror, flip, names):
    path = write(
        tmp_path / "turned.mp4",
        [quadrants()],
        prepare=lambda stream: stream.set_display_rotation(degrees, hflip=mirror, vflip=flip),
    )
    is_sideways = degrees in (90, 270, -120)
    clip = read_clip(path, UniformSampler(factor=4))
    assert clip.frames.shape[1:] == ((96, 64, 3) if is_sideways else (64, 96, 3))
    assert name_quadrants(clip.frames[0]) == names


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quadrants()).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "photo.jpg")))
    frame = first_frame(tmp_path / "photo.jpg")
    assert display_size(frame, None) == upright.shape[:2]
    assert name_quadrants(to_rgb(frame, *upright.shape[:2])) == name_quadrants(upright)
    assert display_warning(frame) is None


def test_frames_are_not_kept_alive(tmp_path):
    path = write(
        tmp_path / "turned.mp4", [quadrants()], prepare=lambda stream: stream.set_display_rotation(90, hflip=True)
    )
    frame = first_frame(path)
    before = sys.getrefcount(frame)
    display_size(frame, None), to_rgb(frame, 96, 64), display_warning(frame)
    assert sys.getrefcount(frame) == before


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        (Fraction(16, 15), (576, 768)),  # PAL, 4:3
        (Fraction(64, 45), (576, 1024)),  # PAL, 16:9
        (Fraction(8, 9), (648, 720)),  # narrower than high: the height grows
        (Fraction(1), (576, 720)),
        (None, (576, 720)),
        (Fraction(0), (576, 720)),
        (Fraction(10), (576, 7200)),
        (Fraction(11), (576, 720)),
        (Fraction(1, 11), (576, 720)),
    ],
)
def test_display_size_follows_the_sample_aspect_ratio(ratio, size):
    assert display_size(av.VideoFrame(720, 576, "yuv420p"), ratio) == size


def test_anamorphic_video_is_sampled_as_its_square_pixel_twin(tmp_path):
    def stretch(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(5, 3)

    narrow = write(tmp_path / "narrow.mp4", [quadrants(96, 96)] * 2, prepare=stretch)
    turned = write(
        tmp_path / "turned.mp4",
        [quadrants(96, 96)] * 2,
        prepare=lambda stream: (stretch(stream), stream.set_display_rotation(90)),
    )
    square = write(tmp_path / "square.mp4", [quadrants(96, 160)] * 2)
    clips = [read_clip(path, UniformSampler()) for path in (narrow, turned, square)]
    assert [clip.frames.shape[1:] for clip in clips] == [(84, 168, 3), (168, 84, 3), (84, 168, 3)]
    assert np.abs(clips[0].frames.astype(int) - clips[2].frames).mean() < 3


# (200, 100, 50) in limited range: 16 + 219 Y', 128 + 224 C'.
IN_BT601, IN_BT709 = (123, 91, 175), (117, 96, 174)


@pytest.mark.parametrize(
    ("size", "colorspace", "planes"),
    [
        ((1280, 536), 2, IN_BT709),
        ((720, 1280), 2, IN_BT709),
        ((960, 720), 2, IN_BT709),
        ((720, 576), 2, IN_BT601),
        ((1024, 576), 2, IN_BT601),
        ((320, 240), 2, IN_BT601),
        ((320, 240), Colorspace.ITU709, IN_BT709),
        ((1280, 720), Colorspace.ITU601, IN_BT601),
        ((1280, 720), Colorspace.SMPTE240M, None),
    ],
)
def test_untagged_frames_are_read_by_their_size(size, colorspace, planes):
    width, height = size
    frame = fill("yuv444p", *(planes or IN_BT709), width=width, height=height)
    frame.colorspace = colorspace
    expected = (200, 100, 50) if planes else convert_as_published(frame, 8, 8)[0, 0]
    assert np.abs(to_rgb(frame, 8, 8) - np.array(expected, int)).max() <= 2


def test_full_range_is_kept_in_untagged_frames():
    # 255 Y', 128 + 255 C' of BT.709.
    frame = fill("yuv444p", 118, 91, 180, width=1280, height=720)
    frame.color_range = ColorRange.JPEG
    assert np.abs(to_rgb(frame, 8, 8) - np.array((200, 100, 50))).max() <= 2


def test_transparent_parts_are_black():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (200, 100, 50, 255)
    rgba[32:, :32] = (200, 100, 50, 128)
    rgba[32:, 32:] = (200, 100, 50, 0)
    image = to_rgb(av.VideoFrame.from_ndarray(rgba, format="rgba"), 64, 64)
    # 128 / 255 of the colour.
    assert [image[y, x].tolist() for y, x in ((0, 0), (40, 0), (40, 40))] == [[200, 100, 50], [100, 50, 25], [0, 0, 0]]
    argb = av.VideoFrame.from_ndarray(np.roll(rgba, 1, axis=2), format="argb")
    np.testing.assert_array_equal(to_rgb(argb, 64, 64), image)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("qtrle", "argb", "mov"),
        ("png", "rgba", "mov"),
        ("prores_ks", "yuva444p10le", "mov"),
        ("ffv1", "yuva420p", "mkv"),
    ],
)
def test_transparent_video_is_black(tmp_path, codec, pix_fmt, suffix):
    rgba = np.full((64, 64, 4), 255, np.uint8)
    rgba[:, 32:, 3] = 0
    image = to_rgb(first_frame(write(tmp_path / f"clear.{suffix}", [rgba], codec=codec, pix_fmt=pix_fmt)), 64, 64)
    assert image[:, :28].min() > 250 and image[:, 36:].max() < 5


def test_alpha_that_is_0_everywhere_is_not_used():
    rgba = np.full((8, 8, 4), (200, 100, 50, 0), np.uint8)
    assert to_rgb(av.VideoFrame.from_ndarray(rgba, format="rgba"), 8, 8)[0, 0].tolist() == [200, 100, 50]


def test_opaque_frames_with_alpha_are_converted_as_published():
    frame = fill("yuva420p", 118, 95, 178, 255)
    np.testing.assert_array_equal(to_rgb(frame, 28, 28), convert_as_published(frame, 28, 28))
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    rgba[..., 3] = 255
    frame = av.VideoFrame.from_ndarray(rgba, format="rgba")
    np.testing.assert_array_equal(to_rgb(frame, 28, 28), convert_as_published(frame, 28, 28))


def test_palettes_are_read_with_their_alpha(tmp_path):
    image = Image.fromarray(quadrants()).quantize(4)
    image.save(tmp_path / "opaque.png")
    assert name_quadrants(to_rgb(first_frame(tmp_path / "opaque.png"), 64, 96)) == "RLBY"
    image.save(tmp_path / "clear.png", transparency=image.getpixel((0, 0)))
    frame = first_frame(tmp_path / "clear.png")
    assert frame.format.name == "pal8"
    shown = to_rgb(frame, 64, 96)
    assert shown[16, 24].tolist() == [0, 0, 0] and np.abs(shown[16, 72] - np.array(LIME)).max() < 5


def test_one_field_of_interlaced_frames_is_shown():
    woven = np.zeros((64, 64, 3), np.uint8)
    woven[::2], woven[1::2] = RED, BLUE
    frame = av.VideoFrame.from_ndarray(woven, format="rgb24")
    assert np.ptp(to_rgb(frame, 64, 64).astype(int), axis=0).max() == 255
    interlaced = filtered(frame, "setfield", "mode=tff")
    assert interlaced.interlaced_frame
    np.testing.assert_array_equal(to_rgb(interlaced, 64, 64), np.full((64, 64, 3), RED))
    # The rows of chroma in 4:2:0 belong to one field each, too.
    frame = av.VideoFrame(64, 64, "yuv420p")
    for plane, top, bottom in zip(frame.planes, IN_BT601, (41, 240, 110), strict=True):
        rows = np.full((plane.height, plane.line_size), bottom, np.uint8)
        rows[::2] = top
        plane.update(rows.tobytes())
    image = to_rgb(filtered(frame, "setfield", "mode=tff"), 64, 64)
    assert np.abs(image - np.array((200, 100, 50))).max() <= 2


@pytest.mark.parametrize("height", [64, 65])
def test_rows_between_fields_are_interpolated(height):
    ramp = np.repeat(np.arange(height, dtype=np.uint8)[:, None, None] * 2, 3, axis=2).repeat(16, axis=1)
    frame = filtered(av.VideoFrame.from_ndarray(ramp, format="rgb24"), "setfield", "mode=tff")
    image = to_rgb(frame, height, 16)
    np.testing.assert_array_equal(image[:63], ramp[:63])
    # Nothing is known below the last row of the top field.
    assert image[63, 0, 0] == (124 if height == 64 else 126)


def to_bt2020_10bit(rgb):
    """Return 10-bit Y', C'b and C'r, limited range, of one R'G'B' colour from 0 to 1."""
    luma = np.dot(rgb, (0.2627, 0.6780, 0.0593))
    blue, red = (rgb[2] - luma) / 1.8814, (rgb[0] - luma) / 1.4746
    return [round(value) for value in (BLACK + LUMA * luma, NEUTRAL + CHROMA * blue, NEUTRAL + CHROMA * red)]


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize("colorspace", [2, Colorspace.BT2020])
@pytest.mark.parametrize(
    ("transfer", "rgb", "expected"),
    [
        # BT.709's (120, 60, 30) at a white of 203 nits, computed from the chromaticities of both primaries.
        (ColorTrc.SMPTE2084, (0.3693, 0.2805, 0.1902), (120, 60, 30)),
        # Diffuse white in both: 58 % of PQ, 75 % of HLG.
        (ColorTrc.SMPTE2084, (0.5807, 0.5807, 0.5807), (230, 230, 230)),
        (ColorTrc.ARIB_STD_B67, (0.75, 0.75, 0.75), (230, 230, 230)),
        (ColorTrc.ARIB_STD_B67, (0, 0, 0), (0, 0, 0)),
    ],
)
def test_hdr_is_tone_mapped(transfer, rgb, expected, colorspace, is_interlaced):
    frame = fill("yuv420p10le", *to_bt2020_10bit(rgb))
    frame.color_trc, frame.colorspace, frame.color_primaries = transfer, colorspace, ColorPrimaries.BT2020
    if is_interlaced:
        frame = filtered(frame, "setfield", "mode=tff")
    image = to_rgb(frame, 28, 56)
    assert image.shape == (28, 56, 3) and image.dtype == np.uint8
    assert np.abs(image - np.array(expected)).max() <= 2
    # The tags decide: the same values are shown as they are if tagged as SDR.
    frame.color_trc = ColorTrc.BT709
    frame.colorspace = Colorspace.BT2020
    assert np.abs(to_rgb(frame, 28, 56) - 255 * np.array(rgb)).max() <= 2


def test_hdr_is_turned_upright(tmp_path):
    def prepare(stream):
        stream.set_display_rotation(90, hflip=True)
        stream.codec_context.color_trc = ColorTrc.ARIB_STD_B67

    path = write(tmp_path / "turned.mp4", [quadrants()], codec="libx264", pix_fmt="yuv420p10le", prepare=prepare)
    frame = first_frame(path)
    assert frame.color_trc == ColorTrc.ARIB_STD_B67
    assert name_quadrants(to_rgb(frame, *display_size(frame, None))) == "YLBR"


# A NAL unit that holds reference processing units of Dolby Vision profile 5: no mapping, no display metadata.
DOLBY_VISION = bytes.fromhex(
    "7c01190809004061b6504f003ff801ffc00fffd000000800000680000040000034000003020000030000030000030080"
)


@pytest.mark.parametrize("is_tagged", [False, True])
def test_dolby_vision_without_a_base_layer_is_reported(tmp_path, is_tagged):
    def prepare(stream):
        stream.options = {"x265-params": "log-level=none"}
        if is_tagged:
            stream.codec_context.color_trc = ColorTrc.SMPTE2084

    path = write(tmp_path / "plain.mp4", [quadrants()] * 3, codec="libx265", pix_fmt="yuv420p10le", prepare=prepare)
    assert display_warning(first_frame(path)) is None
    with av.open(str(path)) as source, av.open(str(tmp_path / "dolby.mp4"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                copy = av.Packet(bytes(packet) + len(DOLBY_VISION).to_bytes(4) + DOLBY_VISION)
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                out.mux(copy)
    warning = display_warning(first_frame(tmp_path / "dolby.mp4"))
    assert warning is None if is_tagged else "Dolby Vision profile 5" in warning
    clip = read_clip(tmp_path / "dolby.mp4", UniformSampler())
    assert clip.warnings == (() if is_tagged else (warning,)) and clip.is_complete
