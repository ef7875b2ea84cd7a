"""Networks with labels from networks without, and the other way round, that begin as the same function.

A labelled network made here starts with (almost) the same embedding for every class, so that all its classes are
what the unlabelled one knew; each embedding then goes its own way. An unlabelled one starts as the average class.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from histosynth.core.seeds import derive, torch_generator
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.layers import EqualLinear, normalise
from histosynth.gan.mapping import Mapping
from histosynth.gan.shape import Shape

_NOISE = 1e-4  # of new embeddings, whose usual size is 1: too little to change a pixel
_LABELS = ("classes", "class_embedding", "label_conditioning", "d_mapping_depth", "cmap_dim")


def same_labels(network: nn.Module, old: Shape, new: Shape) -> bool:
    """Whether the part of a network that sees the class is made in the same way, whatever the number of classes."""
    if bool(old.classes) != bool(new.classes):
        return False
    if isinstance(network, Generator):
        return not old.classes or old.class_embedding == new.class_embedding
    kinds = {
        (s.conditioning, (s.d_mapping_depth, s.cmap_dim) if s.conditioning == "mapping" else ()) for s in (old, new)
    }
    return len(kinds) == 1


@torch.no_grad()
def relabelled(source: nn.Module, target: Shape, seed: int) -> nn.Module:
    """A generator or discriminator that computes what `source` does, with the labels of `target`.

    What `source` knows of single classes is lost; width and size stay those of `source`.
    """
    shape = replace(source.shape, **{name: getattr(target, name) for name in _LABELS})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "new labels"))
        if isinstance(source, Generator):
            plain = _generator_without(source) if source.shape.classes else source
            return _generator_with(plain, shape, seed) if shape.classes else plain
        assert isinstance(source, Discriminator)
        plain = _discriminator_without(source) if source.shape.conditioning != "none" else source
        return _discriminator_with(plain, shape, seed)


def _generator_without(source: Generator) -> Generator:
    result = Generator(replace(source.shape, classes=0))
    _copy(source, result)
    old, new = source.mapping.layers[0], result.mapping.layers[0]
    embedding = source.mapping.embedding
    assert isinstance(old, EqualLinear) and isinstance(new, EqualLinear) and embedding is not None
    weight, bias = _effective(old)
    length = source.shape.z_dim
    if source.mapping.add:
        average = weight @ embedding.mean(dim=0)
    else:
        weight, of_class = weight[:, :length], weight[:, length:]
        average = of_class @ normalise(embedding).mean(dim=0)
    _set_effective(new, weight, bias + average)
    result.mapping.w_mean.copy_(source.mapping.w_mean.mean(dim=0, keepdim=True))
    return result


def _generator_with(source: Generator, shape: Shape, seed: int) -> Generator:
    result = Generator(shape)
    _copy(source, result)
    mapping = result.mapping
    assert mapping.embedding is not None
    noise = _noise(mapping.embedding, seed)
    if mapping.add:
        mapping.embedding.copy_(noise)
    else:
        first = mapping.layers[0]
        assert isinstance(first, EqualLinear) and isinstance(source.mapping.layers[0], EqualLinear)
        weight, bias = _effective(source.mapping.layers[0])
        of_class = _effective(first)[0][:, shape.z_dim :].clone()
        start = mapping.embedding[:1].clone()
        mapping.embedding.copy_(start + noise)
        # what the shared embedding adds is taken out of the bias
        _set_effective(first, torch.cat([weight, of_class], dim=1), bias - of_class @ normalise(start)[0])
    mapping.w_mean.copy_(source.mapping.w_mean.expand_as(mapping.w_mean))
    return result


def _discriminator_without(source: Discriminator) -> Discriminator:
    result = Discriminator(replace(source.shape, label_conditioning="none"))
    _copy(source, result)
    if source.lite:
        return result  # spectral normalisation does not let a class be averaged into the head
    old, new = source.head, result.head
    weight, bias = _effective(old)
    if source.embedding is not None:
        average = source.embedding.mean(dim=0, keepdim=True) / math.sqrt(source.embedding.shape[1])
        _set_effective(new, weight + average, bias)
    elif source.mapping is not None:
        mean = _mapped(source.mapping, source.shape.classes).mean(dim=0, keepdim=True) / math.sqrt(len(weight))
        _set_effective(new, mean @ weight, (mean @ bias[:, None])[0])
    return result


def _discriminator_with(source: Discriminator, shape: Shape, seed: int) -> Discriminator:
    result = Discriminator(shape)
    _copy(source, result)
    if result.embedding is not None:
        result.embedding.copy_(_noise(result.embedding, seed))
    elif result.mapping is not None and result.mapping.embedding is not None and not source.lite:
        embedding = result.mapping.embedding
        embedding.copy_(embedding[:1] + _noise(embedding, seed))
        code = _mapped(result.mapping, shape.classes).mean(dim=0)
        along = code / code.square().sum()
        weight, bias = _effective(source.head)
        free = _effective(result.head)[0]
        # along the code that all classes share, the old head; across it, features for the classes to learn with
        free = free - torch.outer(along, code @ free)
        root = math.sqrt(len(code))
        _set_effective(result.head, free + root * along[:, None] * weight, root * along * bias)
    return result


def _copy(source: nn.Module, target: nn.Module) -> None:
    own = source.state_dict()
    for name, tensor in target.state_dict().items():
        if name in own and own[name].shape == tensor.shape:
            tensor.copy_(own[name])


def _effective(layer: EqualLinear) -> tuple[Tensor, Tensor]:
    """Weight and bias as the layer uses them."""
    return layer.weight * layer.weight_gain, layer.bias * layer.bias_gain


def _set_effective(layer: EqualLinear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight / layer.weight_gain)
    layer.bias.copy_(bias / layer.bias_gain)


def _mapped(mapping: Mapping, classes: int) -> Tensor:
    return mapping(None, torch.arange(classes))


def _noise(embedding: Tensor, seed: int) -> Tensor:
    return _NOISE * torch.randn(embedding.shape, generator=torch_generator(seed, "new embeddings"))
