"""Guards: what each does, and that a resumed one goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from histosynth.gan.augment import AdaController as AdaOfAugment
from histosynth.gan.guards import (
    AccuracyAda,
    AccuracyEma,
    AdaController,
    AlphaGate,
    BestCheckpoint,
    CollapseMonitor,
    DiscriminatorGuard,
    SaturationGuard,
)


def logits(right: int, of: int = 20) -> Tensor:
    """Logits of a real batch of which `right` are called real."""
    return torch.cat([torch.ones(right), -torch.ones(of - right)])


def random_logits(step: int, n: int = 8) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(step)) + 0.8


def random_tiles(step: int, level: float = 0.0) -> Tensor:
    return torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(step)) - 0.5 + level


# --- all of them: state and resume


def _gate_step(gate: AlphaGate, step: int) -> None:
    gate.update(0.74 + 0.1 * math.sin(step / 3), step)
    if step == 14:
        gate.shut()


GUARDS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Any]]] = {
    "ada": (lambda: AdaController(0.6, 0.1, 8), lambda g, k: g.update(random_logits(k), k)),
    "accuracy": (AccuracyEma, lambda g, k: g.update(random_logits(k))),
    "accuracy-ada": (lambda: AccuracyAda(freeze=5), lambda g, k: g.update(random_logits(k), k)),
    "gate": (lambda: AlphaGate(dwell=3, freeze=4), _gate_step),
    "saturation": (SaturationGuard, lambda g, k: g.update(random_tiles(k, 0.2 * k), AlphaGate())),
    "collapse": (
        CollapseMonitor,
        lambda g, k: g.update(random_tiles(k) * 0.1, random_tiles(99 + k), random_tiles(k) * 0.1, random_tiles(99 + k)),
    ),
    "best": (lambda: BestCheckpoint("kid"), lambda g, k: g.update(abs(k - 9) + 0.5, k)),
}


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("cut", [1, 10, 17])
def test_resume_equals_no_interruption(name, cut) -> None:
    make, step = GUARDS[name]
    whole = make()
    for k in range(20):
        step(whole, k)
        if k == cut - 1:
            kept = json.loads(json.dumps(whole.state()))
    assert all(isinstance(v, (int, float)) for v in kept.values())
    resumed = make()
    resumed.restore(kept)
    assert resumed.state() == kept
    for k in range(cut, 20):
        step(resumed, k)
    assert resumed.state() == whole.state() != make().state()
    assert getattr(resumed, "warning", "") == getattr(whole, "warning", "")


def test_a_lost_training_is_still_lost_after_a_resume() -> None:
    guard, accuracy = DiscriminatorGuard(patience=5), AccuracyEma()
    accuracy.update(logits(20))
    for _ in range(3):
        guard.update(accuracy, at_cap=True)
    again = DiscriminatorGuard(patience=5)
    again.restore(guard.state())
    assert [again.update(accuracy, at_cap=True) for _ in range(2)] == [False, True]


# --- augmentation


def test_the_controller_counts_every_logit_of_every_scale() -> None:
    assert AdaOfAugment is AdaController
    ada = AdaController(0.6, 1.0, 4, interval=1)
    ada.update(torch.tensor([[1.0, 2.0], [-1.0, 3.0]]), 0)
    assert ada.r_t == 0.5 and ada.p == 0.0  # it would go below 0
    ada.update(torch.ones(4, 16), 1)
    assert ada.r_t == 1.0 and ada.p == pytest.approx(0.004) and not ada.at_cap


def test_the_controller_stops_at_its_cap() -> None:
    ada = AdaController(0.6, 0.01, 8, max_p=0.3)
    for step in range(8):
        ada.update(torch.ones(8), step)
    assert ada.p == 0.3 and ada.at_cap


def test_accuracy_rule_follows_the_formula_after_the_freeze() -> None:
    ada, ema, p = AccuracyAda(), None, 0.0
    for step in range(900):
        right = 14 if step % 3 else 17
        ada.update(logits(right), step)
        ema = right / 20 if ema is None else 0.99 * ema + 0.01 * right / 20
        if step >= 500:
            p = min(max(p + 0.001 * (ema - 0.6) * 0.20, 0), 0.12)
        else:
            assert ada.p == 0.0
    assert ada.accuracy.ema == pytest.approx(ema, rel=1e-5)
    assert ada.p == pytest.approx(p, rel=1e-3) and p > 0.01


def test_accuracy_rule_has_a_lower_cap_for_a_discriminator_that_wins() -> None:
    ada = AccuracyAda(freeze=0, speed=20)
    for step in range(60):
        ada.update(logits(17), step)
    assert ada.p == 0.12 and ada.at_cap  # 0.85 is below 0.9
    while ada.accuracy.ema <= 0.9:
        ada.update(logits(20), 60)
    assert ada.p == 0.08 and ada.at_cap
    for step in range(400):
        ada.update(logits(8), step)
    assert ada.p == 0.0 and not ada.at_cap


# --- the gate


def test_the_gate_is_shut_while_frozen_and_opens_at_once_after() -> None:
    gate = AlphaGate()
    for step in range(500):
        assert gate.update(0.99, step) == 0.0 and not gate.open
    assert gate.update(0.99, 500) > 0 and gate.open


def test_the_gate_has_hysteresis() -> None:
    gate = AlphaGate(freeze=0, dwell=0)
    gate.update(0.77, 0)
    assert not gate.open
    gate.update(0.78, 1)
    assert gate.open
    gate.update(0.71, 2)
    assert gate.open
    gate.update(0.70, 3)
    assert not gate.open
    gate.update(0.77, 4)
    assert not gate.open


def test_the_gate_dwells_in_both_positions() -> None:
    gate = AlphaGate(freeze=0)
    positions = []
    for step in range(1000):
        gate.update(0.9 if step % 2 else 0.5, step)  # asks for the other position every step
        positions.append(gate.open)
    moves = [k for k in range(1, 1000) if positions[k] != positions[k - 1]]
    assert len(moves) >= 4 and min(b - a for a, b in pairwise(moves)) >= 200


def test_alpha_is_limited_in_speed_and_goes_to_the_maximum() -> None:
    gate = AlphaGate(freeze=0)
    values = [gate.update(0.9, step) for step in range(6000)]
    steps = [b - a for a, b in zip([0.0, *values], values, strict=False)]
    assert max(steps) == pytest.approx(1e-4) and min(steps) >= 0
    # far away the limit rules, close by the time constant: 1 - exp(-1/400) of what is left
    assert values[499] == pytest.approx(500 * 1e-4)
    assert steps[-1] == pytest.approx((1 - math.exp(-1 / 400)) * (0.15 - values[-2]), rel=1e-6)
    assert values[-1] == pytest.approx(0.15, rel=1e-3) and max(values) <= 0.15
    falling = [gate.update(0.5, step) for step in range(6000, 7000)]
    assert falling[0] == pytest.approx(values[-1] - 1e-4) and falling[-1] < 0.08


def test_the_gate_does_not_open_for_an_unstable_discriminator() -> None:
    gate = AlphaGate(freeze=0)
    gate.update(0.9, 0, stable=False)
    assert not gate.open
    gate.update(0.9, 1)
    assert gate.open


def test_a_forced_gate_stays_shut_for_the_dwell_time_and_alpha_does_not_jump() -> None:
    gate = AlphaGate(freeze=0, dwell=10)
    for step in range(100):
        gate.update(0.9, step)
    high = gate.alpha
    gate.shut()
    after = [gate.update(0.9, step) for step in range(100, 109)]
    assert not gate.open and high - 1e-4 <= after[0] < high
    gate.update(0.9, 109)
    assert gate.open


# --- saturation, a discriminator that has won


def test_saturation_takes_back_both_weights_down_to_their_floors() -> None:
    guard, gate = SaturationGuard(), AlphaGate(freeze=0)
    gate.update(0.9, 0)
    assert not guard.update(torch.full((2, 3, 4, 4), 0.7), gate) and gate.open and guard.perceptual == 0.01
    bright = torch.full((2, 3, 4, 4), -0.8)
    assert guard.update(bright, gate) and not gate.open
    assert guard.perceptual == pytest.approx(0.009) and gate.maximum == pytest.approx(0.1425)
    assert "saturated" in guard.warning and "0.80" in guard.warning
    spoken = 0
    for _ in range(99):
        guard.update(bright, gate)
        spoken += bool(guard.warning)
    assert spoken == 1 and guard.trips == 100  # every fiftieth
    assert guard.perceptual == 0.005 and gate.maximum == 0.1


def test_saturation_raises_nothing_that_was_below_its_floor_and_spares_white_classes() -> None:
    guard, gate = SaturationGuard(perceptual=0.0), AlphaGate(maximum=0.05)
    white = torch.full((2, 3, 4, 4), 0.9)
    assert guard.update(white, gate)
    assert guard.perceptual == 0.0 and gate.maximum == 0.05
    assert not guard.update(white, gate, real=white)


def test_a_discriminator_that_has_won_stops_the_training_only_at_the_cap_and_in_a_row() -> None:
    guard, sure = DiscriminatorGuard(), AccuracyEma()
    sure.update(logits(20))
    assert not any(guard.update(sure, at_cap=False) for _ in range(1000))
    assert not any(guard.update(sure, at_cap=True) for _ in range(499))
    unsure = AccuracyEma()
    unsure.update(logits(12))
    guard.update(unsure, at_cap=True)
    found = [guard.update(sure, at_cap=True) for _ in range(500)]
    assert not any(found[:499]) and found[499] and guard.stop
    assert "has won" in guard.warning
    guard.update(sure, at_cap=True)
    assert guard.stop and not guard.warning  # said once


def test_the_running_accuracy_alone_is_enough() -> None:
    guard, accuracy = DiscriminatorGuard(patience=1), AccuracyEma()
    accuracy.restore({"value": 0.99, "ema": 0.985, "seen": 1})
    assert guard.update(accuracy, at_cap=True)
    accuracy.restore({"value": 0.99, "ema": 0.98, "seen": 1})
    assert not guard.update(accuracy, at_cap=True)


# --- collapse


def watch(monitor: CollapseMonitor, fake: Tensor, real: Tensor, labels: Tensor | None = None, n: int = 12) -> list[str]:
    return [monitor.update(fake, real, fake.flatten(1), real.flatten(1), labels) for _ in range(n)]


def test_a_varied_generator_is_left_alone() -> None:
    monitor = CollapseMonitor(stop_after=3)
    assert not any(watch(monitor, random_tiles(0), random_tiles(1)))
    assert 0.7 < monitor.spread < 1.4 and not monitor.stop


def test_tiles_that_are_all_alike_are_seen_and_stop_if_asked() -> None:
    monitor = CollapseMonitor(stop_after=10)
    fake = random_tiles(0)[:1].expand(8, -1, -1, -1) + 0.05 * random_tiles(2)
    said = watch(monitor, fake, random_tiles(1))
    assert [k for k, text in enumerate(said) if text] == [4, 9] and "nearly alike" in said[4]
    assert monitor.stop and monitor.spread < 0.05
    assert not CollapseMonitor(stop_after=0).stop


def test_one_tile_a_class_is_a_collapse_that_only_labels_show() -> None:
    labels = torch.arange(8) % 2
    shift = (labels * 1.0 - 0.5)[:, None, None, None]
    real = 0.2 * random_tiles(1) + shift
    fake = 0.002 * random_tiles(2) + shift
    blind, seeing = CollapseMonitor(), CollapseMonitor()
    assert not any(watch(blind, fake, real))
    assert any(watch(seeing, fake, real, labels))
    assert blind.spread > 0.5 and seeing.spread < 0.01
    # the oracle: variance within each class, pooled
    wide = [sum(x[labels == k].flatten(1).var(0, correction=1).sum() * 3 for k in (0, 1)) / 6 for x in (fake, real)]
    assert seeing.spread == pytest.approx(float(wide[0] / wide[1]), rel=1e-4)


def test_labels_that_come_once_each_are_not_used() -> None:
    monitor = CollapseMonitor()
    watch(monitor, random_tiles(0), random_tiles(1), torch.arange(8))
    assert 0.7 < monitor.spread < 1.4


@pytest.mark.parametrize(("level", "word"), [(0.97, "white"), (-0.97, "black")])
def test_blank_tiles_are_seen_unless_the_real_ones_are_blank_too(level, word) -> None:
    fake = level + 0.02 * random_tiles(0)
    monitor = CollapseMonitor(spread_low=0.0)
    said = [text for text in watch(monitor, fake, random_tiles(1)) if text]
    assert said and word in said[0]
    spared = CollapseMonitor(spread_low=0.0)
    assert not any(watch(spared, fake, level + 0.02 * random_tiles(1)))


def test_one_odd_batch_is_not_a_collapse() -> None:
    monitor = CollapseMonitor()
    watch(monitor, random_tiles(0), random_tiles(1))
    blank = torch.ones(8, 3, 4, 4)
    assert not monitor.update(blank, random_tiles(1), blank.flatten(1), random_tiles(1).flatten(1))
    assert monitor.bad == 0


# --- the best checkpoint


def test_the_best_is_the_smallest_finite_score_and_the_first_of_equals() -> None:
    best = BestCheckpoint("kid", patience=3)
    assert best.chosen_on() is None and not best.stop
    kept = [best.update(score, step) for step, score in enumerate((math.nan, 3.0, 2.0, 2.0, math.inf, 2.5))]
    assert kept == [False, True, True, False, False, False]
    assert best.stop
    assert best.chosen_on() == {"measure": "kid", "score": 2.0, "step": 2, "evaluations": 6}
    assert best.update(-1.0, 6) and not best.stop  # scores may be negative, as those of KID are


def test_no_patience_is_endless_patience() -> None:
    best = BestCheckpoint("kid")
    best.update(1.0, 0)
    for step in range(1, 100):
        best.update(2.0, step)
    assert not best.stop
