"""NVIDIA's names of tensors and ours."""

from __future__ import annotations

import re

from histosynth.gan.shape import Shape

_GENERATOR = (
    (r"mapping\.layers\.(\d+)\.(weight|bias)", r"mapping.fc\1.\2"),
    (r"mapping\.w_avg", r"mapping.w_avg"),
    (r"blocks\.(b\d+)\.const", r"synthesis.\1.const"),
    (r"blocks\.(b\d+\.conv\d)\.conv\.weight", r"synthesis.\1.weight"),
    (r"blocks\.(b\d+\.conv\d)\.conv\.style\.(weight|bias)", r"synthesis.\1.affine.\2"),
    (r"blocks\.(b\d+\.conv\d)\.(bias|noise_strength|noise_const)", r"synthesis.\1.\2"),
    (r"blocks\.(b\d+)\.to_rgb\.weight", r"synthesis.\1.torgb.weight"),
    (r"blocks\.(b\d+)\.to_rgb\.style\.(weight|bias)", r"synthesis.\1.torgb.affine.\2"),
    (r"blocks\.(b\d+)\.rgb_bias", r"synthesis.\1.torgb.bias"),
)
_DISCRIMINATOR = (
    (r"from_rgb\.(weight|bias)", r"b{size}.fromrgb.\1"),
    (r"blocks\.(b\d+)\.(conv0|conv1|skip)\.(weight|bias)", r"\1.\2.\3"),
    (r"heads\.(b\d+)\.(weight|bias)", r"\1.fromrgb.\2"),
    (r"conv\.(weight|bias)", r"b4.conv.\1"),
    (r"dense\.(weight|bias)", r"b4.fc.\1"),
    (r"head\.(weight|bias)", r"b4.out.\1"),
    (r"mapping\.layers\.(\d+)\.(weight|bias)", r"mapping.fc\1.\2"),
)
OWN = ("mapping.embedding", "mapping.w_mean", "embedding")
"""Ours without a twin: NVIDIA's `mapping.embed` and the single `w_avg` say the same in another form."""
EMBED = ("mapping.embed.weight", "mapping.embed.bias")


def theirs(name: str, shape: Shape, generator: bool) -> str | None:
    """NVIDIA's name of our tensor; None for those of `OWN`."""
    if name in OWN:
        return None
    for pattern, form in _GENERATOR if generator else _DISCRIMINATOR:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(form.replace("{size}", str(shape.size)))
    raise KeyError(name)


def filters(shape: Shape, generator: bool) -> list[str]:
    """Where NVIDIA's modules keep the resampling filter (it is the same everywhere)."""
    found = []
    for r in shape.resolutions:
        if generator:
            parts = ["", "conv1."] if r == 4 else ["", "conv0.", "conv1."]
            found += [f"synthesis.b{r}.{part}resample_filter" for part in parts]
        elif r > 4:
            parts = ["", "conv0.", "conv1."] + (["skip."] if shape.discriminator == "resnet" else [])
            parts += ["fromrgb."] if r == shape.size or shape.discriminator == "skip" else []
            found += [f"b{r}.{part}resample_filter" for part in parts]
        else:
            parts = ["conv."] + (["fromrgb."] if shape.discriminator == "skip" else [])
            found += [f"b4.{part}resample_filter" for part in parts]
    return found
