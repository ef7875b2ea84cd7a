"""Does a synthetic tile show what it was asked for?

Label consistency: a classifier that was trained on real tiles names the class that the generator was given.
Reference cosine: for tiles conditioned on a real tile, how alike the two are to an encoder, beside how alike two
tiles of one class are anyway. Pair consistency: the classifier gives a real tile and its synthetic twin one class.
Each is read beside its ceiling: what real tiles, or chance, give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from histosynth.core.errors import DataError
from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.checks import checked, checked_pair


def label_consistency(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], level: float = 0.95
) -> dict[str, float]:
    """Share of tiles whose given label is the classifier's first choice.

    Args:
        probabilities: float [N, C], rows of sum 1, of a classifier that was trained on real tiles only.
        labels: int [N], the label that each tile was generated for.
        classes: C class names.

    Returns:
        label_consistency (the mean over the classes that have tiles, so that the mix of classes does not
        matter), label_consistency_low and _high (stratified by class, normal approximation of Wilson's
        intervals), label_probability (mean probability of the given label, likewise), and for each class
        with tiles label_consistency_<class>.

    Raises:
        DataError: shapes that do not go together, or rows that are no probabilities.
    """
    values = checked(probabilities, "probabilities", at_least=1)
    labels = np.asarray(labels)
    if values.shape != (len(labels), len(classes)):
        raise DataError(
            f"Probabilities {values.shape} came with {len(labels)} labels and {len(classes)} classes.",
            "Give a row a tile and a column a class.",
        )
    if values.min() < 0 or np.abs(values.sum(1) - 1).max() > 1e-3:
        raise DataError("Rows of the probabilities do not sum to 1.", "Give probabilities, not logits.")
    right = values.argmax(1) == labels
    shares, weights, variances, given = {}, [], [], []
    z = float(stats.norm.ppf((1 + level) / 2))
    for index, name in enumerate(classes):
        own = labels == index
        if not own.any():
            continue
        n, share = int(own.sum()), float(right[own].mean())
        shares[f"label_consistency_{name}"] = share
        # Agresti & Coull 1998: pulled towards one half, so that 10 of 10 is not certainty
        pulled = (right[own].sum() + z**2 / 2) / (n + z**2)
        variances.append(pulled * (1 - pulled) / (n + z**2))
        given.append(float(values[own, index].mean()))
        weights.append(share)
    mean, half = float(np.mean(weights)), z * float(np.sqrt(np.sum(variances))) / len(weights)
    return {
        "label_consistency": mean,
        "label_consistency_low": max(mean - half, 0.0),
        "label_consistency_high": min(mean + half, 1.0),
        "label_probability": float(np.mean(given)),
        **shares,
    }


def reference_cosine(
    synthetic: np.ndarray, reference: np.ndarray, labels: np.ndarray, seed: int = 0
) -> dict[str, float]:
    """Cosine of each synthetic tile's features and those of the real tile that it was conditioned on.

    Args:
        synthetic: float [N, D].
        reference: float [N, D], row by row the tile that it was made from.
        labels: int [N]; the baseline is another tile's reference of the same class.

    Returns:
        reference_cosine (mean), reference_cosine_low and _high (5 % and 95 % of the tiles), and
        reference_cosine_other (mean cosine to another reference of the class: what no conditioning would give;
        NaN when no class has two references).

    Raises:
        DataError: other shapes on the two sides, values that are not finite.
    """
    synthetic, reference = checked_pair(synthetic, reference, at_least=1)
    if len(synthetic) != len(reference) or len(labels) != len(synthetic):
        raise DataError(
            f"{len(synthetic)} synthetic tiles came with {len(reference)} references and {len(labels)} labels.",
            "Give one reference and one label a tile.",
        )
    first, second = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (synthetic, reference))
    own = (first * second).sum(1)
    others = []
    for label in np.unique(labels):
        rows = np.flatnonzero(np.asarray(labels) == label)
        if len(rows) > 1:  # one step on in a random ring: nobody meets themselves
            ring = numpy_rng(seed, "other reference", int(label)).permutation(rows)
            others.append((first[ring] * second[np.roll(ring, 1)]).sum(1))
    return {
        "reference_cosine": float(own.mean()),
        "reference_cosine_low": float(np.quantile(own, 0.05)),
        "reference_cosine_high": float(np.quantile(own, 0.95)),
        "reference_cosine_other": float(np.concatenate(others).mean()) if others else float("nan"),
    }


def pair_consistency(
    real: np.ndarray, synthetic: np.ndarray, classes: Sequence[str], level: float = 0.95
) -> dict[str, float]:
    """Share of pairs (a real tile and the synthetic tile made from it) that a classifier gives the same class.

    Args:
        real: int [N], predicted classes of the real tiles.
        synthetic: int [N], predicted classes of their synthetic twins.
        classes: names of the classes.

    Returns:
        pair_consistency, _low and _high (Wilson), pair_consistency_chance (what the two sets of predictions
        would share if the pairs were shuffled), pair_consistency_kappa (Cohen 1960), and
        pair_consistency_<class> by the class of the real tile.

    Raises:
        DataError: different numbers, no pair, or indices outside of the classes.
    """
    real, synthetic = np.asarray(real), np.asarray(synthetic)
    if real.shape != synthetic.shape or real.ndim != 1 or not len(real):
        raise DataError(
            f"{real.shape} real predictions came with {synthetic.shape} synthetic ones.", "Give one pair a row."
        )
    if min(real.min(), synthetic.min()) < 0 or max(real.max(), synthetic.max()) >= len(classes):
        raise DataError(f"Predictions are outside of the {len(classes)} classes.", "Give indices into the classes.")
    same = real == synthetic
    interval = stats.binomtest(int(same.sum()), len(same)).proportion_ci(level, method="wilson")
    shares = [np.bincount(side, minlength=len(classes)) / len(side) for side in (real, synthetic)]
    chance = float(shares[0] @ shares[1])
    rate = float(same.mean())
    return {
        "pair_consistency": rate,
        "pair_consistency_low": float(interval.low),
        "pair_consistency_high": float(interval.high),
        "pair_consistency_chance": chance,
        "pair_consistency_kappa": (rate - chance) / (1 - chance) if chance < 1 else float("nan"),
        **{
            f"pair_consistency_{name}": float(same[real == index].mean())
            for index, name in enumerate(classes)
            if (real == index).any()
        },
    }
