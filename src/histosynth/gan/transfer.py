"""Weights on the move: into a training with other classes, labels or sizes, and out to a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import load_checkpoint, load_state, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError
from histosynth.core.progress import say
from histosynth.core.seeds import torch_generator
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.relabel import relabelled, same_labels
from histosynth.gan.sample import fill, shape_of

BASE = "gan-base-64.safetensors"

_CHOICE = ("chosen_by", "chosen_score", "chosen_note", "validation", "validation_tiles")
# one row a class: of the mapping network of either network, of the class projection, of the judges of the head
_CLASS_ROWS = re.compile(r"mapping\.(embedding|w_mean)|embedding|judges\.\d+\.embedding")
_RESOLUTION = re.compile(r"(?:blocks|heads)\.b(\d+)\.")
_WIDTHS = ("z_dim", "w_dim", "mapping_depth")


@dataclass(frozen=True)
class Transferred:
    """What a transfer did to one network."""

    taken: int
    """Tensors taken over."""
    left: tuple[str, ...]
    """Names of the tensors that begin anew."""
    unused: tuple[str, ...] = ()
    """Names of the tensors of the file that the network has no place for."""
    notes: tuple[str, ...] = ()
    """What else a user has to know."""

    def __str__(self) -> str:
        text = f"{self.taken} of {self.taken + len(self.left)} tensors"
        if self.left:
            text += f" (anew: {', '.join(dict.fromkeys(_part(name) for name in self.left))})"
        if self.unused:
            parts = dict.fromkeys("noise" if "noise" in name else _part(name, 3) for name in self.unused)
            text += f" (the file has more, for which these settings have no place: {', '.join(parts)})"
        return "; ".join([text, *self.notes])


def start_from(
    init: str,
    generator: Generator,
    discriminator: Discriminator,
    classes: Sequence[str],
    seed: int,
    head: nn.Module | None = None,
) -> None:
    """Take over what fits from the checkpoint `init`, or from the shipped weights ("base"), and say what it was.

    The two may differ in classes, in labels at all, and in size; not in width or architecture.

    Args:
        head: the pathology head, where there is one.

    Raises:
        CheckpointError: there is no such checkpoint, or its networks have another width or architecture.
    """
    path = checkpoint_of(init)
    tensors, card = load_checkpoint(path)
    require_kind(card, "gan", path)
    old = shape_of(card, path)
    _require_width(old, generator.shape, path)
    known = (
        list(card["classes"]) if len(card["classes"]) == old.classes else [f"number {k}" for k in range(old.classes)]
    )
    said = []
    for prefix, network, what in (("G_ema.", generator, "generator"), ("D.", discriminator, "discriminator")):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if not own:
            said.append(f"no {what}, which begins anew")
            continue
        said.append(f"{what} {transfer(network, own, old, known, classes, seed)}")
    judged = {k.removeprefix("H."): v for k, v in tensors.items() if k.startswith("H.")}
    if head is not None and judged:
        said.append(f"head {_take(head, judged, known, classes, seed)}")
    say(f"Start weights {path.name}: {'; '.join(said)}.")
    _say_classes(old, generator.shape, known, classes)


@torch.no_grad()
def transfer(
    network: Generator | Discriminator,
    tensors: dict[str, Tensor],
    old: Shape,
    old_classes: Sequence[str],
    new_classes: Sequence[str],
    seed: int = 0,
) -> Transferred:
    """Copy the tensors of a network of shape `old` into `network` where they fit.

    Rows that belong to a class follow the class name; a class that the old network did not know gets a random row
    around the mean of the old ones, as far from the other classes as these are from one another: classes that begin
    nearly alike stay so for long, since nothing tells the discriminator to look at them. Where the labels
    themselves differ (none before, or seen in another way), `relabelled` makes the same function first.
    Layers are named by their resolution, so networks of other sizes share the common ones; the image heads
    of added resolutions start at zero, which makes the larger network begin as the smaller one, enlarged. So do a map
    of w at 4 px and strengths of noise where the old network had none.
    """
    notes = []
    # lite keeps the weights of its mapping network as they are, whatever its rate
    rate = 1.0 if old.architecture == "lite" else old.mapping_lr / network.shape.mapping_lr
    rescaled = {k: v * rate if k.startswith("mapping.layers.") else v for k, v in tensors.items()}
    if not same_labels(network, old, network.shape):
        with torch.random.fork_rng(devices=[]):
            source = type(network)(replace(old, mapping_lr=network.shape.mapping_lr))
        fill(source, rescaled, "", "the start weights")
        rescaled = dict(relabelled(source, network.shape, seed).state_dict())
        old_classes = new_classes
        notes.append("labels begin without effect" if network.shape.classes else "labels averaged out")
    found = _take(network, rescaled, old_classes, new_classes, seed)
    # what `relabelled` had to add was not in the file
    own = network.state_dict()
    added = tuple(name for name in own if name not in tensors and name not in found.left)
    unused = tuple(name for name in rescaled if name not in own and _missed(name, network.shape))
    return Transferred(found.taken - len(added), (*found.left, *added), unused, tuple(notes))


@torch.no_grad()
def _take(
    network: nn.Module, tensors: dict[str, Tensor], old_classes: Sequence[str], new_classes: Sequence[str], seed: int
) -> Transferred:
    noiseless = not any(name.endswith(".noise_strength") for name in tensors)
    at_zero = ("to_rgb.weight", ".noise_strength") if noiseless else ("to_rgb.weight",)
    taken, left = 0, []
    for name, target in network.state_dict().items():
        source = tensors.get(name)
        if source is not None and _CLASS_ROWS.fullmatch(name) and source.shape[1:] == target.shape[1:]:
            one = len(target) == len(source) == 1  # of a network without labels
            target.copy_(source if one else _class_rows(name, source, old_classes, new_classes, seed))
            taken += 1
        elif source is not None and source.shape == target.shape:
            target.copy_(source)
            taken += 1
        else:
            if source is None and (name.endswith(at_zero) or name.startswith("blocks.b4.start.")):
                target.zero_()
            left.append(name)
    return Transferred(taken, tuple(left))


def _class_rows(name: str, source: Tensor, old_classes: Sequence[str], new_classes: Sequence[str], seed: int) -> Tensor:
    mean, spread = source.mean(dim=0), source.std(dim=0, unbiased=False).mean()
    if len(source) == 1:
        spread = source.square().mean().sqrt()
    if name.endswith("w_mean"):
        spread = torch.zeros(())  # follows from the codes, and is measured in the end
    rows = []
    for label in new_classes:
        if label in old_classes:
            rows.append(source[list(old_classes).index(label)])
        else:
            noise = torch.randn(source.shape[1], generator=torch_generator(seed, "new class", name, label))
            rows.append(mean + spread * noise)
    return torch.stack(rows)


def checkpoint_of(init: str) -> Path:
    """The file that `GanConfig.init` names, where that is not none.

    Raises:
        CheckpointError: it is a pickle or a folder.
    """
    if init == "base":
        return asset_path(BASE)
    path = Path(init)
    if path.suffix == ".pkl":
        raise CheckpointError(f"{path} is a pickle.", "Convert it first: histosynth convert.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder.", f"Give the file: {path / 'checkpoints' / 'gan.safetensors'}.")
    return path


def _require_width(old: Shape, new: Shape, path: Path) -> None:
    """Refuse networks whose common layers have other shapes: parts of layers are worse than none."""
    if old.architecture != new.architecture:
        raise CheckpointError(
            f"{path} has architecture {old.architecture}, these settings {new.architecture}.",
            f"Use architecture={old.architecture}, or init=none.",
        )
    if bool(old.autoencoder) != bool(new.autoencoder):
        kinds = ["latents" if shape.autoencoder else "pixels" for shape in (old, new)]
        raise CheckpointError(
            f"{path} has networks of {kinds[0]}, these settings of {kinds[1]}.",
            f"Use space={kinds[0]}, or init=none.",
        )
    common = sorted(set(old.resolutions) & set(new.resolutions))
    wrong = [name for name in _WIDTHS if getattr(old, name) != getattr(new, name)]
    if any(old.channels(r) != new.channels(r) for r in common):
        wrong += ["channel_base", "channel_max"]
    if any(old.d_channels(r) != new.d_channels(r) for r in common):
        wrong += ["d_channel_base", "d_channel_max"]
    if wrong:
        theirs, ours = (", ".join(f"{name} {getattr(s, name)}" for name in wrong) for s in (old, new))
        needed = " ".join(f"{name}={getattr(old, name)}" for name in wrong)
        raise CheckpointError(
            f"{path} has networks of another width: {theirs}; these settings have {ours}.",
            f"Use {needed}, or init=none.",
        )


def _say_classes(old: Shape, new: Shape, known: Sequence[str], classes: Sequence[str]) -> None:
    if not (old.classes and new.classes):
        return
    unknown = [c for c in classes if c not in known]
    dropped = [c for c in known if c not in classes]
    if unknown:
        say(f"New to the start weights, so they begin as tissue of any kind: {', '.join(unknown)}")
    if dropped:
        say(f"Classes of the start weights that are left out: {', '.join(dropped)}")


def _missed(name: str, shape: Shape) -> bool:
    """Whether a tensor without a place in a network of this shape changes what it makes."""
    resolution = _RESOLUTION.match(name)
    beyond = resolution is not None and int(resolution[1]) > shape.canvas
    return not (beyond or name.endswith("noise_const"))  # constant noise is for making tiles, not for training


def _part(name: str, depth: int = 2) -> str:
    """The part of the network that a tensor belongs to, for messages."""
    words = name.split(".")
    return ".".join(words[:depth]) if words[0] in ("blocks", "heads", "judges") else words[0]


def export(source: Path | str, path: Path | str, *, half: bool = False, chosen: bool = True) -> Path:
    """Write the averaged generator and the discriminators of a resume state or a checkpoint as a checkpoint.

    Args:
        source: a run folder, the state file in it, or a checkpoint.
        half: store float16, for weights that are shipped.
        chosen: of a resume state, the weights that the validation tiles chose, where they did; no: the last ones.

    Raises:
        CheckpointError: `source` is missing or is not a GAN.
    """
    source = Path(source)
    if source.is_dir():
        source = source / "state" / "state.safetensors"
    if source.name == "state.safetensors":
        state = load_state(source)
        card = state["card"]
        weights = (state.get("choice", {}).get("kept") or state) if chosen else state
        if not chosen:
            card = {k: v for k, v in card.items() if k not in _CHOICE} | {
                "chosen_on": "last step", "chosen_step": state["step"],
            }  # fmt: skip
        average = Generator(Shape(**card["shape"]))
        average.load_state_dict(weights["average"])
        average.mapping.measure_mean()
        tensors = {f"G_ema.{k}": v for k, v in average.state_dict().items()}
        for prefix, name in (("D.", "discriminator"), ("H.", "head")):
            tensors |= {f"{prefix}{k}": v for k, v in weights.get(name, {}).items()}
    else:
        tensors, card = load_checkpoint(source)
        require_kind(card, "gan", source)
    return save_checkpoint(path, tensors, card, half=half)


def export_base(source: Path | str, path: Path | str) -> Path:
    """`export` in half precision under the name of the base weights: what is shipped inside the package."""
    return export(source, path, half=True)
