"""The verb that measures the quality of tiles and says what the filter would reject."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from histosynth.core.errors import SettingError
from histosynth.core.files import atomic_path
from histosynth.core.progress import say
from histosynth.study.verbs.show import print_table
from histosynth.tiles.quality.metrics import quality_table
from histosynth.tiles.quality.thresholds import QualityConfig, learn
from histosynth.tiles.tileset import SPLITS, TileSet

if TYPE_CHECKING:
    import pandas as pd


def quality(
    tiles: Path,
    *,
    out: Path | None = None,
    workers: int | None = None,
    config: Annotated[QualityConfig, Parameter(name="*")] = QualityConfig(),
) -> None:
    """Measure tiles, and say what the quality filter would reject of each class and why; changes nothing.

    Args:
        tiles: a tile set. Limits are learned from its train split.
        out: folder for quality.csv (a row a tile) and thresholds.yaml (which --rules reads).
        workers: threads; all processors by default.
    """
    import pandas as pd

    tileset = TileSet.open(tiles)
    if unknown := sorted(set(config.splits) - {*SPLITS}):
        raise SettingError(f"splits names {unknown[0]!r}.", f"Use {', '.join(SPLITS)}.")
    metrics = quality_table(tileset, workers=workers)
    rows = tileset.kept.set_index("id").loc[metrics.index]
    train = rows.split == "train"
    if not train.any() and not (rows.split == "").all():
        say("There is no train split, so nothing is learned from these tiles beyond what the rules hold.")
    source = train if train.any() else rows.split == ""
    thresholds = learn(metrics[source], rows.label[source], config)
    judged = rows.split.isin([*config.splits, ""])
    reasons = pd.Series("", rows.index, dtype=object)
    reasons[judged] = thresholds.verdicts(metrics[judged], rows.label[judged])
    _show(rows.label[judged], reasons[judged], tileset.classes)
    if out is None:
        return
    table = rows[["path", "label", "patient", "split"]].join(metrics)
    table["score"] = thresholds.score(metrics, rows.label)
    table["reason"] = reasons
    with atomic_path(out / "quality.csv") as temporary:
        table.to_csv(temporary)
    thresholds.save(out / "thresholds.yaml")
    say(f"Written: {out / 'quality.csv'} and {out / 'thresholds.yaml'}")


def _show(labels: pd.Series, reasons: pd.Series, classes: tuple[str, ...]) -> None:
    lines = []
    for label in classes:
        own = reasons[labels == label]
        lost = own[own != ""]
        why = lost.str.split().str[1].value_counts()
        share = f"{len(lost) / len(own):.1%}" if len(own) else ""
        lines.append([label, str(len(own)), str(len(lost)), share, ", ".join(f"{m} {n}" for m, n in why.items())])
    lines.append(["total", str(len(reasons)), str((reasons != "").sum()), f"{(reasons != '').mean():.1%}", ""])
    print_table(["class", "tiles", "would reject", "share", "why"], lines)
