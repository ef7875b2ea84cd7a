"""What all tissues share: the patient's biology, fibres, nuclei of every kind, vessels.

Densities count in units of stain: a small lymphocyte nucleus has a haematoxylin density of about 1.5, dense
muscle an eosin density of about 0.8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosynth.tiles._phantom_canvas import Canvas, Field, smoothstep


@dataclass(frozen=True)
class Biology:
    """How the tissue of one patient differs from the average patient (1.0 everywhere)."""

    nucleus_size: float = 1.0
    """Size of all nuclei."""
    chromatin: float = 1.0
    """Darkness of the nuclei."""
    pleomorphism: float = 1.0
    """Spread of size, shape and darkness among tumour nuclei."""
    crowding: float = 1.0
    """Packing of epithelial nuclei."""
    gland_size: float = 1.0
    """Size of crypts and tumour glands."""
    goblet: float = 0.7
    """Share of goblet cells among the cells of a normal crypt, 0 to 1."""
    inflammation: float = 1.0
    """Number of lymphocytes and plasma cells in the stroma."""
    cellularity: float = 1.0
    """Number of spindle nuclei in stroma and muscle."""
    collagen: float = 1.0
    """Density of the stroma fibres."""
    fat_size: float = 1.0
    """Size of the fat cells."""
    grade: float = 0.5
    """0: tumours form regular glands; 1: solid sheets."""


def fibres(
    c: Canvas, angle: float, wave: float, width: float, length: float, crimp: float = 0.0
) -> tuple[Field, Field]:
    """Streaks of variance near 1 along wavy lines, and the coordinate across the lines."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = c.x * cos + c.y * sin
    v = c.y * cos - c.x * sin
    v = v + wave * (9 * c.noise(70.0) + 2.5 * c.noise(28.0))
    if crimp:
        v = v + crimp * np.sin(u * 0.42 + 1.5 * c.noise(35.0))
    fine = c.streaks(u / length, v / width)
    coarse = c.streaks(u / (2.2 * length) + 7.3, v / (2.9 * width) + 3.1)
    return 0.75 * fine + 0.65 * coarse, v


def along_fibres(c: Canvas, v: Field, x: Field, y: Field) -> Field:
    """Direction of the fibres at points: across the gradient of `v`."""
    return c.slope(v, x, y) + np.float32(np.pi / 2)


def round_cells(c: Canvas, b: Biology, x: Field, y: Field, plasma: float = 0.2) -> None:
    """Lymphocytes and, in the share `plasma`, plasma cells with a bit of cytoplasm."""
    rng, k = c.rng, len(x)
    if k == 0:
        return
    is_plasma = rng.random(k) < plasma
    if is_plasma.any():
        px, py = x[is_plasma], y[is_plasma]
        turn = rng.uniform(0, 6.3, len(px)).astype(np.float32)
        c.stamp(
            px + 1.8 * np.cos(turn), py + 1.8 * np.sin(turn), 4.6, 3.4, turn,
            h=0.38, e=0.42, edge=1.0, opacity=0.8, nucleus=False,
        )  # fmt: skip
    r = (3.05 * b.nucleus_size**0.5 * rng.lognormal(0, 0.09, k)).astype(np.float32)
    c.stamp(
        x, y, r, r * rng.uniform(0.82, 1.0, k).astype(np.float32), rng.uniform(0, 3.1, k),
        h=b.chromatin * rng.uniform(1.15, 1.7, k), e=0.22, wobble=0.06, texture=0.2, rim=0.2,
    )  # fmt: skip


def spindles(c: Canvas, b: Biology, x: Field, y: Field, angle: Field, *, length: float, width: float, h: float) -> None:
    """Elongated nuclei of fibroblasts and muscle."""
    rng, k = c.rng, len(x)
    a = (length / 2 * b.nucleus_size * rng.lognormal(0, 0.25, k)).astype(np.float32)
    w = (width / 2 * b.nucleus_size**0.5 * rng.lognormal(0, 0.2, k)).astype(np.float32)
    c.stamp(
        x, y, a, np.minimum(w, a), angle + rng.normal(0, 0.12, k).astype(np.float32),
        h=h * b.chromatin * rng.uniform(0.75, 1.25, k), e=0.3, edge=0.6, wobble=0.06,
        bend=0.12, texture=0.12, rim=0.15,
    )  # fmt: skip


def red_cells(c: Canvas, x: Field, y: Field) -> None:
    """Erythrocytes: small, eosinophilic, without a nucleus."""
    k = len(x)
    r = c.rng.uniform(2.3, 3.2, k).astype(np.float32)
    c.stamp(
        x, y, r, r * c.rng.uniform(0.7, 1, k).astype(np.float32), c.rng.uniform(0, 3, k),
        h=0.02, e=c.rng.uniform(0.9, 1.25, k), edge=0.6, nucleus=False,
    )  # fmt: skip


def vessels(c: Canvas, b: Biology, x: Field, y: Field) -> None:
    """Capillaries and venules: a pale lumen with red cells, lined by flat nuclei."""
    rng = c.rng
    for vx, vy in zip(x, y, strict=True):
        ra = float(rng.uniform(5, 13))
        rb = ra * float(rng.uniform(0.35, 0.9))
        angle = float(rng.uniform(0, 3.1))
        one = np.array([vx]), np.array([vy])
        c.stamp(*one, ra + 2.0, rb + 2.0, angle, h=0.12, e=0.75, wobble=0.08, nucleus=False)
        c.stamp(*one, ra, rb, angle, h=0.01, e=0.04, wobble=0.08, nucleus=False)
        if rng.random() < 0.75:
            count = max(1, int(ra * rb / 13))
            t, q = rng.uniform(0, 6.3, count), 0.8 * np.sqrt(rng.random(count))
            u, v = q * ra * np.cos(t), q * rb * np.sin(t)
            px = vx + u * np.cos(angle) - v * np.sin(angle)
            py = vy + u * np.sin(angle) + v * np.cos(angle)
            red_cells(c, px.astype(np.float32), py.astype(np.float32))
        t = np.arange(0, 6.28, 6.5 / (ra + rb) * 2) + rng.uniform(0, 6.3)
        t = t[rng.random(len(t)) < 0.6]
        u, v = (ra + 1.2) * np.cos(t), (rb + 1.2) * np.sin(t)
        tangent = np.arctan2((rb + 1.2) * np.cos(t), -(ra + 1.2) * np.sin(t)) + angle
        px, py = vx + u * np.cos(angle) - v * np.sin(angle), vy + u * np.sin(angle) + v * np.cos(angle)
        spindles(
            c, b, px.astype(np.float32), py.astype(np.float32), tangent.astype(np.float32),
            length=8.0, width=2.4, h=1.25,
        )  # fmt: skip


def stroma(c: Canvas, b: Biology, *, dense: float, cells: float = 1.0, fine: bool = False) -> None:
    """Collagen over the whole canvas.

    dense: 0 loose and oedematous with clefts, 1 tight pink bands; fine: the short fibres of the mucosa.
    """
    rng = c.rng
    angle = float(rng.uniform(0, np.pi))
    wave = float(rng.uniform(0.9, 2.2)) * (1.5 if fine else 1.0)
    width, length = rng.uniform(1.6, 3.6), rng.uniform(18, 42)
    if fine:
        width, length = 0.45 * width + 1.0, 0.4 * length
    streak, v = fibres(c, angle, wave, width, length, crimp=rng.uniform(0.0, 1.2))
    # Bundles come and go: where the weave noise is high a second, finer felt shows instead.
    weave = smoothstep(-0.3, 1.2, c.noise(24.0))
    open_ = -streak * (1 - 0.6 * weave)
    streak = streak * (1 - 0.7 * weave) + weave * (0.45 * c.noise(2.4) + 0.5 * c.noise(7.0))
    body = (0.30 + 0.26 * dense) * b.collagen
    patch = c.noise(40.0)
    e = body * (1 + (0.24 if fine else 0.32) * streak + 0.13 * patch)
    cleft = smoothstep(0.3, 1.3, open_ - 0.5 * patch + 0.30 - 1.5 * dense)
    c.e[...] = np.clip(e, 0.08, 1.3) * (1 - 0.8 * cleft)
    c.h[...] = np.clip(0.10 + 0.03 * streak + 0.02 * c.noise(3.0), 0.02, 0.4) * (1 - 0.8 * cleft)
    x, y = c.sparse(1700 * b.cellularity * cells)
    slim = rng.uniform(1.9, 3.2)
    spindles(c, b, x, y, along_fibres(c, v, x, y), length=rng.uniform(9, 14), width=slim, h=1.15)


def lamina(c: Canvas, b: Biology, closed: NDArray[np.bool_] | None = None, level: float = 1.0) -> None:
    """Lamina propria: loose stroma with many round cells; `closed` True keeps cells out."""
    stroma(c, b, dense=float(c.rng.uniform(0.0, 0.7)), cells=0.5, fine=True)
    x, y = c.scatter(8.2, 0.45)
    keep = c.rng.random(len(x)) < 0.5 * level * b.inflammation * (1 + 0.5 * c.at(c.noise(35.0), x, y))
    if closed is not None:
        keep &= ~c.at(closed, x, y)
    round_cells(c, b, x[keep], y[keep], plasma=0.45)
    x, y = c.sparse(float(c.rng.uniform(0, 500)))
    if closed is not None:
        keep = ~c.at(closed, x, y)
        x, y = x[keep], y[keep]
    red_cells(c, x, y)


def tumour_nuclei(c: Canvas, b: Biology, x: Field, y: Field, turn: Field, slim: float, size: float = 1.0) -> None:
    rng, k = c.rng, len(x)
    spread = 0.14 * b.pleomorphism
    r = (4.1 * size * b.nucleus_size * rng.lognormal(0, spread, k)).astype(np.float32)
    aspect = np.sqrt(np.clip(slim * rng.lognormal(0, 0.12, k), 0.35, 1.0)).astype(np.float32)
    open_ = float(rng.uniform(0.15, 0.6))
    c.stamp(
        x, y, r / aspect, r * aspect, turn + rng.normal(0, 0.18 * b.pleomorphism, k).astype(np.float32),
        h=b.chromatin * rng.lognormal(0.2, 0.16 * b.pleomorphism, k) * (1.12 - 0.25 * open_), e=0.32,
        wobble=0.07 * b.pleomorphism, texture=0.2, rim=0.75 * open_, nucleolus=1.1 * open_,
    )  # fmt: skip
