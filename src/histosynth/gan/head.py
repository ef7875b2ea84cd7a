"""The pathology head: a second discriminator that sees the tiles through a frozen encoder.

Two ways of looking. "features": one small judge on the encoder's feature vector, for any encoder. "maps": several
small judges on feature maps of different depths, after fixed random mixing across channels and scales (Projected GAN,
2111.01007), each conditioned on the class. Discriminators on frozen encoders: Vision-aided GAN (2112.09130).

The encoder gets no gradients, the tiles do: that is what carries its knowledge to the generator. An encoder that cuts
them (`torch.no_grad` around its forward) is refused when the head is made.

**Licence.** Weights trained through an encoder come from its weights: if those may not be used commercially, neither
may the generator, the discriminator, or, where its terms say so, the tiles. `licence_of` says what the card must hold.

A trainer may add alpha x the mean of the head's logits to the logit of the pixels, or give every logit of the head a
loss of its own, weighted by alpha; then each depth has to be convinced by itself.

The gradient penalty R1 belongs to the discriminator of pixels alone. Spectral normalisation (1802.05957) bounds the
head instead, and attention inside an encoder has no second derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import torch_generator
from histosynth.gan.judges import Judge, Mixing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histosynth.core.types import Encoder

Mode = Literal["auto", "features", "maps"]
FAR = 4.0
"""Where pixels are cut before an encoder sees them."""


@runtime_checkable
class MapEncoder(Protocol):
    """An encoder that shows its feature maps."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """float [N, 3, H, W] in [-1, 1] -> [N, C, h, w] each, finest first, with gradients to the images."""
        ...


class PathologyHead(nn.Module):
    """Tiles and classes -> logits [N, k], positive for real, through a frozen encoder.

    k is 1 in mode "features", and 16 for every map in mode "maps", where the mean of a loss over all logits is its
    mean over the depths. Any tile size that the encoder takes will do, also another one at every call.

    Args:
        encoder: of `histosynth.encoders.load`. It stays out of the state dict; `encoder_card` names it.
        classes: 0 or 1: no class, labels are not looked at.
        mode: "auto" takes maps where the encoder has them.
        width, widest: channels of the judges.
        hidden: width of the hidden layer in mode "features"; 0: logits linear in the features.
        smooth: see `Judge`.
        lean: see `Judge`; and mix across scales with 1x1 convolutions. Not lean, with width 64, is what Projected GAN
            does, and takes nearly twice the time on a CPU.
        seed: of the fixed mixing. The learned weights come from torch's global state, as those of other networks.

    Raises:
        SettingError: mode "maps" with an encoder that has none, or an encoder that lets no gradient through.
    """

    scales: Tensor

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        mode: Mode = "auto",
        *,
        width: int = 48,
        widest: int = 128,
        hidden: int = 256,
        smooth: bool = False,
        lean: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        name = encoder.card.name
        if mode not in ("auto", "features", "maps"):
            raise SettingError(f"The mode of the pathology head is {mode!r}.", "Use auto, features or maps.")
        if mode == "maps" and not isinstance(encoder, MapEncoder):
            raise SettingError(f"The encoder {name!r} shows no feature maps.", "Use mode features, or tissue-tiny.")
        self._encoder = (encoder,)  # in a tuple: an encoder that is a module would become part of this one
        self.mode = "features" if mode == "features" or not isinstance(encoder, MapEncoder) else "maps"
        self.classes = classes
        seen = self._probe(max(encoder.card.input_size, 64))
        sizes = [(x.shape[1], min(x.shape[-2:])) for x in seen]
        self.mixing: Mixing | None = None
        if self.mode == "maps":
            self.mixing = Mixing([channels for channels, _ in sizes], width, widest, 1 if lean else 3, seed)
            judges = [
                Judge(w, size, classes, w if lean else width, widest, smooth=smooth, lean=lean)
                for w, (_, size) in zip(self.mixing.widths, sizes, strict=True)
            ]
        else:
            judges = [Judge(sizes[0][0], 1, classes, hidden, grid=1)]
        self.judges = nn.ModuleList(judges)
        # one scale for each map: `calibrate` sets them
        self.register_buffer("scales", torch.ones(len(seen)))

    @property
    def encoder(self) -> Encoder:
        """What it sees through."""
        return self._encoder[0]

    def forward(self, images: Tensor, labels: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images [N, 3, S, S] in [-1, 1] and int64 [N] -> float32 logits [N, k]; gradients reach the images.

        No tile looks at another one, so real and fake tiles may come in one batch, which is faster than two.

        Args:
            labels: a label below 0 is a tile without a class; None: all of them are.
            dtype: bfloat16 for fast convolutions in encoder and head; the last layer stays in float32.
        """
        if labels is not None and len(labels) != len(images):
            raise DataError(f"There are {len(images)} tiles and {len(labels)} labels.", "Give one for each tile.")
        seen = self.see(images, dtype)
        seen = [x * scale for x, scale in zip(seen, self.scales.to(dtype), strict=True)]
        if self.mixing is not None:
            seen = self.mixing(seen)
        return torch.cat([judge(x, labels) for judge, x in zip(self.judges, seen, strict=True)], dim=1)

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Scale each map, or the features, to a mean square of 1 on these real tiles: once, before training.

        tissue-tiny does not need it; the features of other encoders may be a hundred times larger or smaller than the
        steps in which the head learns.
        """
        energy = [x.float().square().mean() for x in self.see(images, torch.float32)]
        self.scales.copy_(torch.stack(energy).clamp_min(1e-12).rsqrt())

    def see(self, images: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """What the encoder shows of images [N, 3, S, S] in [-1, 1]: [N, C, h, w] each, with gradients to the images."""
        half = dtype == torch.bfloat16
        # encoders refuse what looks like grey levels, and a young generator may go far beyond [-1, 1]
        images = images.float().clamp(-FAR, FAR)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            if self.mode == "maps":
                found = self.encoder.maps(images)  # type: ignore[attr-defined]
            else:
                found = [self.encoder.differentiable(images)[:, :, None, None]]
        return [x.to(images.device, dtype) for x in found]

    def _probe(self, size: int) -> list[Tensor]:
        """What the encoder shows of one tile; also whether gradients come back."""
        images = (torch.rand(1, 3, size, size, generator=torch_generator(0, "pathology head", "probe")) - 0.5) * 2
        images.requires_grad_(True)
        with torch.enable_grad():
            seen = self.see(images, torch.float32)
            total = torch.stack([x.float().square().mean() for x in seen]).sum()
            gradient = torch.autograd.grad(total, images)[0] if total.requires_grad else None
        if gradient is None or not gradient.any():
            raise SettingError(
                f"The encoder {self.encoder.card.name!r} lets no gradient through to the tiles.",
                "A generator cannot learn from it: take another one, or mend its differentiable().",
            )
        return [x.detach() for x in seen]


def encoder_card(encoder: Encoder) -> dict[str, Any]:
    """What the card of a checkpoint says of an encoder that took part in its training: name, hash of the weights where
    there is one, licence, and whether it allows commercial use."""
    card = encoder.card
    known = {"weights_hash": str(encoder.weights_hash)} if hasattr(encoder, "weights_hash") else {}
    return {"name": card.name, "licence": card.licence, "commercial": card.commercial, **known}


def licence_of(encoders: Sequence[Encoder], own: str = "Apache-2.0") -> str:
    """The licence of weights that were trained through these encoders, for the card.

    `own` where every encoder allows commercial use. Otherwise the terms of those that do not, with their names: the
    weights were made with theirs, so what those forbid is not ours to allow.
    """
    bound = {e.card.name: e.card.licence for e in encoders if not e.card.commercial}
    if not bound:
        return own
    return "; ".join(f"{licence} (trained through {name})" for name, licence in bound.items())
