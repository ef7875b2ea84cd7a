"""What is known of the two tile sets that `evaluate` compares: for the guards, the page and the card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.checkpoint import read_card, training_tiles
from histosynth.core.errors import CheckpointError
from histosynth.core.files import sha256_file
from histosynth.evaluate import guards
from histosynth.study import account
from histosynth.study.evaluation.measures import Sides
from histosynth.tiles.images import read_rgb
from histosynth.tiles.quality import metrics as quality
from histosynth.tiles.tileset import TileSet

_TRACED = 32  # tiles a side that are looked at for traces of JPEG
_TRACE_BELOW = 96.0


def generator_card(synthetic: TileSet, checkpoint: Path | None) -> dict[str, Any]:
    """The card of the checkpoint that the tiles were made with, where it was given."""
    if checkpoint is None:
        return {}
    card, made_with = read_card(checkpoint), list(synthetic.meta.get("parents") or [])
    if made_with and sha256_file(checkpoint) not in made_with:
        raise CheckpointError(
            f"{checkpoint} is not the checkpoint that made {synthetic.folder}.",
            "Give that one, or leave --checkpoint out.",
        )
    return card


def facts(
    real: TileSet, synthetic: TileSet, sides: Sides, size: int, card: dict[str, Any], encoders: Sequence[str]
) -> guards.Facts:
    counts = training_tiles(card.get("trained_on") or synthetic.meta.get("trained_on")).get("per_class") or {}
    made_at = card.get("size") or synthetic.meta.get("size")
    digest = card.get("data") or synthetic.meta.get("training_data") or ""
    bank = card.get("bank_ids") or []
    given = f"features of {sum(map(len, bank))} of its training tiles" if any(bank) else ""
    return guards.Facts(
        size=size,
        classes=real.classes,
        n=len(sides.picked["test"]),
        synthetic_is_real=not synthetic.meta.get("synthetic") and not (synthetic.kept.generator != "").any(),
        patients_known="no patients were given" not in str(real.meta.get("split_protocol", "")),
        trained_on={"counts": counts, "digest": digest} if counts else {},
        real_train={"counts": sides.train.counts(), "digest": sides.train.digest() if made_at == size else ""},
        real_test=sides.test.digest() if made_at == size else "",
        conditioning=given or str(synthetic.meta.get("conditioned_on") or ""),
        chosen_on=str(card.get("chosen_on") or synthetic.meta.get("chosen_on") or ""),
        encoders=encoders,
        learned_through=list(synthetic.meta.get("learned_through") or ()),
        traces={"real": _traces(real, "test"), "synthetic": _traces(synthetic, None)},
    )


def _traces(tileset: TileSet, split: str | None) -> float:
    """Share of tiles, of a few spread over the set, that show JPEG compression at the size they have on disk."""
    rows = tileset.rows(split)
    places = np.unique(np.linspace(0, len(rows) - 1, min(_TRACED, len(rows))).astype(int))
    shown = []
    for path in rows.path.iloc[places]:
        image, _ = read_rgb(tileset.folder / path)
        if min(image.shape[:2]) >= quality.MIN_EDGE:
            shown.append(quality.jpeg_quality(image.transpose(2, 0, 1)[None])[0] < _TRACE_BELOW)
    return float(np.mean(shown)) if shown else 0.0


def title(real: TileSet, synthetic: TileSet, facts: guards.Facts) -> str:
    source = real.meta.get("source") or real.folder.name
    if facts.synthetic_is_real:
        return f"Are two sets of real tiles alike? {synthetic.meta.get('source') or synthetic.folder.name} and {source}"
    name = str(synthetic.meta.get("generator") or synthetic.folder.name)
    return f"Are these tiles like real ones? {'GAN' if name == 'gan' else name} against {source}"


def describe(real: TileSet, synthetic: TileSet, sides: Sides, size: int) -> dict[str, Any]:
    splits = {"train": sides.train, "val": real.array("val", size=size), "test": sides.test}
    described = account.describe_data(real, splits, size)
    return described | {
        "synthetic": {
            "counts": sides.synthetic.counts(),
            "digest": synthetic.digest,
            "source": synthetic.meta.get("source", synthetic.folder.name),
            "formats": {str(k): int(v) for k, v in synthetic.kept.format.value_counts().items()},
            "edge": int(synthetic.kept[["width", "height"]].min(axis=1).median()),
            "licence": synthetic.meta.get("licence", ""),
            "columns": [c for c in synthetic.kept.columns if (synthetic.kept[c].astype(str) != "").all()],
        }
    }


def describe_generator(synthetic: TileSet, card: dict[str, Any]) -> dict[str, Any]:
    kept = synthetic.kept
    seeds = kept.seed[kept.seed >= 0]
    return {
        "name": str(synthetic.meta.get("generator") or ""),
        "checkpoint": next((str(p) for p in synthetic.meta.get("parents") or []), ""),
        "licence": str(synthetic.meta.get("licence") or ""),
        "parents": [str(p) for p in card.get("parents") or synthetic.meta.get("generator_parents") or []],
        "seeds": int(seeds.nunique()),
        "trained_on": training_tiles(card.get("trained_on") or synthetic.meta.get("trained_on")),
        "command": str(card.get("command") or ""),
    }
