"""Tissues with glands: the normal mucosa and the adenocarcinoma."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histosynth.tiles._phantom_canvas import Canvas, Capsules, Field, Nearest, smoothstep
from histosynth.tiles._phantom_tissue import Biology, lamina, round_cells, stroma, tumour_nuclei


def _crypt_layout(c: Canvas, b: Biology) -> Capsules:
    """A row or honeycomb of crypts, cut across (round) or along (long)."""
    rng = c.rng
    radius = 36.0 * b.gland_size * float(rng.uniform(0.8, 1.15))
    kind = rng.random()
    angle = float(rng.uniform(0, np.pi))
    long = 0.0 if kind < 0.5 else float(rng.uniform(12, 40)) if kind < 0.75 else 260.0
    pitch = 2 * radius + float(rng.uniform(7, 24))
    step = pitch + 2 * long
    reach = c.field * 0.75 + step
    rows = np.arange(-np.ceil(reach / pitch), np.ceil(reach / pitch) + 1)
    cols = np.arange(-np.ceil(reach / step), np.ceil(reach / step) + 1)
    gu, gv = np.meshgrid(cols * step, rows * pitch * 0.94)
    gu = gu + (np.arange(len(rows)) % 2)[:, None] * step / 2
    gu, gv = gu + rng.uniform(-0.5, 0.5) * step, gv + rng.uniform(-0.5, 0.5) * pitch
    gu, gv = gu + rng.normal(0, 0.05, gu.shape) * step, gv + rng.normal(0, 0.05, gv.shape) * pitch
    x = c.field / 2 + gu * np.cos(angle) - gv * np.sin(angle)
    y = c.field / 2 + gu * np.sin(angle) + gv * np.cos(angle)
    rad = radius * rng.uniform(0.84, 1.0, x.shape)
    half = long * rng.uniform(0.85, 1.05, x.shape) + rng.uniform(0, 7, x.shape)
    turn = angle + rng.normal(0, 0.08, x.shape)
    out = radius + half
    keep = (x > -out) & (x < c.field + out) & (y > -out) & (y < c.field + out)
    return Capsules(*(v[keep].astype(np.float32) for v in (x, y, half, rad, turn)))


def _perimeter(g: Capsules, index: NDArray[np.intp], x: Field, y: Field) -> tuple[Field, Field]:
    """Position s (microns) along the outline of the tube and distance d from its axis."""
    cos, sin = np.cos(g.angle)[index], np.sin(g.angle)[index]
    dx, dy = x - g.x[index], y - g.y[index]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    half, radius = g.half[index], g.radius[index]
    over = np.abs(u) - half
    turn = np.arctan2(np.maximum(over, 0), np.abs(v) + 1e-6) * radius
    along = np.clip(u, -half, half) + np.sign(u) * turn
    # The lower side runs on after the upper one, so that the two never share a cell.
    side = np.where(v < 0, 1.0, 0.0)
    s = along + side * (4 * half + 4 * np.pi * radius)
    return s.astype(np.float32), np.sqrt(np.maximum(over, 0) ** 2 + v * v)


def normal_mucosa(c: Canvas, b: Biology) -> None:
    rng = c.rng
    g = _crypt_layout(c, b)
    bent = 0.6 + 0.7 * float(rng.random())
    wx, wy = (
        bent * (3.5 * c.noise(45.0) + 1.0 * c.noise(16.0)),
        bent * (3.5 * c.noise(45.0) + 1.0 * c.noise(16.0)),
    )
    x, y = c.x + wx, c.y + wy
    near: Nearest = c.tubes(g, x, y)
    depth = -near.first
    inside = smoothstep(-0.6, 0.6, depth)
    c.glands |= depth > 0
    lamina(c, b, closed=depth > -3.0, level=float(rng.uniform(0.5, 1.2)))

    index = near.owner
    s, d = _perimeter(g, index, x, y)
    radius = g.radius[index]
    reactive = rng.random() < 0.12
    width = 4.9 / b.crowding
    pitch = float(rng.uniform(8.5, 11.5))
    cell = s / pitch + 0.12 * c.noise(9.0)
    number = np.floor(cell)
    frac = cell - number - 0.5
    key = (number.astype(np.int64) + index * 131) & 1023
    goblet_share = float(np.clip(b.goblet * rng.uniform(0.8, 1.3), 0.02, 0.97)) * (0.2 if reactive else 1.0)
    table = rng.random((4, 1024)).astype(np.float32)
    goblet = (table[0] < goblet_share)[key]
    lumen_r = (np.float32(rng.uniform(0.06, 0.30)) * radius * (0.8 + 0.4 * table[2][index])).astype(np.float32)
    lumen_r = lumen_r + 0.8 * c.noise(7.0)
    lumen = 1 - smoothstep(-0.7, 0.7, d - lumen_r)
    # Width of the cell at this depth: cells taper towards the lumen.
    local = pitch * np.clip(d / radius, 0.2, 1.0)
    wall = smoothstep(0.25, 0.95, (0.5 - np.abs(frac)) * local)
    # A vacuole is a cup: round towards the base, open or closed towards the lumen.
    bow = (2 * frac) ** 2
    base = 5.2 + 5.5 * table[1][key] ** 2 + 3.5 * bow
    lid = 0.8 + (4.5 * table[3][key] + 2.0 * bow) * (table[3][key] > 0.4)
    vacuole = wall * smoothstep(0, 1.6, depth - base) * smoothstep(0.0, 1.4, d - lumen_r - lid) * goblet
    grain = c.noise(1.8)
    cyto_e = 0.46 + 0.05 * grain + 0.05 * c.noise(9.0) + 0.10 * (1 - wall)
    cyto_h = float(rng.uniform(0.20, 0.38)) + 0.05 * grain + 0.06 * (1 - wall)
    blue = float(rng.uniform(0.06, 0.30))
    e = cyto_e * (1 - vacuole) + vacuole * (0.07 + 0.02 * grain)
    h = cyto_h * (1 - vacuole) + vacuole * (blue + 0.03 * grain)
    # The brush border: a thin pink line around the lumen.
    e = e + 0.25 * np.exp(-(((d - lumen_r - 0.9) / 0.9) ** 2)) * (~goblet)
    secretion = float(rng.uniform(0, 0.12))
    e = e * (1 - lumen) + lumen * 0.02
    h = h * (1 - lumen) + lumen * (0.01 + secretion * np.clip(1 + c.noise(5.0), 0, 2) * 0.6)
    c.e[...] = c.e * (1 - inside) + inside * e
    c.h[...] = c.h * (1 - inside) + inside * h
    sheath = np.exp(-(((depth + 1.1) / 1.1) ** 2))
    c.e += 0.22 * sheath

    # One basal nucleus per cell, found by walking along every outline.
    xs, ys, turns, flat = [], [], [], []
    for k in range(len(g.x)):
        half, rad = float(g.half[k]), float(g.radius[k])
        quarter = np.pi / 2 * rad
        for side in (0, 1):
            along = (np.arange(np.floor(-(half + quarter) / width), np.ceil((half + quarter) / width)) + 0.5) * width
            shift = side * (4 * half + 4 * np.pi * rad)
            ids = (np.floor((along + shift) / pitch).astype(np.int64) + k * 131) & 1023
            along = along + rng.normal(0, 0.10, len(along)) * width
            over = np.clip(np.abs(along) - half, 0, None) / rad
            is_goblet = table[0][ids] < goblet_share
            deep = np.where(is_goblet, 2.7, 4.3) + rng.normal(0, 0.6, len(along))
            if reactive:
                deep = 5.5 + rng.normal(0, 2.2, len(along))
            r = rad - deep
            u = np.sign(along) * (np.minimum(np.abs(along), half) + r * np.sin(over))
            v = r * np.cos(over) * (1 - 2 * side)
            cos, sin = np.cos(g.angle[k]), np.sin(g.angle[k])
            normal = np.arctan2(np.cos(over) * (1 - 2 * side), np.sign(along) * np.sin(over))
            xs.append(g.x[k] + u * cos - v * sin)
            ys.append(g.y[k] + u * sin + v * cos)
            turns.append(normal + g.angle[k])
            flat.append(is_goblet)
    nx, ny = np.concatenate(xs).astype(np.float32), np.concatenate(ys).astype(np.float32)
    turn, squashed = np.concatenate(turns).astype(np.float32), np.concatenate(flat)
    # Undo the warp: pixels were looked up at x + w, so nuclei move by -w.
    nx, ny = nx - c.at(wx, nx, ny), ny - c.at(wy, nx, ny)
    # A crypt hidden behind a neighbour shows no nuclei of its own there.
    keep = np.abs(c.at(depth, nx, ny) - (5.5 if reactive else 3.6)) < (8.0 if reactive else 4.0)
    nx, ny, turn, squashed = nx[keep], ny[keep], turn[keep], squashed[keep]
    k = len(nx)
    a = (4.6 if reactive else np.where(squashed, 2.0, 3.3)) * b.nucleus_size * rng.lognormal(0, 0.12, k)
    w = (2.4 if reactive else np.where(squashed, 2.8, 2.35)) * b.nucleus_size * rng.lognormal(0, 0.12, k)
    c.stamp(
        nx, ny, a.astype(np.float32), w.astype(np.float32), turn,
        h=b.chromatin * rng.uniform(1.1, 1.6, k) * np.where(squashed, 1.1, 1.0), e=0.3, wobble=0.06,
        texture=0.14, rim=0.2,
    )  # fmt: skip


def tumour(c: Canvas, b: Biology) -> None:
    rng = c.rng
    lean = np.clip(b.grade + rng.normal(0, 0.22), 0, 1)
    kind = "regular" if lean < 0.22 else "glandular" if lean < 0.55 else "cribriform" if lean < 0.75 else "solid"
    size = b.gland_size
    if kind == "solid":
        pitch, lumen, thick, gap, warp = 95.0 * size, 1.2, 300.0, 0.0, 1.2
    elif kind == "cribriform":
        pitch, lumen, thick, gap, warp = 46.0 * size, 4.6, 36.0, 0.0, 1.1
    elif kind == "glandular":
        pitch, lumen, thick, gap, warp = 78.0 * size, 9.0, 42.0 * size, 5.0, 1.5
    else:
        pitch, lumen, thick, gap, warp = 72.0 * size, 9.0, 27.0 * size, 8.0, 0.7
    px, py = c.scatter(pitch, 0.34, margin=pitch)
    k = len(px)
    radius = lumen * rng.lognormal(0, 0.5, k)
    half = rng.uniform(0, {"glandular": 42, "regular": 10, "cribriform": 6, "solid": 1}[kind], k)
    # A long lumen is a slit.
    radius = radius * np.exp(-half / 24)
    tilt = rng.uniform(0, np.pi) + rng.normal(0, 0.6, k)
    g = Capsules(px, py, *(v.astype(np.float32) for v in (half, radius, tilt)))
    x = c.x + warp * (6 * c.noise(42.0) + 1.5 * c.noise(17.0))
    y = c.y + warp * (6 * c.noise(42.0) + 1.5 * c.noise(17.0))
    near = c.tubes(g, x, y)
    fold = {"glandular": 2.2, "regular": 1.0, "cribriform": 1.2, "solid": 0.6}[kind]
    d = near.first + fold * (0.8 * c.noise(13.0) + 0.45 * c.noise(6.0))
    base = np.minimum(
        thick - near.first,
        (near.second - near.first - gap * (1 + 0.7 * c.noise(40.0))) / 2 if gap else np.float32(1e3),
    )
    if kind in ("solid", "cribriform"):  # nests parted by thin septa of stroma
        septum = np.abs(c.noise(float(rng.uniform(55, 90))) + 0.12 * c.noise(14.0))
        base = np.minimum(base, (septum - float(rng.uniform(0.02, 0.14))) * 45)
    base = base.astype(np.float32)
    epithelium = smoothstep(-0.6, 0.6, base)
    c.glands |= base > 0
    stroma(c, b, dense=float(rng.uniform(0.1, 0.9)), cells=1.6)
    sx, sy = c.sparse(1300 * b.inflammation * float(rng.uniform(0.2, 1.3)))
    keep = c.at(base, sx, sy) < -3
    round_cells(c, b, sx[keep], sy[keep], plasma=0.3)

    tone = float(rng.uniform(0.8, 1.2))
    grain = c.noise(2.0)
    e = tone * (0.44 + 0.06 * grain + 0.05 * c.noise(12.0))
    h = np.clip(float(rng.uniform(0.26, 0.52)) + 0.06 * grain + 0.06 * c.noise(15.0), 0.05, 1)
    lumen_mask = 1 - smoothstep(-0.7, 0.7, d)
    e = e + 0.16 * np.exp(-(((d - 1.2) / 1.2) ** 2))
    dirty = smoothstep(0.3, 1.4, c.noise(12.0) + float(rng.uniform(-1.4, 0.5)))
    e = e * (1 - lumen_mask) + lumen_mask * (0.02 + dirty * (0.45 + 0.15 * grain))
    h = h * (1 - lumen_mask) + lumen_mask * (0.01 + dirty * 0.12)
    # Shrinkage parts the glands from the stroma here and there.
    torn = np.exp(-(((base + 1.8) / 1.4) ** 2)) * smoothstep(0.2, 1.2, c.noise(30.0) + float(rng.uniform(-0.8, 0.8)))
    c.e[...] = c.e * (1 - epithelium) * (1 - 0.8 * torn) + epithelium * e
    c.h[...] = c.h * (1 - epithelium) * (1 - 0.8 * torn) + epithelium * h

    # Columnar nuclei stand on the basement membrane and leave the cytoplasm under the lumen free.
    long, short, slim, tall = {
        "regular": (9.4, 4.4, 0.44, 13.0),
        "glandular": (8.6, 4.4, 0.45, 24.0),
        "cribriform": (8.4, 5.7, 0.62, 1e3),
        "solid": (8.3, 6.7, 0.76, 1e3),
    }[kind]
    scale = b.nucleus_size / b.crowding * float(rng.uniform(0.95, 1.15))
    nx, ny = c.scatter(3.6 * scale, 0.48)
    at_base, at_lumen = c.at(base, nx, ny), c.at(d, nx, ny)
    apical = float(rng.uniform(4.5, 10.0)) if kind in ("glandular", "regular") else 4.5
    keep = (at_base > 3.2) & (at_lumen > apical) & (at_base < tall)
    nx, ny = nx[keep], ny[keep]
    turn = c.slope(near.first, nx, ny)
    turn = (turn + rng.normal(0, 0.8 if kind == "solid" else 0.1, len(turn))).astype(np.float32)
    room = np.exp(0.13 * b.pleomorphism * c.at(c.noise(9.0), nx, ny))
    keep = c.pack(nx, ny, turn, long * scale, short * scale, room)
    tumour_nuclei(c, b, nx[keep], ny[keep], turn[keep], slim, size=0.92)
    if kind == "solid" or rng.random() < 0.3:  # apoptotic bodies and mitoses
        ax, ay = c.sparse(180)
        keep = (c.at(base, ax, ay) > 4) & (c.at(d, ax, ay) > 3)
        ax, ay = ax[keep], ay[keep]
        c.stamp(ax, ay, 4.6, 4.2, 0.0, h=0.2, e=0.5, edge=0.8, nucleus=False)
        c.stamp(ax, ay, 2.6, 1.5, rng.uniform(0, 3, len(ax)), h=1.9 * b.chromatin, e=0.2, wobble=0.2, edge=0.5)
