"""What watches a training and steers it: small objects of plain numbers.

Every one has its settings as arguments, `update(...)` once a step, `state()` (a dict of plain numbers for the resume
state) and `restore(state)`, after which it goes on as if nothing had happened. Steps count from 0. Those that speak
have `warning`, text or nothing after each `update`, and `stop`, whether they would end the training.

The constants of `AccuracyAda`, `AlphaGate`, `SaturationGuard` and `DiscriminatorGuard` are those of a recipe for
224 px colorectal tiles, batches of 8; `AdaController` follows the paper and is what one should take.
"""

from histosynth.gan.guards.steer import AccuracyAda, AccuracyEma, AdaController, AlphaGate
from histosynth.gan.guards.watch import BestCheckpoint, CollapseMonitor, DiscriminatorGuard, SaturationGuard

__all__ = [
    "AccuracyAda",
    "AccuracyEma",
    "AdaController",
    "AlphaGate",
    "BestCheckpoint",
    "CollapseMonitor",
    "DiscriminatorGuard",
    "SaturationGuard",
]
