"""Selected tiles: real-looking ones of the right class pass, others do not."""

import numpy as np

from histosynth.study.usefulness.plan import SelectionConfig
from histosynth.study.usefulness.select import select

CLASSES = ("a", "b")


def cloud(rng, label, count, shift=0.0):
    """Features of a class: an own mean in the first coordinate."""
    return rng.normal(size=(count, 6)) + np.array([4.0 * label + shift, 0, 0, 0, 0, 0])


def world(seed=0, real=60):
    rng = np.random.default_rng(seed)
    labels, val_labels = np.repeat([0, 1], real), np.repeat([0, 1], 40)
    features = np.concatenate([cloud(rng, label, real) for label in (0, 1)])
    val = np.concatenate([cloud(rng, label, 40) for label in (0, 1)])
    return rng, features, labels, np.array([f"p{i % 12}" for i in range(2 * real)]), val, val_labels


def test_good_tiles_pass_and_strange_or_mislabelled_ones_do_not():
    rng, real, labels, groups, val, val_labels = world()
    good = np.concatenate([cloud(rng, label, 100) for label in (0, 1)])
    strange = np.concatenate([cloud(rng, label, 100) + np.array([0, 9, 0, 0, 0, 0]) for label in (0, 1)])
    swapped = np.concatenate([cloud(rng, 1 - label, 100) for label in (0, 1)])
    made, made_labels = np.concatenate([good, strange, swapped]), np.tile(np.repeat([0, 1], 100), 3)
    kept = select(real, labels, groups, val, val_labels, made, made_labels, CLASSES)
    shares = [kept.mask[part].mean() for part in (slice(0, 200), slice(200, 400), slice(400, 600))]
    assert shares[0] > 0.75 and shares[1] == 0 and shares[2] < 0.05
    assert kept.shares == {c: round(float(kept.mask[made_labels == i].mean()), 4) for i, c in enumerate(CLASSES)}
    assert not kept.notes


def test_the_limit_of_realism_is_what_real_tiles_of_other_patients_reach():
    """Fresh tiles of the same distribution pass about as often as the limits say."""
    rates = []
    for seed in range(5):
        rng, real, labels, groups, val, val_labels = world(seed, real=150)
        made, made_labels = np.concatenate([cloud(rng, k, 300) for k in (0, 1)]), np.repeat([0, 1], 300)
        config = SelectionConfig(consistency=1.0, realism=0.8)
        kept = select(real, labels, groups, val, val_labels, made, made_labels, CLASSES, config)
        rates.append(kept.mask.mean())
    assert 0.7 < np.mean(rates) < 0.9


def test_leaving_patients_out_matters():
    """Tiles of one patient are near copies: without leaving it out, the limit would be far too narrow."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(10, 6))
    real = np.concatenate([c + 0.01 * rng.normal(size=(10, 6)) for c in centres])
    groups = np.repeat([f"p{k}" for k in range(10)], 10)
    made = rng.normal(size=(100, 6))
    arguments = (np.zeros((0, 6)), np.zeros(0, int), made, np.zeros(100, int), ("a",))
    by_patient = select(real, np.zeros(100, int), groups, *arguments)
    by_tile = select(real, np.zeros(100, int), np.arange(100).astype(str), *arguments)
    assert by_patient.mask.mean() > 0.5 > 2 * by_tile.mask.mean()


def test_a_class_that_nothing_passes_keeps_its_best_and_says_so():
    rng, real, labels, groups, val, val_labels = world()
    made, made_labels = np.concatenate([cloud(rng, 0, 50), cloud(rng, 1, 50) + 30]), np.repeat([0, 1], 50)
    made[60] -= 20
    kept = select(real, labels, groups, val, val_labels, made, made_labels, CLASSES, SelectionConfig(least=0.1))
    assert kept.shares["b"] == 0.1 and kept.mask[60] and len(kept.notes) == 1 and "of b passed" in kept.notes[0]


def test_a_class_without_real_tiles_keeps_nothing_and_few_tiles_do_not_break_it():
    rng, real, labels, groups, val, val_labels = world()
    made, made_labels = np.concatenate([cloud(rng, 0, 20), cloud(rng, 1, 20)]), np.repeat([0, 1], 20)
    only = labels == 0
    kept = select(real[only], labels[only], groups[only], val, val_labels, made, made_labels, CLASSES)
    assert kept.shares["b"] == 0 and kept.shares["a"] > 0.5 and "no real one" in kept.notes[0]
    one_each = np.array([0, 60])
    few = select(real[one_each], labels[one_each], groups[one_each], val, val_labels, made, made_labels, CLASSES)
    assert 0 < few.mask.mean() <= 1
    none = select(real, labels, groups, val[:0], val_labels[:0], made, made_labels, CLASSES)
    assert none.mask.mean() > 0.5
    empty = select(real, labels, groups, val, val_labels, made[:0], made_labels[:0], CLASSES)
    assert empty.mask.shape == (0,) and empty.shares == {}
