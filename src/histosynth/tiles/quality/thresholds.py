"""Limits of the quality metrics for each class: learned from the data, or read from YAML, and what they reject.

A rules file (YAML or JSON) has `default` and `classes`; a limit is `<metric>_min` or `<metric>_max`, and a class's
own limits come before the default ones. `accept: always` takes every tile of a class, `accept: finite` every one
whose metrics are numbers. `typical` holds the median of a metric, `calibration` mean and spread of the two
blockiness metrics, from which jpeg_blockiness = (z of block_spatial + z of block_dct) / 2 follows. `learn` names the
limits that are learned, see `presets/quality/learned.yaml`.

A learned limit lies where `quantile` of a normal law with the class's median and robust spread would lie beyond it,
so many tiles may be damaged without moving it far. The spread is 1.4826 x the median distance to the median, of that
side only; where that is 0, it comes from the ninth decile. Two fixed bounds hold the limit: what is `tolerated` is
never rejected however alike the tiles are, and what is `intolerable` is rejected however common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import write_text
from histosynth.core.progress import say
from histosynth.tiles.quality.metrics import METRICS
from histosynth.tiles.quality.rules import CALIBRATED, COMBINED, RULES, Limits, find_rules, parse_rules, plain

if TYPE_CHECKING:
    from histosynth.tiles.tileset import TileSet

_LOGARITHMIC = ("lap_var", "tenengrad", "focus_tissue", "noise")
_ROOTED = ("ink_ratio", "fold_ratio")  # skewed too, but often 0


@dataclass(frozen=True)
class QualityConfig:
    """What the quality filter rejects."""

    rules: str = "learned"
    """learned, none, the name of a preset (nct-default, nct-prototype) or the path of a YAML file."""
    quantile: float = 0.002
    """Share of sound tiles of a class that may lie beyond a learned limit, were their values normal."""
    min_tiles: int = 30
    """Classes with fewer tiles take the limits of all classes together."""
    warn_share: float = 0.5
    """Warn when more than this share of a class would be rejected."""
    splits: tuple[str, ...] = ("train",)
    """Splits that are filtered."""

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 0.5:
            raise SettingError(f"quantile is {self.quantile}.", "Give a share above 0 and below 0.5.")
        if self.min_tiles < 1:
            raise SettingError(f"min_tiles is {self.min_tiles}.", "Give at least 1.")
        if not 0 < self.warn_share <= 1:
            raise SettingError(f"warn_share is {self.warn_share}.", "Give a share above 0, at most 1.")


@dataclass(frozen=True)
class Thresholds:
    """Limits for every class."""

    default: Limits = Limits()
    """For classes that are not named, and for limits that a class does not set."""
    classes: dict[str, Limits] = field(default_factory=dict)
    """By label."""
    recipe: dict[str, dict[str, float]] = field(default_factory=dict)
    """Limits to be learned, with their bounds."""
    pooled: tuple[str, ...] = ()
    """Classes with too few tiles, that took the limits of all classes together."""
    warn_share: float = 0.5
    """Warn when more than this share of a class is rejected."""
    name: str = ""
    """Where the limits come from."""

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a rules file, YAML or JSON, or the preset of that name.

        Raises:
            SettingError: no such file or preset, a key that is no metric or setting, a value that is no number.
        """
        import yaml

        where, text = find_rules(path)
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingError(f"The rules {where} are not YAML: {error}.", "Mend the file.") from error
        return cls(**parse_rules(content, where))

    def save(self, path: Path | str) -> None:
        """Write the limits as a rules file, that `load` reads back."""
        import yaml

        content: dict[str, Any] = {"format": 1, "name": self.name}
        if self.pooled:
            content["pooled"] = list(self.pooled)
        content["default"] = plain(self.default)
        content["classes"] = {label: plain(limits) for label, limits in self.classes.items()}
        if self.recipe:
            content["learn"] = self.recipe
        write_text(path, yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True))

    def of(self, label: str) -> Limits:
        """The limits of a class, the default ones filled in."""
        own = self.classes.get(label, Limits())
        return Limits(
            self.default.rules | own.rules,
            own.accept or self.default.accept,
            self.default.typical | own.typical,
            self.default.calibration | own.calibration,
        )

    def excess(self, table: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
        """How far each tile lies beyond each limit: 0 at the limit, -1 at the class's typical value.

        A limit that a class does not have, or need not keep, is NaN. Index and order are those of the table.

        Raises:
            DataError: the table lacks a metric, or labels and rows differ in number.
            SettingError: a limit on jpeg_blockiness for a class without calibration, or limits not learned yet.
        """
        labels = _labels(table, labels)
        if self.recipe:
            raise SettingError(f"The rules {self.name} hold limits that are yet to be learned.", "Call learn() first.")
        found = pd.DataFrame(np.nan, index=range(len(table)), columns=list(RULES))
        for label in pd.unique(labels):
            here = np.flatnonzero(labels == label)
            limits = self.of(label)
            for rule, limit in limits.rules.items() if not limits.accept else ():
                values = _values(table, rule[:-4], limits, label)[here]
                found.iloc[here, found.columns.get_loc(rule)] = _beyond(values, rule, limit, limits.typical)
        found.index = table.index
        return found.dropna(axis=1, how="all")

    def score(self, table: pd.DataFrame, labels: Sequence[str]) -> np.ndarray:
        """The worst excess of each tile over all its limits: above 0 it is rejected; float64 [N].

        Tiles of a class that has no limits, or is accepted as it is, score -1; those with a metric that is no
        number score infinity.
        """
        excess = self.excess(table, labels).to_numpy(float)
        worst = np.full(len(table), -1.0)
        if excess.shape[1]:
            worst = np.where(np.isnan(excess), -np.inf, excess).max(1)
            worst = np.where(np.isneginf(worst), -1.0, worst)
        always = np.array([self.of(label).accept == "always" for label in labels], bool)
        return np.where(_broken(table) & ~always, np.inf, worst)

    def verdicts(self, table: pd.DataFrame, labels: Sequence[str], *, warn: bool = True) -> list[str]:
        """Why each tile is rejected, "" for those that are accepted; the worst excess gives the reason.

        Warns in plain words when more than `warn_share` of a class is rejected.

        Raises:
            DataError, SettingError: as `excess`.
        """
        labels = _labels(table, labels)
        excess = self.excess(table, labels)
        numbers = excess.to_numpy(float)
        broken = _broken(table)
        reasons = []
        for row, label in enumerate(labels):
            limits = self.of(label)
            if limits.accept == "always":
                reasons.append("")
            elif broken[row]:
                bad = next((m for m in METRICS if not np.isfinite(table[m].iloc[row])), METRICS[0])
                reasons.append(f"quality: {bad} is not a number ({label})")
            elif limits.accept == "finite" or not np.nanmax(numbers[row], initial=-np.inf) > 0:
                reasons.append("")
            else:
                rule = excess.columns[int(np.nanargmax(numbers[row]))]
                value = _values(table.iloc[[row]], rule[:-4], limits, label)[0]
                reasons.append(_reason(rule, value, limits.rules[rule], label))
        if warn:
            for line in heavy_losses(labels, reasons, self.warn_share):
                say(line)
        return reasons


def heavy_losses(labels: Sequence[str], verdicts: Sequence[str], share: float = 0.5) -> list[str]:
    """A warning for each class of which more than this share is rejected."""
    frame = pd.DataFrame({"label": list(labels), "reason": list(verdicts)})
    lines = []
    for label, rows in frame.groupby("label", sort=True):
        lost = rows.reason[rows.reason != ""]
        if len(lost) > share * len(rows):
            metric = lost.str.split().str[1].value_counts().index[0]
            lines.append(
                f"Warning: the quality filter rejects {len(lost)} of the {len(rows)} tiles of class {label!r} "
                f"({len(lost) / len(rows):.0%}), most often for {metric}. Look at them, or loosen that limit."
            )
    return lines


def learn(table: pd.DataFrame, labels: Sequence[str], config: QualityConfig = QualityConfig()) -> Thresholds:
    """Limits from training tiles, as `config.rules` says.

    A rules file without `learn` is taken as it is; only the calibration of the blockiness, if a limit needs it
    and the file has none, comes from the table.

    Args:
        table: columns `METRICS`, a row a tile; rows that are not numbers are left out.
        labels: N class labels.

    Raises:
        DataError: the table holds tiles of the test split (column split), lacks a metric, or has no usable row.
        SettingError: rules that cannot be read.
    """
    if config.rules == "none":
        return Thresholds(name="none", warn_share=config.warn_share)
    rules = replace(Thresholds.load(config.rules), warn_share=config.warn_share)
    if "split" in table and (table.split == "test").any():
        raise DataError(
            f"{(table.split == 'test').sum()} of the {len(table)} tiles to learn limits from are test tiles.",
            "Learn from the train split only.",
        )
    names = _labels(table, labels)
    usable = ~_broken(table)
    values = {m: table[m].to_numpy(float)[usable] for m in METRICS}
    names = names[usable]
    wanted = {*rules.default.rules, *(r for c in rules.classes.values() for r in c.rules), *rules.recipe}
    needs = any(r.startswith(COMBINED) for r in wanted) and not rules.default.calibration
    if not rules.recipe and not needs:
        return rules
    if not len(names):
        raise DataError("There is no tile to learn quality limits from.", "Give a train split with readable tiles.")
    pooled = tuple(sorted(c for c in set(names) if (names == c).sum() < config.min_tiles and not rules.of(c).accept))
    # classes that the filter leaves alone, such as background, would widen the limits of the others
    judged = np.array([not rules.of(c).accept for c in names])
    common = {m: v[judged] for m, v in values.items()} if judged.any() else values
    default = _learned(rules.default, rules.recipe, common, needs, config.quantile)
    classes = dict(rules.classes)
    for label in sorted(set(names) - set(pooled)):
        here = {m: v[names == label] for m, v in values.items()}
        own = rules.classes.get(label, Limits())
        if not own.accept:
            classes[label] = _learned(own, rules.recipe, here, needs, config.quantile)
    if pooled and rules.recipe:
        say(
            f"Quality limits: {', '.join(pooled)} ha{'s' if len(pooled) == 1 else 've'} fewer than {config.min_tiles} "
            "tiles and take those of all classes together."
        )
    return replace(rules, default=default, classes=classes, recipe={}, pooled=pooled)


def learn_from(tileset: TileSet, config: QualityConfig = QualityConfig(), *, workers: int | None = None) -> Thresholds:
    """Limits learned from the train split of a tile set, and from nothing else.

    Raises:
        DataError: as `learn`.
    """
    from histosynth.tiles.quality.metrics import quality_table

    rows = tileset.rows("train")
    return learn(quality_table(tileset, workers=workers).loc[rows.id], rows.label, config)


def _learned(
    own: Limits, recipe: Mapping[str, Mapping[str, float]], values: Mapping[str, np.ndarray], needs: bool, share: float
) -> Limits:
    from scipy.stats import norm

    reach = float(norm.isf(share))
    calibration = dict(own.calibration)
    if needs and not calibration:
        calibration = {m: _centre_and_spread(values[m], least) for m, least in CALIBRATED.items()}
    rules, typical = {}, {}
    for rule, bounds in recipe.items():
        metric, side = rule[:-4], (1 if rule.endswith("_max") else -1)
        raw = _combined(values, calibration) if metric == COMBINED else values[metric]
        scaled = _scale(raw, metric)
        middle = float(np.median(scaled))
        away = (scaled - middle) * side
        spread = 1.4826 * float(np.median(away[away >= 0]))
        if spread == 0:  # most values are equal, as for block_spatial
            spread = max(0.0, float(np.quantile(away, 0.9)) / 1.2816)
        limit = _unscale(middle + side * reach * spread, metric)
        tolerated, intolerable = bounds.get("tolerated", -side * np.inf), bounds.get("intolerable", side * np.inf)
        limit = max(limit, tolerated) if side > 0 else min(limit, tolerated)
        rules[rule] = min(limit, intolerable) if side > 0 else max(limit, intolerable)
        typical[metric] = float(np.median(raw))
    return Limits(rules | own.rules, own.accept, typical | own.typical, calibration)


def _centre_and_spread(values: np.ndarray, least: float) -> tuple[float, float]:
    """Mean and standard deviation, the outer hundredths drawn in; medians would be 0, as most block steps are."""
    held = np.clip(values, *np.quantile(values, [0.01, 0.99]))
    return float(held.mean()), max(float(held.std()), least)


def _combined(values: Mapping[str, Any], calibration: Mapping[str, tuple[float, float]]) -> np.ndarray:
    parts = [(np.asarray(values[m], float) - calibration[m][0]) / max(calibration[m][1], 1e-6) for m in CALIBRATED]
    return (parts[0] + parts[1]) / 2


def _values(table: pd.DataFrame, metric: str, limits: Limits, label: str) -> np.ndarray:
    if metric != COMBINED:
        return table[metric].to_numpy(float)
    missing = [m for m in CALIBRATED if m not in limits.calibration]
    if missing:
        raise SettingError(
            f"A limit on {COMBINED} for class {label!r} needs the calibration of {missing[0]}, which is missing.",
            "Give `calibration` in the rules file, or learn the limits from training tiles.",
        )
    return _combined({m: table[m] for m in CALIBRATED}, limits.calibration)


def _scale(values: Any, metric: str) -> Any:
    """The scale on which sound tiles spread evenly to both sides."""
    if metric in _LOGARITHMIC:
        return np.log(np.maximum(values, 0) + 1e-3)
    return np.sqrt(np.maximum(values, 0)) if metric in _ROOTED else np.asarray(values, float)


def _unscale(values: float, metric: str) -> float:
    if metric in _LOGARITHMIC:
        return float(np.exp(values) - 1e-3)
    return max(values, 0.0) ** 2 if metric in _ROOTED else values


def _beyond(values: np.ndarray, rule: str, limit: float, typical: Mapping[str, float]) -> np.ndarray:
    metric, side = rule[:-4], (1 if rule.endswith("_max") else -1)
    reference = typical.get(metric)
    if reference is not None and (limit - reference) * side > 0:
        away = (_scale(values, metric) - _scale(limit, metric)) * side
        excess = away / max(abs(float(_scale(limit, metric) - _scale(reference, metric))), 1e-9)
    else:
        excess = (values - limit) * side / max(abs(limit), 1e-9)
    # the verdict itself must not hang on the rounding of a logarithm
    return np.where((values - limit) * side > 0, np.maximum(excess, 1e-12), np.minimum(excess, 0))


def _broken(table: pd.DataFrame) -> np.ndarray:
    missing = [m for m in METRICS if m not in table]
    if missing:
        raise DataError(f"The table of quality metrics lacks {missing[0]!r}.", "Measure the tiles with quality_table.")
    return ~np.isfinite(table[list(METRICS)].to_numpy(float)).all(1)


def _labels(table: pd.DataFrame, labels: Sequence[str]) -> np.ndarray:
    names = np.asarray(list(labels), dtype=object)
    if len(names) != len(table):
        raise DataError(f"{len(table)} rows of metrics came with {len(names)} labels.", "Give one label a tile.")
    _broken(table)
    return names


def _reason(rule: str, value: float, limit: float, label: str) -> str:
    return f"quality: {rule[:-4]} {value:.4g} {'above' if rule.endswith('_max') else 'below'} {limit:.4g} ({label})"
