"""Verbs that list what there is."""

from __future__ import annotations

from histosynth.study.generators import FAMILIES
from histosynth.study.verbs.show import print_table


def encoders() -> None:
    """List the encoders with dimension, input size and licence."""
    from histosynth.encoders import cards

    rows = [
        [
            card.name,
            str(card.dim),
            f"{card.input_size} px" if card.input_size else "any",
            card.licence,
            "yes" if card.gated else "no",
        ]
        for card in cards()
    ]
    print_table(["name", "dim", "input", "licence", "gated"], rows)


def generators() -> None:
    """List the generator families."""
    print_table(["name", "where"], [[n, t] for n, t in sorted(FAMILIES.targets().items())])
