"""What a user must know of PixCell and of its autoencoder, and where their weights are looked for. No torch here."""

from __future__ import annotations

from pathlib import Path

from histosynth.core.errors import CheckpointError
from histosynth.core.types import EncoderCard
from histosynth.encoders.weights import find, find_named, folder, home, variable

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_LAYOUT = f"transformer/{_WEIGHTS}"
_CITATION = "Yellapragada et al. 2025, arXiv:2506.05127"
_HOW = (
    "Accept the licence CC BY-NC-ND 4.0 at https://huggingface.co/{repository}, make a read token at "
    "https://huggingface.co/settings/tokens, then run: HF_TOKEN=... hf download {repository} {files} "
    "--local-dir {folder}/{name}"
)
_VAE_HOW = (
    "Accept the Stability AI Community Licence at https://huggingface.co/{repository}, make a read token at "
    "https://huggingface.co/settings/tokens, then run: HF_TOKEN=... hf download {repository} {files} "
    "--local-dir {folder}/{name}"
)


def _pixcell(edge: int) -> EncoderCard:
    name, repository = f"pixcell-{edge}", f"StonyBrook-CVLab/PixCell-{edge}"
    return EncoderCard(
        name=name,
        dim=1536,
        input_size=edge,
        licence="CC BY-NC-ND 4.0",
        gated=True,
        commercial=False,
        source=f"PixCell-{edge}, a diffusion transformer of 69,184 slides, told by UNI2-h",
        citation=_CITATION,
        url=f"https://huggingface.co/{repository}",
        weights=_LAYOUT,
        files=(_LAYOUT, f"{_LAYOUT}.index.json", f"pixcell_{edge}.ckpt"),
        how=_HOW.replace("{repository}", repository).replace(
            "{files}", f"transformer/config.json {_LAYOUT} scheduler/scheduler_config.json"
        ),
        optional=True,
        repository=repository,
    )


CARDS: dict[str, EncoderCard] = {
    card.name: card
    for card in (
        _pixcell(256),
        _pixcell(1024),
        EncoderCard(
            name="sd35-vae",
            dim=16,
            input_size=0,
            licence="Stability AI Community Licence (free of charge below a yearly revenue of 1 million dollars)",
            gated=True,
            source="the autoencoder of Stable Diffusion 3.5, in whose latents PixCell draws",
            citation="Esser et al. 2024, arXiv:2403.03206",
            url="https://huggingface.co/stabilityai/stable-diffusion-3.5-large",
            weights=f"vae/{_WEIGHTS}",
            files=(f"vae/{_WEIGHTS}", _WEIGHTS),
            how=_VAE_HOW.replace("{repository}", "stabilityai/stable-diffusion-3.5-large").replace(
                "{files}", f"vae/config.json vae/{_WEIGHTS}"
            ),
            optional=True,
            repository="stabilityai/stable-diffusion-3.5-large",
        ),
    )
}
"""The cards by name. `dim` is the width of the embeddings that PixCell takes, or the channels of a latent."""


def locate(card: EncoderCard) -> Path | None:
    """The weight file of a card, or None: the file or folder in HISTOSYNTH_WEIGHTS_<NAME>, then the weights folder,
    then the cache of Hugging Face."""
    return find(card)


def missing(card: EncoderCard, option: str) -> CheckpointError:
    """The error for weights that are not here: which, under which licence, and how to get them.

    Args:
        option: the setting that can name them instead, such as --vae.
    """
    how = card.how.format(folder=folder(), name=card.name)
    named = find_named(card)
    where = f" ({variable(card.name)} names {named}, where they are not)" if named else ""
    return CheckpointError(
        f"The weights of {card.name} ({card.weights}; {card.licence}, gated) are not on this machine{where}.",
        f"{how} (Without a network: copy the folder to {home(card, '.').parent} or say where it is with {option} "
        f"FOLDER or {variable(card.name)}=FOLDER )",
    )
