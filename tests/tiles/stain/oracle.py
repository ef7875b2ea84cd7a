"""A slow stain normaliser, written from the papers apart from the one under test: float64, every pixel, no short cuts.

It shares the definitions that the documentation gives (light, tissue, blending) and none of the code.
"""

import numpy as np

RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


PUBLISHED = unit((unit(RUIFROK) + unit(MACENKO)) / 2)


def angles(first, second):
    """Degrees between unit vectors, along the last axis."""
    return np.degrees(np.arccos(np.clip((first * second).sum(-1), -1, 1)))


def luma(image):
    return np.floor((54.0 * image[0] + 183.0 * image[1] + 19.0 * image[2]) / 256)


def white_point(image):
    """image [3, H, W]: median of the brightest 1 %, less the eosin that a shortage of green betrays."""
    levels = luma(image).ravel()
    edge = next(v for v in range(255, -1, -1) if (levels >= v).sum() > 0.01 * len(levels))
    white = np.median(image.reshape(3, -1)[:, levels >= edge], axis=1)
    r, g, b = np.maximum(white, 1)
    eosin = PUBLISHED[1]
    amount = max(0.0, np.log(np.sqrt(r * b) / g)) / (eosin[1] - (eosin[0] + eosin[2]) / 2)
    return np.minimum(255, np.array([r, g, b]) * np.exp(amount * eosin))


def density(image, white):
    od = -np.log(np.maximum(image.astype(float), 1) / white[:, None, None])
    return np.maximum(od, 0)


def stained(image, white):
    """The pixels that stains are estimated from."""
    return (density(image, white).max(0) > 0.15) & (luma(image) < 0.85 * (np.array([54, 183, 19]) @ white) / 256)


def lasso(x, w, sparsity):
    """Non-negative lasso by trying all four sets of active atoms: x [P, 3], w [2, 3] -> [P, 2]."""
    best, value = np.zeros((len(x), 2)), 0.5 * (x**2).sum(1)
    for active in ([0], [1], [0, 1]):
        atoms = w[active]
        c = np.zeros((len(x), 2))
        c[:, active] = np.linalg.solve(atoms @ atoms.T, atoms @ x.T - sparsity).T
        cost = 0.5 * ((x - c @ w) ** 2).sum(1) + sparsity * c.sum(1)
        better = (c >= 0).all(1) & (cost < value)
        best[better], value[better] = c[better], cost[better]
    return best, value.mean()


def factorise(x, sparsity=0.1, starts=2, tolerance=1e-6, limit=1500):
    """The best of several alternating minimisations, each run until it stands still."""
    rng = np.random.default_rng(1)
    found = []
    for k in range(starts):
        w = unit(PUBLISHED if k == 0 else rng.uniform(0.05, 1, (2, 3)))
        for _ in range(limit):
            c, cost = lasso(x, w, sparsity)
            old = w.copy()
            for j in (0, 1):
                rest = x - np.outer(c[:, 1 - j], w[1 - j])
                atom = np.maximum(rest.T @ c[:, j], 0)
                if atom.any():
                    w[j] = atom / np.linalg.norm(atom)
            if np.abs(w - old).max() < tolerance:
                break
        found.append((cost, k, w))
    w = min(found)[2]
    same = angles(w, PUBLISHED).sum()
    return w if same <= angles(w[::-1], PUBLISHED).sum() else w[::-1]


def measure(image, sparsity):
    """White point, stain matrix (penalty 0.1) and 99th percentiles of the concentrations of one image [3, H, W]."""
    white = white_point(image)
    mask = stained(image, white)
    x = density(image, white)[:, mask].T
    w = factorise(x)
    return white, w, np.percentile(lasso(x, w, sparsity)[0], 99, axis=0)


def normalise(image, own, reference, sparsity):
    """Recolour image [3, H, W] from its own measures to those of a reference."""
    (white, w, strength), (new_white, new_w, new_strength) = own, reference
    od = density(image, white)
    c, _ = lasso(od.reshape(3, -1).T, w, sparsity)
    scaled = (c * new_strength / strength) @ new_w
    depth = od.max(0).ravel()
    part = np.clip(depth / 0.9, 0, 1)[:, None]
    new = np.exp((1 - part) * np.log(white) + part * np.log(new_white) - scaled)
    share = np.clip(depth / 0.15 - 1, 0, 1)[:, None]
    old = image.reshape(3, -1).T
    return np.rint(old + share * (new - old)).clip(0, 255).T.reshape(image.shape)
