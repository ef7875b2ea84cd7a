"""The drawing board of the tissue simulator: noise, gland geometry and nuclei, all measured in microns.

Every quantity is drawn in microns first and put on the pixel grid afterwards, so that one seed shows the
same tissue at every tile size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Field = NDArray[np.floating]

_TABLE = 64


@lru_cache(maxsize=256)
def _spline_taps(n: int, mpp: float, scale: float) -> tuple[NDArray[np.intp], Field]:
    """First lattice index [n] and the four cubic B-spline weights [4, n] of every pixel centre."""
    position = (np.arange(n) + 0.5) * mpp / scale
    first = np.floor(position).astype(np.intp)
    t = position - first
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    return first, weights.astype(np.float32)


class Capsules(NamedTuple):
    """Round or elongated tubes: centre, half length of the axis, radius (all [K], microns) and angle."""

    x: Field
    y: Field
    half: Field
    radius: Field
    angle: Field


class Nearest(NamedTuple):
    """Per pixel [n, n]: distance to the nearest and second tube wall (negative inside), and which tube."""

    first: Field
    second: Field
    owner: NDArray[np.intp]


def smoothstep(low: float, high: float, value: Field) -> Field:
    """0 below `low`, 1 above `high`, a smooth ramp between."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return (t * t * (3 - 2 * t)).astype(np.float32, copy=False)


class Canvas:
    """Haematoxylin `h` and eosin `e` densities, nucleus ids and the gland mask of one field of view.

    n: pixels along a side; field_um: side in microns; rng: the only source of chance.
    """

    def __init__(self, n: int, field_um: float, rng: np.random.Generator) -> None:
        self.n = n
        self.field = float(field_um)
        self.mpp = self.field / n
        self.rng = rng
        axis = ((np.arange(n) + 0.5) * self.mpp).astype(np.float32)
        self.x = np.broadcast_to(axis[None, :], (n, n))
        self.y = np.broadcast_to(axis[:, None], (n, n))
        self.h: Field = np.zeros((n, n), np.float32)
        self.e: Field = np.zeros((n, n), np.float32)
        self.nuclei = np.zeros((n, n), np.int32)
        self.glands = np.zeros((n, n), bool)
        self._next_id = 1
        self._chromatin: Field | None = None

    # ---- noise -------------------------------------------------------------------------------------

    def noise(self, scale: float) -> Field:
        """Smooth noise [n, n] of mean 0 and variance near 1 with features of `scale` microns."""
        # The lattice depends on the field alone, so that every tile size draws the same numbers.
        count = int(np.ceil(self.field / scale)) + 4
        lattice = self.rng.standard_normal((count, count), dtype=np.float32)
        first, weights = _spline_taps(self.n, self.mpp, scale)
        rows = weights[0][:, None] * lattice[first]
        for k in (1, 2, 3):
            rows += weights[k][:, None] * lattice[first + k]
        rows = np.ascontiguousarray(rows.T)
        out = weights[0][:, None] * rows[first]
        for k in (1, 2, 3):
            out += weights[k][:, None] * rows[first + k]
        # 0.479 is the mean sum of squared cubic B-spline weights: the variance that one axis keeps.
        return np.ascontiguousarray(out.T) / np.float32(0.479)

    def streaks(self, u: Field, v: Field) -> Field:
        """Value noise of mean 0 and variance near 1 at any coordinates, one lattice cell per unit."""
        table = self.rng.standard_normal(_TABLE * _TABLE, dtype=np.float32)
        u0, v0 = np.floor(u), np.floor(v)
        s, t = u - u0, v - v0
        s = s * s * (3 - 2 * s)
        t = t * t * (3 - 2 * t)
        i0 = (u0.astype(np.int32) & (_TABLE - 1)) * _TABLE
        j0 = v0.astype(np.int32) & (_TABLE - 1)
        i1 = (i0 + _TABLE) & (_TABLE * _TABLE - 1)
        j1 = (j0 + 1) & (_TABLE - 1)
        low = table[i0 + j0] * (1 - t) + table[i0 + j1] * t
        high = table[i1 + j0] * (1 - t) + table[i1 + j1] * t
        return (low * (1 - s) + high * s) / np.float32(0.74)

    def chromatin(self) -> Field:
        """The fine texture that all nuclei of the tile share, drawn once."""
        if self._chromatin is None:
            self._chromatin = 0.7 * self.noise(1.1) + 0.7 * self.noise(2.2)
        return self._chromatin

    # ---- points ------------------------------------------------------------------------------------

    def scatter(self, spacing: float, jitter: float = 0.38, margin: float = 10.0) -> tuple[Field, Field]:
        """Points (x, y) of a jittered hexagonal lattice that covers the field and `margin` around it."""
        row = spacing * 0.866
        low, high = -margin, self.field + margin
        offset = self.rng.uniform(0, spacing, 2)
        ys = np.arange(low - offset[1], high + row, row)
        xs = np.arange(low - offset[0], high + spacing, spacing)
        gx, gy = np.meshgrid(xs, ys)
        gx = gx + (np.arange(len(ys)) % 2)[:, None] * spacing / 2
        shift = self.rng.uniform(-jitter, jitter, (2, *gx.shape)) * spacing
        return (gx + shift[0]).ravel().astype(np.float32), (gy + shift[1]).ravel().astype(np.float32)

    def sparse(self, per_mm2: float, margin: float = 8.0) -> tuple[Field, Field]:
        """Points (x, y) scattered without order, `per_mm2` to the square millimetre."""
        side = self.field + 2 * margin
        count = self.rng.poisson(max(per_mm2, 0.0) * (side / 1000) ** 2)
        xy = self.rng.uniform(-margin, self.field + margin, (2, count)).astype(np.float32)
        return xy[0], xy[1]

    def pack(self, x: Field, y: Field, angle: Field, long: float, short: float, room: Field) -> NDArray[np.bool_]:
        """Which of many candidate points to keep so that no two lie in one ellipse of full axes long, short.

        The ellipse stands at `angle` and its area is scaled by `room` [K], near 1, so that elongated nuclei
        pack side by side with little overlap. Thinning goes in rounds (Luby 1986, SIAM J Comput 15:1036):
        local champions stay, their neighbours go.
        """
        k = len(x)
        kept = np.zeros(k, bool)
        if k == 0:
            return kept
        pairs = cKDTree(np.stack([x, y], axis=1)).query_pairs(1.3 * long, output_type="ndarray")
        i, j = pairs[:, 0], pairs[:, 1]
        dx, dy = x[j] - x[i], y[j] - y[i]
        cos, sin = np.cos(angle[i]), np.sin(angle[i])
        close = ((dx * cos + dy * sin) / long) ** 2 + ((dy * cos - dx * sin) / short) ** 2 < room[i] * room[j]
        i, j = i[close], j[close]
        rank = self.rng.permutation(k)
        open_ = np.ones(k, bool)
        for _ in range(6):
            rival = np.full(k, -1)
            np.maximum.at(rival, i, rank[j])
            np.maximum.at(rival, j, rank[i])
            champion = open_ & (rank > rival)
            kept |= champion
            open_ &= ~champion
            open_[j[champion[i]]] = False
            open_[i[champion[j]]] = False
            live = open_[i] & open_[j]
            i, j = i[live], j[live]
            if not open_.any():
                break
        return kept

    def at(self, values: NDArray, x: Field, y: Field) -> NDArray:
        """`values` [n, n] read at points in microns; points outside read the border."""
        i = np.clip((y / self.mpp).astype(np.intp), 0, self.n - 1)
        j = np.clip((x / self.mpp).astype(np.intp), 0, self.n - 1)
        return values[i, j]

    def slope(self, values: Field, x: Field, y: Field) -> Field:
        """Angle of the steepest rise of `values` at points in microns."""
        step = max(2.0, 1.5 * self.mpp)
        dx = self.at(values, x + step, y) - self.at(values, x - step, y)
        dy = self.at(values, x, y + step) - self.at(values, x, y - step)
        return np.arctan2(dy, dx)

    # ---- distances ---------------------------------------------------------------------------------

    def tubes(self, c: Capsules, x: Field, y: Field) -> Nearest:
        """Distances of the (warped) coordinates to the two nearest tubes."""
        first = np.full((self.n, self.n), 1e6, np.float32)
        second = first.copy()
        index = np.zeros((self.n, self.n), np.intp)
        for k in range(len(c.x)):
            cos, sin = np.cos(c.angle[k]), np.sin(c.angle[k])
            dx, dy = x - c.x[k], y - c.y[k]
            u = np.abs(dx * cos + dy * sin) - c.half[k]
            v = dy * cos - dx * sin
            np.maximum(u, 0, out=u)
            d = np.sqrt(u * u + v * v) - c.radius[k]
            nearer = d < first
            np.minimum(second, np.maximum(d, first), out=second)
            np.minimum(first, d, out=first)
            index[nearer] = k
        return Nearest(first, second, index)

    def cells(self, px: Field, py: Field, x: Field, y: Field) -> tuple[Field, Field, Field]:
        """The three smallest distances of the coordinates to the points: Voronoi cells and their walls."""
        best = [np.full((self.n, self.n), 1e6, np.float32) for _ in range(3)]
        for k in range(len(px)):
            d = np.sqrt((x - px[k]) ** 2 + (y - py[k]) ** 2)
            for i in range(3):
                low = np.minimum(best[i], d)
                d = np.maximum(best[i], d)
                best[i] = low
        return best[0], best[1], best[2]

    # ---- stamps ------------------------------------------------------------------------------------

    def stamp(
        self,
        x: Field,
        y: Field,
        a: Field | float,
        b: Field | float,
        angle: Field | float,
        *,
        h: Field | float,
        e: Field | float,
        edge: float = 0.7,
        opacity: float = 1.0,
        wobble: float = 0.0,
        bend: float = 0.0,
        rim: float = 0.0,
        texture: float = 0.0,
        nucleolus: float = 0.0,
        nucleus: bool = True,
    ) -> None:
        """Draw many deformed ellipses of half axes a, b (microns) that replace what lies under them.

        h, e: densities inside; rim: extra density of the membrane against the middle (0 none, 1 hollow);
        texture: contrast of the chromatin; nucleolus: darkness of one or two dots. Where two touch, the
        pixel belongs to the one it lies deeper in. `nucleus` False leaves the id map alone.
        """
        k = len(x)
        if k == 0:
            return
        rng = self.rng
        a, b, angle, h, e = (np.broadcast_to(np.asarray(v, np.float32), k) for v in (a, b, angle, h, e))
        shape = rng.normal(0, 1, (4, k)).astype(np.float32)
        dots = rng.uniform(-0.5, 0.5, (5, k)).astype(np.float32)
        reach = np.maximum(a, b)
        keep = (x > -reach) & (x < self.field + reach) & (y > -reach) & (y < self.field + reach)
        if not keep.any():
            return
        x, y, a, b, angle, h, e = (v[keep] for v in (x, y, a, b, angle, h, e))
        shape, dots, reach = shape[:, keep], dots[:, keep], reach[keep]
        ids = self._next_id + np.arange(len(x), dtype=np.int32)
        half = int(np.ceil((float(reach.max()) * (1 + 1.5 * wobble) + edge) / self.mpp))
        # Chunks bound the memory of very large tiles.
        chunk = max(1, 4_000_000 // (2 * half + 1) ** 2)
        offsets = np.arange(-half, half + 1)
        best = np.zeros(self.n * self.n, np.float32)
        parts = []
        for start in range(0, len(x), chunk):
            s = slice(start, start + chunk)
            ix, iy = np.floor(x[s] / self.mpp).astype(np.intp), np.floor(y[s] / self.mpp).astype(np.intp)
            cols, rows = ix[:, None] + offsets, iy[:, None] + offsets
            dx = ((cols + 0.5) * self.mpp - x[s, None]).astype(np.float32)[:, None, :]
            dy = ((rows + 0.5) * self.mpp - y[s, None]).astype(np.float32)[:, :, None]
            cos, sin = np.cos(angle[s])[:, None, None], np.sin(angle[s])[:, None, None]
            u = dx * cos + dy * sin
            v = dy * cos - dx * sin
            aa, bb = a[s, None, None], b[s, None, None]
            if bend:
                v += (bend * shape[3, s] / a[s])[:, None, None] * u * u
            un, vn = u / aa, v / bb
            q = np.sqrt(un * un + vn * vn) + 1e-6
            if wobble:
                c1, s1 = un / q, vn / q
                w = wobble * shape[:, s, None, None]
                q *= 1 + w[0] * c1 * s1 * 2 + w[1] * 0.7 * c1 * (4 * c1 * c1 - 3) + w[2] * 0.7 * s1 * c1 * c1
            soft = max(edge, self.mpp) / np.minimum(a[s], b[s])[:, None, None]
            mask = np.clip((1 - q) / soft + 0.5, 0, 1)
            inside = (rows >= 0)[:, :, None] & (rows < self.n)[:, :, None]
            inside = inside & (cols >= 0)[:, None, :] & (cols < self.n)[:, None, :] & (mask > 0)
            who, pi, pj = np.nonzero(inside)
            pixel = rows[who, pi] * self.n + cols[who, pj]
            # Depth, not the clipped mask, decides between neighbours.
            depth = (2 - q)[inside]
            np.maximum.at(best, pixel, depth)
            parts.append((who + start, pixel, depth, mask[inside], q[inside], un[inside], vn[inside]))
        who, pixel, depth, mask, q, un, vn = (np.concatenate(p) for p in zip(*parts, strict=True))
        win = depth >= best[pixel]
        who, pixel, mask, q, un, vn = (p[win] for p in (who, pixel, mask, q, un, vn))
        dark = np.ones(len(who), np.float32)
        if rim:
            q2 = np.clip(q, 0, 1) ** 4
            dark += rim * (1.2 * q2 - 0.55)
        if texture:
            dark += texture * self.chromatin().ravel()[pixel]
        if nucleolus:
            for i in (0, 1):
                # The second dot is missing in about half of the nuclei.
                present = nucleolus * (1.0 if i == 0 else 1.0 * (dots[4] > 0))
                du, dv = un - dots[2 * i][who], vn - dots[2 * i + 1][who]
                dark += np.broadcast_to(present, len(x))[who] * np.exp(-(du * du + dv * dv) * 18)
        np.clip(dark, 0.15, 2.2, out=dark)
        mask = mask * np.float32(opacity)
        flat_h, flat_e = self.h.ravel(), self.e.ravel()
        flat_h[pixel] = flat_h[pixel] * (1 - mask) + mask * h[who] * dark
        flat_e[pixel] = flat_e[pixel] * (1 - mask) + mask * e[who]
        if nucleus:
            core = mask > 0.5 * opacity
            self.nuclei.ravel()[pixel[core]] = ids[who[core]]
            self._next_id += len(x)
