"""Colour spaces of whole tiles, float32 [3, P]: CIE Lab and HSV, from sRGB and back."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# sRGB primaries to CIE XYZ under D65 (IEC 61966-2-1), divided by the white so that white is 1, 1, 1.
_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_TO_XYZ = _TO_XYZ / np.array([[0.95047], [1.0], [1.08883]])
_FROM_XYZ = np.linalg.inv(_TO_XYZ).astype(np.float32)
_TO_LAB = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], np.float32)
_FROM_LAB = np.array([[1 / 116, 1 / 500, 0], [1 / 116, 0, 0], [1 / 116, 0, -1 / 200]], np.float32)
# Where CIE's and sRGB's curves turn straight (CIE 15; IEC 61966-2-1): curve at max(t, knee) plus slope * what is below.
_T_KNEE, _F_SLOPE = np.float32(0.008856), np.float32(7.787)
_F_KNEE = np.float32(np.cbrt(0.008856))
_S_KNEE, _S_SLOPE = np.float32(0.0031308), np.float32(12.92)


@lru_cache(maxsize=1)
def _decode() -> NDArray[np.float32]:
    v = np.arange(256) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4).astype(np.float32)


def rgb_to_lab(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """CIE Lab (D65; L 0 to 100) float32 [3, P] of sRGB uint8 [3, P]."""
    t = _TO_XYZ.astype(np.float32) @ _decode().take(pixels, mode="wrap")
    below = np.minimum(t - _T_KNEE, 0)
    below *= _F_SLOPE
    np.cbrt(np.maximum(t, _T_KNEE, out=t), out=t)
    t += below
    lab = np.matmul(_TO_LAB, t, out=below)
    lab[0] -= 16
    return lab


def lab_to_rgb(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """sRGB grey levels float32 [3, P] of CIE Lab [3, P]; colours outside sRGB are clipped to 0 to 255."""
    f = _FROM_LAB @ lab
    f += np.float32(16 / 116)
    below = np.minimum(f - _F_KNEE, 0)
    below /= _F_SLOPE
    np.maximum(f, _F_KNEE, out=f)
    below += f * f * f
    t = np.matmul(_FROM_XYZ, below, out=f)
    np.clip(t, 0, 1, out=t)
    np.minimum(np.subtract(t, _S_KNEE, out=below), 0, out=below)
    below *= _S_SLOPE
    np.power(np.maximum(t, _S_KNEE, out=t), np.float32(1 / 2.4), out=t)
    t *= np.float32(1.055)
    t += below
    t -= np.float32(0.055)
    t *= 255
    return np.maximum(t, 0, out=t)


def rgb_to_hsv(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Hue, saturation and value float32 [3, P], all 0 to 1, of sRGB uint8 [3, P]."""
    r, g, b = pixels.astype(np.float32) / np.float32(255)
    top = np.maximum(np.maximum(r, g), b)
    spread = top - np.minimum(np.minimum(r, g), b)
    safe = np.where(spread > 0, spread, 1)
    hue = np.where(top == r, (g - b) / safe, np.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    return np.stack([np.where(spread > 0, hue / 6 % 1, 0), spread / np.maximum(top, 1e-6), top]).astype(np.float32)


def hsv_to_rgb(hsv: NDArray[np.float32]) -> NDArray[np.float32]:
    """sRGB grey levels float32 [3, P] of hue (any turn), saturation and value (clipped to 0 to 1) [3, P]."""
    h, s, v = hsv[0] * 6, np.clip(hsv[1], 0, 1), np.clip(hsv[2], 0, 1)
    out = np.empty_like(hsv)
    for c, turn in enumerate((5, 3, 1)):
        k = (turn + h) % 6
        out[c] = 255 * (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1))
    return out
