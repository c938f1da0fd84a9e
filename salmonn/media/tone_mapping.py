"""Tone mapping of HDR video (PQ and HLG of ITU-R BT.2100) to SDR in BT.709.

Both are converted to display light in nits, as on a display with a peak of 1000 nits: the reference display of HLG, and
the peak that most PQ video is mastered for. SDR white is at 203 nits, the level of diffuse white in HDR (BT.2408).
Highlights are compressed by the curve of BT.2390, which leaves light below about 90 nits as it is.
"""

from functools import cache

import numpy as np
from av.video.reformatter import ColorTrc

HDR_TRANSFERS = frozenset([ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])

_PEAK_NITS = 1000.0
_WHITE_NITS = 203.0
_HLG_GAMMA = 1.2  # system gamma at a peak of 1000 nits
_SDR_GAMMA = 2.4  # BT.1886
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
# BT.2087, in linear light.
_BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
# Constants of PQ, in the notation of BT.2100.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
# Points in which the tone curve is tabulated, evenly spaced in PQ.
_CURVE_POINTS = 1024


def tone_map(image: np.ndarray, *, transfer: int, is_bt2020: bool) -> np.ndarray:
    """Convert HDR to SDR as it would look on a display of BT.1886.

    The tone curve is applied to the greatest of a pixel's linear components, and all three are scaled alike, so that
    hue and saturation remain. Colours outside BT.709 are clipped.

    Args:
        image: (H, W, 3) uint16 R'G'B', 65535 at the nominal peak.
        transfer: `ColorTrc.SMPTE2084` (PQ) or `ColorTrc.ARIB_STD_B67` (HLG).
        is_bt2020: whether the primaries are those of BT.2020, else of BT.709.

    Returns:
        (H, W, 3) uint8 R'G'B'.
    """
    light = _linear_light(transfer)[image]
    if transfer == ColorTrc.ARIB_STD_B67:
        light *= _PEAK_NITS * (light @ _BT2020_LUMA)[..., None] ** (_HLG_GAMMA - 1)
    if is_bt2020:
        light = light @ _BT2020_TO_BT709.T
    nits, sdr = _tone_curve()
    most = np.maximum(light.max(axis=2), nits[0])
    light *= (np.interp(most, nits, sdr) / most).astype(np.float32)[..., None]
    return np.rint(255 * np.clip(light, 0, 1) ** np.float32(1 / _SDR_GAMMA)).astype(np.uint8)


@cache
def _linear_light(transfer: int) -> np.ndarray:
    """Return (65536,) float32: the light of each 16-bit code; PQ in nits, HLG as scene light from 0 to 1."""
    code = np.arange(65536) / 65535
    if transfer == ColorTrc.SMPTE2084:
        return _pq_to_nits(code).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@cache
def _tone_curve() -> tuple[np.ndarray, np.ndarray]:
    """Return the EETF of BT.2390 with black at 0: (N,) nits and (N,) the SDR light for them, white at 1."""
    peak, white = _nits_to_pq(_PEAK_NITS), _nits_to_pq(_WHITE_NITS)
    # More than the peak is mapped to white.
    nits = _pq_to_nits(np.linspace(0, 1, _CURVE_POINTS))[1:]
    signal = np.minimum(_nits_to_pq(nits) / peak, 1)
    target = white / peak
    knee = 1.5 * target - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    # Hermite spline from the knee, with slope 1, to the target, with slope 0.
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * target
    mapped = np.where(signal < knee, signal, spline) * peak
    return nits, _pq_to_nits(mapped) / _WHITE_NITS


def _pq_to_nits(code: np.ndarray) -> np.ndarray:
    power = code ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def _nits_to_pq(nits: float | np.ndarray) -> np.ndarray:
    power = (np.asarray(nits) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
