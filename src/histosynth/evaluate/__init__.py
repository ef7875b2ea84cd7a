"""Floor 4: are the synthetic tiles any good? Pure functions from features to flat dicts of floats.

A metric is one file with a `Metric` in it and one line in this table; other packages add theirs through the
entry-point group "histosynth.metrics". `judge` in `protocol.py` puts them together with equal N on both
sides, intervals, and floors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from histosynth.core.registry import Registry

if TYPE_CHECKING:
    from histosynth.evaluate.protocol import judge
    from histosynth.evaluate.settings import Metric, Protocol

METRICS = Registry(
    "metric",
    {
        "frechet": "histosynth.evaluate.frechet:METRIC",
        "frechet_infinity": "histosynth.evaluate.frechet:INFINITY",
        "kid": "histosynth.evaluate.kernel:KID",
        "cmmd": "histosynth.evaluate.kernel:CMMD",
        "cmmd_paper": "histosynth.evaluate.kernel:CMMD_PAPER",
        "coverage": "histosynth.evaluate.coverage:METRIC",
        "diversity": "histosynth.evaluate.diversity:METRIC",
    },
    "histosynth.metrics",
)

__all__ = ["METRICS", "Metric", "Protocol", "judge"]


def __getattr__(name: str) -> Any:
    if name == "judge":
        from histosynth.evaluate.protocol import judge

        return judge
    if name in ("Metric", "Protocol"):
        from histosynth.evaluate import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
