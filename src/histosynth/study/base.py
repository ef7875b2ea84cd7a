"""Train the base weights that histosynth ships, on simulated tissue of hospitals that no demo uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from histosynth.core.checkpoint import load_checkpoint, save_checkpoint
from histosynth.core.errors import SettingError
from histosynth.core.progress import say
from histosynth.tiles.batches import TileArray
from histosynth.tiles.simulate import BaseTissueConfig, base_tissue

if TYPE_CHECKING:
    from histosynth.autoencoder.network import Autoencoder

_UNSEEN = 252
"""Tiles of unseen hospitals, 28 a class."""


@dataclass(frozen=True)
class BaseConfig:
    """What to train, and for how long."""

    out: Path = Path("runs/base")
    """Folder of the runs; the weights to ship are written to OUT/assets."""
    tiles: int = 27_000
    """Simulated tiles."""
    size: int = 64
    """Edge length in pixels."""
    steps: int = 20_000
    """Training steps."""
    seconds: float | None = None
    """Wall-clock cap; the weights reached by then are shipped, and the card says at which step."""
    seed: int = 0
    """Seed of the training."""
    init: str = "none"
    """gan: the weights to go on from, a path or base (those that ship); none: random ones."""
    workers: int = 1
    """Processes that simulate tissue."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def train_base(
    what: Literal["tissue", "classifier", "gan", "autoencoder", "diffusion"],
    *,
    config: Annotated[BaseConfig, Parameter(name="*")] = BaseConfig(),
) -> None:
    """Train one of the shipped base weights; resumes when repeated.

    Args:
        what: "tissue" only simulates the tiles; the others train on them (autoencoder before diffusion).
    """
    tiles = base_tissue(BaseTissueConfig(tiles=config.tiles, size=config.size), config.out, config.workers)
    if what == "tissue":
        say(f"{len(tiles)} simulated tiles are in {config.out}.")
        return
    train = {"classifier": _classifier, "gan": _gan, "autoencoder": _autoencoder, "diffusion": _diffusion}[what]
    shipped = train(tiles, config, config.out / what)
    stamp(shipped, what, config)
    say(f"To ship: {shipped} ({shipped.stat().st_size / 2**20:.1f} MB)")


def stamp(path: Path, what: str, config: BaseConfig) -> None:
    """Write into the card of a shipped file by which command it was made, and of what."""
    tensors, card = load_checkpoint(path)
    words = ["histosynth train base", what, f"--tiles {config.tiles} --size {config.size} --seed {config.seed}"]
    words.append(f"--steps {config.steps}" + (f" --seconds {config.seconds:g}" if config.seconds else ""))
    words += [f"--init {config.init}"] if config.init != "none" else []
    trained_on = f"{config.tiles} simulated tiles (base tissue, {config.size} px)"
    new = {"name": path.stem, "command": " ".join(words), "trained_on": trained_on}
    new["parents"] = [config.init] if config.init != "none" else []
    save_checkpoint(path, tensors, card | new, half=True)


def _asset(config: BaseConfig, name: str) -> Path:
    return config.out / "assets" / f"{name}-{config.size}.safetensors"


def _classifier(tiles: TileArray, config: BaseConfig, folder: Path) -> Path:
    from histosynth.classify.config import ClassifierConfig
    from histosynth.classify.train import train_classifier
    from histosynth.core.files import ensure_folder
    from histosynth.core.progress import bar

    if config.seconds is not None:
        raise SettingError(f"seconds is {config.seconds:g}.", "The classifier counts in steps alone: set --steps.")
    # strong views, so that what is learnt does not rest on the simulator's stains and scanners
    settings = ClassifierConfig(
        steps=config.steps, batch=64, lr=1e-2, augment="strong", average=0.99, weights="none", dropout=0.2
    )
    others = _unseen(config)
    state = ensure_folder(folder) / "state.safetensors"
    with bar("Train the classifier", config.steps) as tick:
        model = train_classifier(
            tiles, others, settings, seed=config.seed, tick=tick, device=config.device, state=state
        )
    right = (model.logits(others.images).argmax(1).numpy() == others.labels).mean()
    model.card["unseen_hospitals"] = {"tiles": len(others), "accuracy": round(float(right), 4)}
    shipped = model.save(config.out / "assets" / f"tissue-mobilenet-{config.size}.safetensors")
    state.unlink(missing_ok=True)
    return shipped


def _gan(tiles: TileArray, config: BaseConfig, folder: Path) -> Path:
    from histosynth.gan.train import GanConfig, train_gan
    from histosynth.gan.transfer import export_base

    settings = GanConfig(
        size=config.size,
        steps=config.steps,
        seconds=config.seconds,
        seed=config.seed,
        init=config.init,
        autoencoder=str(_asset(config, "autoencoder")) if config.init == "none" else "base",
        decoder=0.0,  # it has learnt from these very tiles
        schedule="clock",
    )
    return export_base(train_gan(tiles, settings, folder, device=config.device), _asset(config, "gan-base"))


def _autoencoder(tiles: TileArray, config: BaseConfig, folder: Path) -> Path:
    from histosynth.autoencoder.network import load_autoencoder, save_autoencoder
    from histosynth.autoencoder.train import AutoencoderConfig, train_autoencoder

    # under a cap the learning rate follows the clock, or it would never fall and the last weights would be noisy
    settings = AutoencoderConfig(
        size=config.size, steps=config.steps, seconds=config.seconds, schedule="clock", seed=config.seed
    )
    trained = train_autoencoder(tiles, settings, folder, device=config.device)
    model, card = load_autoencoder(trained)
    card["unseen_hospitals"] = _of_unseen_hospitals(model, config)
    return save_autoencoder(_asset(config, "autoencoder"), model, card, half=True)


def _of_unseen_hospitals(model: Autoencoder, config: BaseConfig) -> dict[str, float]:
    """PSNR and SSIM of the round trip of tissue from hospitals that none of the training tiles came from."""
    import torch

    from histosynth.autoencoder.figures import round_trip_figures

    return round_trip_figures(model, _unseen(config).images, torch.device("cpu"))


def _unseen(config: BaseConfig) -> TileArray:
    """Tissue from hospitals that none of the training tiles came from."""
    others = BaseTissueConfig(tiles=_UNSEEN, size=config.size, hospitals=20, seed=BaseTissueConfig.seed + 1)
    return base_tissue(others, config.out, config.workers)


def _diffusion(tiles: TileArray, config: BaseConfig, folder: Path) -> Path:
    from histosynth.diffusion.model import export_base
    from histosynth.diffusion.train import DiffusionConfig, train_diffusion

    settings = DiffusionConfig(
        size=config.size,
        steps=config.steps,
        seconds=config.seconds,
        schedule="clock",
        seed=config.seed,
        init="none",
        decoder=0.0,  # it has learnt from these very tiles
        lr_base=1e-3,
        autoencoder=str(_asset(config, "autoencoder")),
    )
    return export_base(train_diffusion(tiles, settings, folder, device=config.device), _asset(config, "diffusion-base"))
