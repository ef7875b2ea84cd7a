"""Downloading weights, for those whose licence lets anybody have them, and only when asked."""

from __future__ import annotations

from pathlib import Path

from histosynth import encoders
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.fetch import fetch
from histosynth.core.files import sha256_file
from histosynth.core.progress import say
from histosynth.core.types import EncoderCard
from histosynth.core.web import Patience
from histosynth.encoders.weights import find, home, remedy


def card_of(name: str) -> EncoderCard:
    """The card of an encoder, or of a network under LPIPS (lpips-alex, lpips-vgg, lpips-squeeze).

    Raises:
        SettingError: there is none of that name.
    """
    if name.startswith("lpips-"):
        from histosynth.encoders.lpips import BACKBONES

        known = {card.name: card for card in BACKBONES.values()}
        if name in known:
            return known[name]
    return encoders.card(name)


def obtain(name: str, patience: Patience = Patience()) -> Path:
    """Download the weights of `name` to the weights folder, unless they are on this machine.

    Raises:
        SettingError: it needs no weights, or there is none of that name.
        CheckpointError: its weights are gated or lie where no program gets them; the remedy says what to do.
        RunError, DataError: as `histosynth.core.fetch.fetch`.
    """
    card = card_of(name)
    found = find(card)
    if found is not None:
        say(f"{name}: {found}")
        return found
    if not card.files:
        raise SettingError(f"{name} has no weight file to download.", "Use it as it is.")
    if not card.download:
        why = "are gated" if card.gated else "cannot be downloaded by a program"
        raise CheckpointError(f"The weights of {name} ({card.licence}) {why}.", remedy(card))
    path = home(card)
    fetch(card.download, path, size=None, digest=f"sha256:{card.sha256}" if card.sha256 else "", patience=patience)
    if not card.sha256:
        say(f"{name}: nobody publishes a checksum of this file; its SHA-256 is {sha256_file(path)}.")
    say(f"{name} ({card.licence}): {path}")
    return path
