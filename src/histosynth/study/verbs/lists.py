"""Verbs that list what there is."""

from __future__ import annotations

from histosynth.study.generators import FAMILIES
from histosynth.study.verbs.show import print_table


def encoders() -> None:
    """List the encoders with dimension, input size and licence."""
    from histosynth.encoders import cards

    print_table(
        ["name", "dim", "input", "licence", "gated"],
        [[c.name, str(c.dim), f"{c.input_size} px", c.licence, "yes" if c.gated else "no"] for c in cards()],
    )


def generators() -> None:
    """List the generator families."""
    print_table(["name", "where"], [[n, t] for n, t in sorted(FAMILIES.targets().items())])
