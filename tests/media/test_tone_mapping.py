"""HDR to SDR against the formulas of BT.2100, BT.2390 and BT.1886, in float64."""

import numpy as np
import pytest
from av.video.reformatter import ColorTrc

from salmonn.media.tone_mapping import tone_map

PQ, HLG = ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67
# Chromaticities of red, green, blue and white.
BT709 = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290)]
BT2020 = [(0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)]


def rgb_to_xyz(chromaticities):
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in chromaticities]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def pq_to_nits(code):
    power = code ** (32 / 2523)
    return 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (8192 / 1305)


def nits_to_pq(nits):
    power = (np.asarray(nits) / 10_000) ** (1305 / 8192)
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)


def hlg_to_nits(code):
    scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return 1000 * scene * (scene @ [0.2627, 0.6780, 0.0593])[..., None] ** 0.2


def compress(nits):
    """Apply the EETF of BT.2390 from 1000 to 203 nits."""
    peak, target = nits_to_pq(1000), nits_to_pq(203) / nits_to_pq(1000)
    signal, knee = np.minimum(nits_to_pq(nits) / peak, 1), 1.5 * target - 0.5
    t = (signal - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * target
    return pq_to_nits(np.where(signal < knee, signal, spline) * peak)


def reference(nits):
    light = nits @ (np.linalg.inv(rgb_to_xyz(BT709)) @ rgb_to_xyz(BT2020)).T
    most = light.max(axis=-1, keepdims=True)
    return 255 * np.clip(light * compress(most) / most / 203, 0, 1) ** (1 / 2.4)


def gray(code):
    return np.full((1, 1, 3), round(65535 * code), np.uint16)


@pytest.mark.parametrize(("transfer", "to_nits"), [(PQ, pq_to_nits), (HLG, hlg_to_nits)])
def test_colours_equal_the_formulas(transfer, to_nits):
    image = np.random.default_rng(0).integers(1000, 65536, (64, 64, 3), np.uint16)
    difference = np.abs(tone_map(image, transfer=transfer, is_bt2020=True) - reference(to_nits(image / 65535)))
    # Rounding to whole levels alone makes 0.25 and 0.5.
    assert difference.mean() < 0.3 and difference.max() < 1


@pytest.mark.parametrize(
    ("transfer", "code", "level"),
    [
        (PQ, 0, 0),
        (PQ, 0.3570, 97),  # 20 nits, below the knee: 255 * (20 / 203) ** (1 / 2.4)
        # 203 nits, diffuse white, in both (BT.2408). With w = PQ(203) / PQ(1000) = 0.7725 the spline's parameter is 1/3
        # and its value (31 w - 4) / 27: 0.5555 in PQ, which is 159 nits.
        (PQ, 0.5807, 230),
        (HLG, 0.7500, 230),
        (PQ, 0.7518, 255),  # 1000 nits
        (PQ, 1, 255),
        (HLG, 0, 0),
        (HLG, 1, 255),
    ],
)
def test_grays_equal_values_by_hand(transfer, code, level):
    image = tone_map(gray(code), transfer=transfer, is_bt2020=True)
    assert np.abs(image.astype(int) - level).max() <= 1


def test_sdr_colours_in_hdr_are_restored():
    colours = np.random.default_rng(0).integers(0, 160, (32, 32, 3))
    # 160 of 255 is 66 nits, below the knee.
    nits = 203 * (colours / 255) ** 2.4
    wide = nits @ (np.linalg.inv(rgb_to_xyz(BT2020)) @ rgb_to_xyz(BT709)).T
    restored = tone_map(np.rint(65535 * nits_to_pq(wide.clip(0))).astype(np.uint16), transfer=PQ, is_bt2020=True)
    # The published matrix has four digits, which counts in very dark components.
    assert np.abs(restored - colours)[colours > 20].max() <= 1
    narrow = tone_map(np.rint(65535 * nits_to_pq(nits)).astype(np.uint16), transfer=PQ, is_bt2020=False)
    assert np.abs(narrow - colours).max() <= 1


def test_brighter_is_never_darker():
    ramp = np.arange(0, 65536, 16, dtype=np.uint16)[None, :, None].repeat(3, 2)
    for transfer in (PQ, HLG):
        levels = tone_map(ramp, transfer=transfer, is_bt2020=True).astype(int)
        assert np.diff(levels, axis=1).min() >= 0
