"""Layouts of the nine tissue classes, drawn on a `Canvas` in units of stain density."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from histosynth.tiles._phantom_canvas import Canvas, smoothstep
from histosynth.tiles._phantom_glands import normal_mucosa, tumour
from histosynth.tiles._phantom_tissue import (
    Biology,
    along_fibres,
    fibres,
    round_cells,
    spindles,
    stroma,
    tumour_nuclei,
    vessels,
)


def _adipose(c: Canvas, b: Biology) -> None:
    rng = c.rng
    spacing = float(rng.uniform(38, 62)) * b.fat_size
    px, py = c.scatter(spacing, 0.3, margin=spacing)
    x, y = c.x + 3.5 * c.noise(40.0), c.y + 3.5 * c.noise(40.0)
    d1, d2, d3 = c.cells(px, py, x, y)
    wall = float(rng.uniform(0.45, 1.25)) * (1 + 0.25 * c.noise(25.0))
    # A wall is thick where three cells meet: the corners of fat cells are round.
    gap = (d2 - d1) - np.float32(0.26 * spacing) * np.exp(-(d3 - d1) / np.float32(0.07 * spacing))
    membrane = 1 - smoothstep(-0.4, 0.9, gap / 2 - wall)
    torn = smoothstep(1.2, 2.0, c.noise(30.0))
    membrane = membrane * (1 - 0.9 * torn)
    fibre = 0.55 + 0.10 * c.noise(2.5) + 0.1 * c.noise(14.0)
    c.e[...] = np.clip(membrane * fibre * 1.05, 0, 2) + 0.012
    c.h[...] = membrane * 0.13 + 0.008
    if rng.random() < 0.3:  # a septum of connective tissue crosses the field
        angle = float(rng.uniform(0, np.pi))
        streak, v = fibres(c, angle, 1.2, 2.5, 30, crimp=0.8)
        v = v - float(np.median(v)) - float(rng.uniform(-0.5, 0.5)) * c.field
        band = 1 - smoothstep(0, 3, np.abs(v) - float(rng.uniform(3, 11)))
        c.e[...] = c.e * (1 - band) + band * np.clip(0.5 + 0.2 * streak, 0.05, 1)
        c.h[...] = c.h * (1 - band) + band * 0.1
        sx, sy = c.sparse(1800 * b.cellularity)
        keep = c.at(band, sx, sy) > 0.5
        spindles(c, b, sx[keep], sy[keep], along_fibres(c, v, sx[keep], sy[keep]), length=11, width=2.5, h=1.2)
    x, y = c.sparse(2600)
    keep = (c.at(gap, x, y) < 2.4) & (c.at(membrane, x, y) > 0.4)
    keep &= rng.random(len(x)) < 0.5
    along = c.slope(gap, x[keep], y[keep]) + np.float32(np.pi / 2)
    spindles(c, b, x[keep], y[keep], along, length=8, width=2.6, h=1.2)
    if rng.random() < 0.25:
        vessels(c, b, *(v[:1] for v in c.sparse(150)))


def _background(c: Canvas, b: Biology) -> None:
    rng = c.rng
    tilt = float(rng.uniform(0, 6.3))
    ramp = (c.x * np.cos(tilt) + c.y * np.sin(tilt)) / c.field
    c.e[...] = np.clip(0.015 + 0.012 * ramp + 0.006 * c.noise(60.0), 0, 1)
    c.h[...] = np.clip(0.012 + 0.006 * c.noise(45.0), 0, 1)
    kind = rng.random()
    x, y = c.sparse(float(rng.choice([0, 150, 700, 1500])))
    r = rng.lognormal(-0.1, 0.5, len(x)).astype(np.float32)
    c.stamp(
        x, y, r, r * rng.uniform(0.5, 1, len(x)).astype(np.float32), rng.uniform(0, 3, len(x)),
        h=rng.uniform(0.05, 0.5, len(x)), e=rng.uniform(0.05, 0.4, len(x)), edge=float(rng.uniform(0.6, 1.5)),
        wobble=0.15, nucleus=False,
    )  # fmt: skip
    if kind < 0.35:  # specks far out of focus
        x, y = c.sparse(250)
        c.stamp(x, y, 6.0, 5.0, 0.0, h=0.05, e=0.06, edge=5.0, opacity=0.8, wobble=0.2, nucleus=False)
    elif kind < 0.6:  # the frayed border of the tissue in one corner
        edge = (c.x - c.field / 2) * np.cos(tilt) + (c.y - c.field / 2) * np.sin(tilt)
        edge = edge + 5 * c.noise(30.0) + 2 * c.noise(9.0) - c.field * float(rng.uniform(0.42, 0.6))
        tissue = smoothstep(-1.5, 1.5, edge)
        c.e += tissue * np.clip(0.28 + 0.10 * c.noise(5.0), 0, 1)
        c.h += tissue * np.clip(0.12 + 0.06 * c.noise(3.0), 0, 1)
    elif kind < 0.72:  # a shred of mucus or fibre
        streak, v = fibres(c, tilt, 2.0, 2.0, 40)
        thread = np.exp(-(((v - np.median(v)) / np.float32(rng.uniform(0.8, 4))) ** 2))
        c.h += 0.10 * thread * (1 + 0.4 * streak).clip(0)
        c.e += 0.06 * thread


def _debris(c: Canvas, b: Biology) -> None:
    rng = c.rng
    dirty = float(rng.uniform(0.3, 1.0))
    patch = c.noise(26.0)
    grain = 0.55 * c.noise(1.4) + 0.6 * c.noise(3.2) + 0.45 * c.noise(8.0)
    holes = smoothstep(float(rng.uniform(0.8, 1.6)), 2.1, 0.7 * c.noise(11.0) + 0.5 * c.noise(4.0) - 0.4 * patch)
    c.e[...] = np.clip(0.50 + 0.19 * grain + 0.10 * patch, 0.04, 1.4) * (1 - 0.8 * holes)
    c.h[...] = np.clip(0.13 + 0.12 * dirty + 0.13 * dirty * c.noise(2.0) + 0.09 * patch, 0.03, 1) * (1 - 0.8 * holes)
    # Ghosts: cells that kept an outline but lost the nucleus.
    x, y = c.sparse(2200 * (1.3 - dirty))
    r = rng.uniform(4.0, 6.5, len(x)).astype(np.float32)
    turn = rng.uniform(0, 3, len(x)).astype(np.float32)
    c.stamp(x, y, r, r * 0.8, turn, h=0.16, e=0.78, edge=1.0, opacity=0.55, wobble=0.12, nucleus=False)
    c.stamp(x, y, r * 0.72, r * 0.55, turn, h=0.14, e=0.45, edge=1.2, opacity=0.6, wobble=0.12, nucleus=False)
    # Pyknotic nuclei, smudged and shrunken.
    x, y = c.scatter(9.5, 0.48)
    keep = rng.random(len(x)) < (0.10 + 0.35 * dirty) * (1 + 0.5 * c.at(patch, x, y))
    x, y, k = x[keep], y[keep], int(keep.sum())
    r = (2.2 * b.nucleus_size * rng.lognormal(0, 0.25, k)).astype(np.float32)
    c.stamp(
        x, y, r, r * rng.uniform(0.5, 0.95, k).astype(np.float32), rng.uniform(0, 3, k),
        h=b.chromatin * rng.uniform(0.45, 1.45, k), e=0.4, edge=1.1, opacity=0.9, wobble=0.16, texture=0.15,
    )  # fmt: skip
    # Karyorrhexis: each dead nucleus breaks into a cluster of dust.
    x, y = c.sparse(1500 * dirty)
    x, y = np.repeat(x, 7), np.repeat(y, 7)
    x = (x + rng.normal(0, 3.2, len(x))).astype(np.float32)
    y = (y + rng.normal(0, 3.2, len(y))).astype(np.float32)
    keep = rng.random(len(x)) < 0.75
    x, y = x[keep], y[keep]
    r = rng.uniform(0.5, 1.3, len(x)).astype(np.float32)
    c.stamp(
        x, y, r, r * 0.8, rng.uniform(0, 3, len(x)), h=b.chromatin * rng.uniform(0.7, 1.7, len(x)), e=0.3,
        edge=0.5, wobble=0.1,
    )  # fmt: skip


def _lymphocytes(c: Canvas, b: Biology) -> None:
    rng = c.rng
    stroma(c, b, dense=float(rng.uniform(0.3, 0.9)), cells=0.3, fine=True)
    c.e *= 0.8
    spacing = float(rng.uniform(6.0, 7.4))
    x, y = c.scatter(spacing, 0.34)
    thin = 1.35 - float(rng.uniform(0.05, 0.5)) + 0.35 * c.at(c.noise(22.0), x, y)
    keep = rng.random(len(x)) < thin
    x, y = x[keep], y[keep]
    c.stamp(x, y, 4.1, 3.9, 0.0, h=0.24, e=0.26, edge=1.0, opacity=0.75, wobble=0.08, nucleus=False)
    if rng.random() < 0.35:  # a germinal centre with larger, paler nuclei
        gx, gy = rng.uniform(0, c.field, 2)
        radius = rng.uniform(22, 45)
        inner = np.hypot(x - gx, y - gy) + 4 * c.at(c.noise(20.0), x, y) < radius
        ix, iy = x[inner], y[inner]
        few = rng.random(len(ix)) < 0.72
        ix, iy = ix[few], iy[few]
        k = len(ix)
        r = (3.9 * b.nucleus_size**0.5 * rng.lognormal(0, 0.15, k)).astype(np.float32)
        c.stamp(
            ix, iy, r, r * rng.uniform(0.7, 1, k).astype(np.float32), rng.uniform(0, 3, k),
            h=b.chromatin * rng.uniform(0.6, 0.95, k), e=0.2, wobble=0.08, rim=0.45, texture=0.2,
            nucleolus=0.7,
        )  # fmt: skip
        x, y = x[~inner], y[~inner]
    round_cells(c, b, x, y, plasma=float(rng.uniform(0.0, 0.15)))
    if rng.random() < 0.35:
        vessels(c, b, *c.sparse(160))


def _mucin(c: Canvas, b: Biology) -> None:
    rng = c.rng
    angle = float(rng.uniform(0, np.pi))
    streak, _ = fibres(c, angle, 2.6, rng.uniform(2.2, 5.0), rng.uniform(18, 50))
    patch = c.noise(45.0)
    felt = 0.55 * c.noise(2.0) + 0.5 * c.noise(5.0)
    mix = smoothstep(-1.0, 1.0, c.noise(38.0)) * float(rng.uniform(0.4, 1.0))
    streak = streak * (1 - 0.8 * mix) + mix * felt
    strand = np.abs(c.noise(16.0) + 0.35 * c.noise(6.0))
    wisp = np.exp(-strand * 7)
    tone = float(rng.uniform(0.09, 0.22))
    pale = smoothstep(-0.2, 1.6, patch)
    c.h[...] = np.clip(tone * (1 + 0.38 * streak + 0.4 * wisp) * (1 - 0.6 * pale) + 0.03 * c.noise(1.6), 0.01, 0.6)
    c.e[...] = np.clip(tone * rng.uniform(0.3, 1.0) * (1 + 0.4 * streak + 0.5 * wisp) * (1 - 0.6 * pale), 0.01, 0.6)
    kind = rng.random()
    if kind < 0.45:  # a septum or the wall of the pool
        tilt = float(rng.uniform(0, 6.3))
        edge = (c.x - c.field / 2) * np.cos(tilt) + (c.y - c.field / 2) * np.sin(tilt)
        edge = edge + 7 * c.noise(40.0) - c.field * float(rng.uniform(0.22, 0.5))
        band = 1 - smoothstep(0, 2, np.abs(edge) - float(rng.uniform(2, 9)))
        if rng.random() < 0.5:
            band = smoothstep(-1, 2, edge)
        fibre = 0.45 + 0.15 * c.streaks((c.x * np.sin(tilt) - c.y * np.cos(tilt)) / 25, edge / 2.6)
        c.e[...] = c.e * (1 - band) + band * fibre.clip(0.05)
        c.h[...] = c.h * (1 - band) + band * 0.11
        x, y = c.sparse(1500 * b.cellularity)
        keep = c.at(band, x, y) > 0.5
        spindles(c, b, x[keep], y[keep], along_fibres(c, edge, x[keep], y[keep]), length=11, width=2.6, h=1.2)
    x, y = c.sparse(float(rng.choice([30, 150, 450])) * b.inflammation)
    round_cells(c, b, x, y, plasma=0.2)
    if kind > 0.7:  # a floating raft of tumour cells
        gx, gy = rng.uniform(0.15, 0.85, 2) * c.field
        long, turn = rng.uniform(9, 24), rng.uniform(0, 3.1)
        c.stamp(
            np.array([gx]), np.array([gy]), long, long * 0.55, turn, h=0.3, e=0.4, edge=1.5, wobble=0.12,
            nucleus=False,
        )  # fmt: skip
        x, y = c.scatter(6.5)
        u = (x - gx) * np.cos(turn) + (y - gy) * np.sin(turn)
        w = (y - gy) * np.cos(turn) - (x - gx) * np.sin(turn)
        keep = (u / long) ** 2 + (w / long / 0.55) ** 2 < 0.75
        tumour_nuclei(c, b, x[keep], y[keep], rng.uniform(0, 3, keep.sum()), slim=0.8)


def _muscle(c: Canvas, b: Biology) -> None:
    rng = c.rng
    angle = float(rng.uniform(0, np.pi))
    crimp = float(rng.uniform(0.0, 0.9)) if rng.random() < 0.4 else 0.0
    streak, v = fibres(c, angle, float(rng.uniform(0.15, 0.9)), rng.uniform(2.6, 4.6), rng.uniform(60, 120), crimp)
    across = rng.random() < 0.16
    tone = float(rng.uniform(0.58, 0.86))
    # Bundles cut across are a mosaic of small polygons, stamped below onto a pale ground.
    body = tone * (0.62 + 0.05 * c.noise(6.0) if across else 1 + 0.20 * streak)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    long = c.streaks((c.x * cos + c.y * sin) / 110, v / float(rng.uniform(3, 6)))
    cleft = smoothstep(1.0, 1.7, long) * float(rng.uniform(0.0, 0.85)) * (0.0 if across else 1.0)
    c.e[...] = np.clip(body + 0.05 * c.noise(2.0) + 0.06 * c.noise(45.0), 0.1, 1.4) * (1 - cleft)
    c.h[...] = np.clip(0.12 + 0.03 * streak + 0.02 * c.noise(3.0), 0.03, 0.5) * (1 - 0.8 * cleft)
    x, y = c.sparse(1300 * b.cellularity * float(rng.uniform(0.6, 1.4)))
    if across:
        spacing = float(rng.uniform(5.0, 7.5))
        fx, fy = c.scatter(spacing, 0.3)
        r = (0.56 * spacing * rng.lognormal(0, 0.12, len(fx))).astype(np.float32)
        c.stamp(
            fx, fy, r, r * 0.9, rng.uniform(0, 3, len(fx)), h=0.12, e=tone * rng.lognormal(0, 0.10, len(fx)),
            edge=1.3, opacity=0.8, wobble=0.08, nucleus=False,
        )  # fmt: skip
        r = (2.3 * b.nucleus_size * rng.lognormal(0, 0.2, len(x))).astype(np.float32)
        c.stamp(
            x, y, r, r * 0.85, rng.uniform(0, 3, len(x)), h=b.chromatin * rng.uniform(0.8, 1.2, len(x)),
            e=0.35, wobble=0.06, texture=0.12, rim=0.15,
        )  # fmt: skip
    else:
        spindles(c, b, x, y, along_fibres(c, v, x, y), length=rng.uniform(13, 19), width=3.0, h=1.0)
    if rng.random() < 0.15:
        vessels(c, b, *(p[:2] for p in c.sparse(120)))


def _stroma_tile(c: Canvas, b: Biology) -> None:
    rng = c.rng
    dense = float(rng.beta(1.8, 1.2))
    stroma(c, b, dense=dense, cells=float(rng.uniform(0.5, 1.9)))
    if rng.random() < 0.55:
        x, y = c.sparse(float(rng.uniform(100, 900)) * b.inflammation)
        keep = rng.random(len(x)) < 0.5 + 0.5 * c.at(c.noise(25.0), x, y)
        round_cells(c, b, x[keep], y[keep], plasma=0.3)
    if rng.random() < 0.4:
        vessels(c, b, *(v[:4] for v in c.sparse(130, margin=0)))


LAYOUTS: dict[str, Callable[[Canvas, Biology], None]] = {
    "ADI": _adipose,
    "BACK": _background,
    "DEB": _debris,
    "LYM": _lymphocytes,
    "MUC": _mucin,
    "MUS": _muscle,
    "NORM": normal_mucosa,
    "STR": _stroma_tile,
    "TUM": tumour,
}
