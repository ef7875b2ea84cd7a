"""Verbs that list what there is."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from histosynth.core.errors import HistosynthError, RunError
from histosynth.core.progress import say
from histosynth.study.generators import FAMILIES
from histosynth.study.verbs.show import print_table


def encoders(*, fetch: Annotated[list[str] | None, Parameter(negative="")] = None) -> None:
    """List the encoders: what they are, their licence, and whether their weights are here.

    Args:
        fetch: download the weights of this encoder, if its licence lets anybody have them (also lpips-alex, lpips-vgg,
            lpips-squeeze); can be repeated.
    """
    if fetch:
        _fetch(fetch)
        return
    from histosynth.encoders import cards
    from histosynth.encoders.weights import find, folder

    rows = []
    for card in cards():
        path = find(card)
        where = "shipped" if path and card.weights == "shipped" else str(path or ("no" if card.files else "needs none"))
        rows.append(
            [
                card.name,
                str(card.dim or "?"),
                f"{card.input_size} px" if card.input_size else "any",
                card.licence + ("" if card.commercial else " (not commercial)"),
                "yes" if card.gated else "no",
                "shipped" if path and card.weights == "shipped" else where,
            ]
        )
    print_table(["name", "dim", "input", "licence", "gated", "weights"], rows)
    say(f"Weights folder: {folder()}. What to do about missing weights: histosynth doctor")


def generators() -> None:
    """List the generator families."""
    print_table(["name", "where"], [[n, t] for n, t in sorted(FAMILIES.targets().items())])


def _fetch(names: list[str]) -> None:
    """Download each; one that fails keeps none of the others back."""
    from histosynth.encoders.obtain import obtain

    failed: list[tuple[str, HistosynthError]] = []
    for name in names:
        try:
            obtain(name)
        except HistosynthError as error:
            failed.append((name, error))
    if len(failed) == 1:
        raise failed[0][1]
    if failed:
        raise RunError("\n".join(f"{name}: {error}" for name, error in failed))
